"""When a filesystem is made, and when never: disks that can't be read, kills of mkfs, a destroyed superblock."""

import random
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from csi.pb import csi_pb2 as pb
from tests.lab import roles
from tests.lab.cluster import MIB, Cluster, Machine, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.guest import Guest
from tests.lab.oracle import Oracle

from .mkfs import Mkfs

_SOAK = pytest.mark.soak
pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Code = grpc.StatusCode


def written(cluster: Cluster, volume_id: str, cnode: Machine, records: int = 30) -> tuple[Oracle, Mapping[str, str]]:
    """A volume with records on it, unstaged, and the context that it was published with when it was new."""
    oracle = Oracle(volume_id)
    context = cluster.publish(volume_id, cnode)
    cluster.stage(volume_id, cnode, context)
    path = cluster.mount(volume_id, cnode)
    writer = oracle.write(cnode.guest, f"{path}/records")
    oracle.wait_for(records)
    writer.signal(signal.SIGKILL)
    writer.wait(10)
    cluster.leave(volume_id, cnode)
    assert context["may_format"] == "true"
    return oracle, context


# -- a disk that can't be read ---------------------------------------------------------------------------------------


class Disk:
    """The logical volume of a volume on the SNODE, whose mapping can be replaced while it is exported."""

    def __init__(self, snode: Guest, volume_id: str) -> None:
        self._snode = snode
        self._name = f"vg0-{volume_id.replace('-', '--')}"
        begin, sectors, kind, device, offset = snode.sh(["dmsetup", "table", self._name]).split()
        assert (begin, kind) == ("0", "linear")
        self._sectors, self._device, self._offset = int(sectors), device, int(offset)

    @contextmanager
    def without_reads(self, first: int = 0, sectors: int = 0) -> Iterator[None]:
        """Reads of these sectors (0: of all) fail meanwhile, and writes do not."""
        last = first + sectors if sectors else self._sectors
        places = [(0, first, ""), (first, last, "flakey"), (last, self._sectors, "")]
        self._map(
            f"{begin} {end - begin} flakey {self._device} {self._offset + begin} 0 1 1 error_reads"
            if kind
            else f"{begin} {end - begin} linear {self._device} {self._offset + begin}"
            for begin, end, kind in places
            if begin < end
        )
        try:
            yield
        finally:
            self._map([f"0 {self._sectors} linear {self._device} {self._offset}"])

    def _map(self, lines: "Iterator[str] | list[str]") -> None:
        self._snode.sh(["dmsetup", "load", self._name], stdin="\n".join(lines) + "\n")
        self._snode.sh(["dmsetup", "resume", self._name])


def test_a_disk_that_can_not_be_read_is_never_formatted(cluster: Cluster, say: Say) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    cluster.snode.guest.sh("modprobe dm-flakey")
    mkfs = Mkfs(guest)
    volume_id = cluster.create()
    oracle, context = written(cluster, volume_id, cnode)
    assert len(mkfs.calls()) == 1
    disk = Disk(cluster.snode.guest, volume_id)
    mib = MIB // 512
    # The start alone; where blkid looks, but not the very first sectors; all. (One bad place elsewhere harms nobody:
    # what is there is seen, and may be used.)
    details: list[str] = []
    for first, sectors in ((0, 8), (8, mib), (0, 0)):
        with disk.without_reads(first, sectors):
            error = refused(lambda: cluster.stage(volume_id, cnode, context, timeout=30))
        assert error is not None
        assert (error.code(), len(mkfs.calls())) == (Code.UNAVAILABLE, 1), error.details()
        details.append(str(error.details()))
        assert "can't be read" in details[-1]
    say(f"{len(details)} ways to be unreadable, such as: {details[0]}")
    cluster.stage(volume_id, cnode, context)
    oracle.judge(guest, f"{cluster.mount(volume_id, cnode)}/records")
    assert len(mkfs.calls()) == 1
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


_DROP = """
until ls -d /sys/block/sd* >/dev/null 2>&1; do :; done
sleep {delay}
for disk in /sys/block/sd*; do echo 1 > $disk/device/delete; done
"""


def test_a_disk_that_vanishes_while_it_is_staged_is_never_formatted(cluster: Cluster, say: Say) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    mkfs = Mkfs(guest)
    volume_id = cluster.create()
    oracle, context = written(cluster, volume_id, cnode)
    outcomes = []
    for delay in (0.0, 0.05, 0.1, 0.2, 0.3):
        saboteur = guest.spawn(_DROP.format(delay=delay), name="saboteur")
        error = refused(lambda: cluster.stage(volume_id, cnode, context, timeout=20))
        outcomes.append("OK" if error is None else error.code().name)
        assert outcomes[-1] != "DATA_LOSS", str(error.details()) if error else ""
        saboteur.wait(20)
        assert len(mkfs.calls()) == 1
        cluster.leave(volume_id, cnode)
    say(f"the disk vanished at 5 moments of a stage: {outcomes}")
    assert outcomes.count("OK") < 5
    assert set(outcomes) <= {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    cluster.stage(volume_id, cnode, context)
    oracle.judge(guest, f"{cluster.mount(volume_id, cnode)}/records")
    assert len(mkfs.calls()) == 1
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


@pytest.mark.soak
def test_a_snode_that_falls_silent_after_the_login_costs_no_data(cluster: Cluster, say: Say) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    mkfs = Mkfs(guest)
    volume_id = cluster.create()
    oracle, context = written(cluster, volume_id, cnode)
    with ThreadPoolExecutor(1) as pool:
        stage = pool.submit(refused, lambda: cluster.stage(volume_id, cnode, context, timeout=4))
        roles.until(guest, "ls -d /sys/block/sd* >/dev/null 2>&1", "the disk", 400)
        guest.cut()
        error = stage.result()
    guest.heal()
    began = time.monotonic()
    while again := refused(lambda: cluster.stage(volume_id, cnode, context)):
        assert time.monotonic() - began < 60
        assert again.code() in (Code.ABORTED, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
        time.sleep(0.2)
    say(f"network cut after the login: {error and error.code().name}; staged {seconds(began)} after it came back")
    oracle.judge(guest, f"{cluster.mount(volume_id, cnode)}/records")
    assert len(mkfs.calls()) == 1
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


# -- a mkfs that was killed ------------------------------------------------------------------------------------------

_SIZES = {"ext4": 96 * MIB, "xfs": 304 * MIB, "btrfs": 132 * MIB}


#: XFS is the one whose mkfs begins with the superblock.
_MOMENTS: Mapping[str, tuple[float | str, ...]] = {
    "ext4": (0.05, 0.1, 0.2),
    "btrfs": (0.05, 0.1, 0.2),
    "xfs": (0.05, "superblock"),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fs_type", ["ext4", *(pytest.param(other, marks=pytest.mark.soak) for other in ("btrfs", "xfs"))]
)
def test_a_volume_whose_mkfs_was_killed_is_staged_by_the_next_try(cluster: Cluster, say: Say, fs_type: str) -> None:
    first, second = cluster.cnodes
    mkfs = Mkfs(first.guest)
    how = capability(fs_type=fs_type)
    volume_id = cluster.create(fs_type, size_bytes=_SIZES[fs_type])
    context = cluster.publish(volume_id, first, how=how)
    for moment in _MOMENTS[fs_type]:
        mkfs.kill_after(moment)
        error = refused(lambda: cluster.stage(volume_id, first, context, how=how))
        assert "mkfs" in str(error and error.details()), "mkfs was not killed"
    mkfs.kill_after("")
    # ext4 goes on where it began, the others on another node, as after the loss of the first.
    cnode = first if fs_type == "ext4" else second
    if cnode is second:
        cluster.detach(volume_id, first)
        context = cluster.publish(volume_id, cnode, how=how)
    began = time.monotonic()
    error = refused(lambda: cluster.stage(volume_id, cnode, context, how=how))
    assert error is None, error.details()
    killed = len(_MOMENTS[fs_type])
    say(f"{fs_type}: mkfs killed {killed} times, then staged on {cnode.guest.name} in {seconds(began)}")
    works(cluster, volume_id, cnode, how)


def works(cluster: Cluster, volume_id: str, cnode: Machine, how: pb.VolumeCapability) -> None:
    """A volume that is staged takes a file; it is deleted then."""
    path = cluster.mount(volume_id, cnode, how=how)
    cnode.guest.sh(f"echo works > {path}/file && sync {path}/file")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fs_type", list(_SIZES))
def test_20_kills_of_mkfs(cluster: Cluster, say: Say, fs_type: str) -> None:
    first, second = cluster.cnodes
    how = capability(fs_type=fs_type)
    mkfs = Mkfs(first.guest)
    volume_id = cluster.create("whole", size_bytes=_SIZES[fs_type])
    context = cluster.publish(volume_id, first, how=how)
    began = time.monotonic()
    cluster.stage(volume_id, first, context, how=how)
    whole = time.monotonic() - began
    works(cluster, volume_id, first, how)
    killed = 0
    for kill in range(20):
        volume_id = cluster.create("killed", size_bytes=_SIZES[fs_type])
        context = cluster.publish(volume_id, first, how=how)
        mkfs.kill_after(whole * (kill + random.random()) / 20)
        error = refused(lambda: cluster.stage(volume_id, first, context, how=how))  # noqa: B023 - done in this round
        killed += error is not None
        mkfs.kill_after("")
        cnode = (first, second)[kill % 2]
        if cnode is second:
            cluster.detach(volume_id, first)
            context = cluster.publish(volume_id, cnode, how=how)
        cluster.stage(volume_id, cnode, context, how=how)
        works(cluster, volume_id, cnode, how)
    say(f"{fs_type}: {killed} of 20 kills within {whole:.1f} s came before the end of mkfs, and all were made good")
    assert killed


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fs_type", list(_SIZES))
def test_a_cnode_that_is_lost_during_mkfs(cluster: Cluster, say: Say, fs_type: str) -> None:
    first, second = cluster.cnodes
    how = capability(fs_type=fs_type)
    outcomes = []
    for moment in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0):
        mkfs = Mkfs(first.guest)
        volume_id = cluster.create("lost", size_bytes=_SIZES[fs_type])
        context = cluster.publish(volume_id, first, how=how)
        with ThreadPoolExecutor(1) as pool:
            stage = pool.submit(refused, lambda: cluster.stage(volume_id, first, context, how=how))  # noqa: B023 - done in this round
            while not mkfs.calls():
                time.sleep(0.01)
            time.sleep(moment)
            first.guest.kill9()
            stage.result()
        cluster.unpublish(volume_id, first)
        context = cluster.publish(volume_id, second, how=how)
        error = refused(lambda: cluster.stage(volume_id, second, context, how=how))  # noqa: B023 - done in this round
        outcomes.append("OK" if error is None else error.code().name)
        if error is None:
            works(cluster, volume_id, second, how)
        else:  # cut off while it wrote its last blocks, in any order
            assert error.code() is Code.DATA_LOSS, error.details()
            cluster.detach(volume_id, second)
            cluster.delete(volume_id)
        cluster.boot(first)
    say(f"{fs_type}: power cut 7 times during mkfs, then on the other CNODE: {outcomes}")
    assert "OK" in outcomes


# -- a destroyed superblock ------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_destroyed_superblock_is_for_a_human_to_decide(cluster: Cluster, say: Say) -> None:
    first, second = cluster.cnodes
    nodes = [Mkfs(cnode.guest) for cnode in cluster.cnodes]
    volume_id = cluster.create(size_bytes=160 * MIB)
    oracle, context = written(cluster, volume_id, first)
    device = f"/dev/vg0/{volume_id}"
    roles.until(cluster.snode.guest, f"! lvs -o lv_tags {device} | grep -q blank", "the SNODE's note of data", 200)
    cluster.snode.guest.sh(f"dd if=/dev/zero of={device} bs=4096 count=1 oflag=direct status=none")
    assert cluster.snode.guest.run(["blkid", "-p", device])[0] == 2, (
        "the volume does not look new, so this shows nothing"
    )
    # The context of the time when it was new permits to format; the node knows better.
    error = refused(lambda: cluster.stage(volume_id, first, context))
    assert error is not None
    assert (error.code(), [len(mkfs.calls()) for mkfs in nodes]) == (Code.DATA_LOSS, [1, 0])
    say(str(error.details()))
    # A node that has never seen it asks the SNODE, which knows better as well.
    cluster.detach(volume_id, first)
    error = refused(lambda: cluster.stage(volume_id, second, cluster.publish(volume_id, second)))
    assert error is not None
    assert (error.code(), [len(mkfs.calls()) for mkfs in nodes]) == (Code.DATA_LOSS, [1, 0])
    for word in (
        volume_id,
        "no filesystem is found, and none is made",
        "has held data",
        "fsck with a backup superblock",
    ):
        assert word in str(error.details())
    cluster.detach(volume_id, second)
    # What the human does.
    assert cluster.snode.guest.run(["e2fsck", "-fy", "-b", "32768", device])[0] == 1
    oracle.judge(second.guest, f"{cluster.attach(volume_id, second)}/records")
    cluster.detach(volume_id, second)
    cluster.delete(volume_id)
