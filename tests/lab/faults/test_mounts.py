"""Mounts that are dead, doubled, forgotten or stuck; copies of one filesystem side by side; a growth cut short."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import grpc
import pytest

from csi.pb import csi_pb2 as pb
from tests.lab import roles
from tests.lab.cluster import MIB, STAGING, TARGET, Cluster, Machine, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.guest import Guest
from tests.lab.oracle import Oracle

from . import initiator, tgtd

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Code = grpc.StatusCode
_XFS = capability(fs_type="xfs")


def code_of(error: grpc.RpcError | None) -> Code:
    return Code.OK if error is None else error.code()


@contextmanager
def lost_target(cluster: Cluster, target: str) -> Iterator[None]:
    """The target of one volume is gone meanwhile, and those of the others are not; the controller is down."""
    assert cluster.snode.driver is not None
    snode = cluster.snode.guest
    cluster.snode.driver.kill9()
    tid = tgtd.targets(cluster)[target]
    try:
        snode.sh(f"{tgtd.T} --op unbind --mode target --tid {tid} --initiator-name ALL 2>/dev/null; true")
        shown = snode.sh(f"{tgtd.T} --op show --mode conn --tid {tid}")
        sid = shown.split("Session: ")[1].split()[0]
        snode.sh(f"{tgtd.T} --op delete --mode conn --tid {tid} --sid {sid} --cid 0")
        roles.until(snode, f"{tgtd.T} --op delete --mode target --tid {tid} 2>/dev/null", "the end of the target")
        yield
    finally:
        cluster.start_driver(cluster.snode)


def settings_of_session(guest: Guest, target: str, name: str, value: int) -> None:
    """Change a setting of a session in the kernel, which the driver gives it at its login."""
    line = f"for s in /sys/class/iscsi_session/*; do grep -qx {target} $s/targetname && echo {value} > $s/{name}; done"
    guest.sh(line)


def nothing_is_mounted(guest: Guest, volume_id: str) -> None:
    assert guest.run(f"grep {volume_id} /proc/self/mountinfo")[1] == ""
    assert (initiator.sessions(guest), initiator.disks(guest), initiator.records(guest)) == ([], [], [])


# -- taken for done --------------------------------------------------------------------------------------------------


def test_a_mount_whose_disk_is_gone_is_not_taken_for_staged(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    oracle = Oracle("one")
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    cluster.stage(volume_id, cnode, context)
    path = cluster.mount(volume_id, cnode)
    oracle.write(guest, f"{path}/records")
    oracle.wait_for(20)
    # Somebody logs out under the mount, which iscsiadm allows.
    guest.sh(["iscsiadm", "-m", "node", "-T", initiator.target_of(context), "--logout"])
    assert initiator.disks(guest) == []
    error = refused(lambda: cluster.stage(volume_id, cnode, context))
    assert error is None, error.details()
    [line] = guest.sh(f"grep -F {STAGING}/{volume_id} /proc/self/mountinfo").splitlines()
    assert f" /dev/{initiator.disk_of(guest, initiator.target_of(context))} " in line
    cluster.unmount(volume_id, cnode)
    oracle.judge(guest, f"{cluster.mount(volume_id, cnode)}/records")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


@pytest.mark.soak
def test_a_filesystem_that_gave_up_is_not_taken_for_staged(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    oracle = Oracle("one")
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    target = initiator.target_of(context)
    cluster.stage(volume_id, cnode, context)
    path = cluster.mount(volume_id, cnode)
    settings_of_session(guest, target, "recovery_tmo", 1)
    writer = oracle.write(guest, f"{path}/records")
    oracle.wait_for(20)
    with lost_target(cluster, target):
        assert writer.wait(30) == 0
        error = refused(lambda: cluster.stage(volume_id, cnode, context, timeout=4))
        assert code_of(error) in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
    roles.until(guest, "grep -q LOGGED_IN /sys/class/iscsi_session/*/state", "the session", 400)
    # It is back, and the mount that stands is of the right disk; but the filesystem takes no more writes.
    assert guest.run(f"touch {path}/new")[0] != 0
    error = refused(lambda: cluster.stage(volume_id, cnode, context))
    assert error is not None
    assert error.code() is Code.ALREADY_EXISTS
    assert "read-only (errors of the device make it so: see the kernel log)" in str(error.details())
    cluster.leave(volume_id, cnode)
    cluster.stage(volume_id, cnode, context)
    path = cluster.mount(volume_id, cnode)
    oracle.judge(guest, f"{path}/records")
    guest.sh(f"touch {path}/new")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


@pytest.mark.soak
def test_layers_and_what_the_node_forgot_are_all_taken_down(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    cluster.stage(volume_id, cnode, context)
    path, staged = cluster.mount(volume_id, cnode), f"{STAGING}/{volume_id}"
    disk = initiator.disk_of(guest, initiator.target_of(context))
    guest.sh(f"mount /dev/{disk} {staged}; mount --bind {staged} {path}; mount --bind {staged} {path}")
    assert cnode.driver is not None
    cnode.driver.kill9()
    guest.sh("rm -r /var/lib/snode/node")
    cluster.start_driver(cnode)
    known = cnode.node_id
    cnode.node_id = cnode.stubs["node"].NodeGetInfo(pb.NodeGetInfoRequest(), timeout=30).node_id
    assert cnode.node_id != known, "the node remembers its key, so it has forgotten nothing"
    cluster.leave(volume_id, cnode)
    nothing_is_mounted(guest, volume_id)
    cluster.unpublish(volume_id, cnode)
    cluster.delete(volume_id)


# -- an unmount that hangs -------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_an_unmount_of_a_dead_disk_holds_up_nobody(cluster: Cluster, say: Say) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    oracle = Oracle("alive")
    volume_ids = {name: cluster.create(name) for name in ("dead", "alive", "idle")}
    dead, alive, idle = volume_ids.values()
    contexts = {volume_id: cluster.publish(volume_id, cnode) for volume_id in volume_ids.values()}
    for volume_id in (dead, alive):
        cluster.stage(volume_id, cnode, contexts[volume_id])
    guest.sh(f"echo precious > {cluster.mount(dead, cnode)}/file")
    oracle.write(guest, f"{cluster.mount(alive, cnode)}/records")
    with lost_target(cluster, initiator.target_of(contexts[dead])):
        began = time.monotonic()
        error = refused(lambda: cluster.leave(dead, cnode, timeout=3))
        answered = time.monotonic() - began
        assert (code_of(error), answered < 5) == (Code.DEADLINE_EXCEEDED, True)
        assert code_of(refused(lambda: cluster.unstage(dead, cnode))) is Code.ABORTED
        assert cnode.stubs["identity"].Probe(pb.ProbeRequest(), timeout=5).ready.value
        oracle.wait_for_more(20, timeout=20)
        assert code_of(refused(lambda: cluster.stage(idle, cnode, contexts[idle]))) is Code.OK
        cluster.leave(idle, cnode)
        # The service may end and start while the unmount hangs.
        assert cnode.driver is not None
        began = time.monotonic()
        cnode.driver.stop()
        stopped = seconds(began)
        cluster.start_driver(cnode)
        assert code_of(refused(lambda: cluster.unstage(dead, cnode, timeout=5))) is Code.FAILED_PRECONDITION
        assert len(initiator.sessions(guest)) == 2
    began = time.monotonic()
    while refused(lambda: cluster.unstage(dead, cnode, timeout=20)):
        assert time.monotonic() - began < 60
    say(f"answered after {answered:.1f} s of 3; stopped in {stopped}; done {seconds(began)} after the target was back")
    cluster.unpublish(dead, cnode)
    second = cluster.cnodes[1]
    assert second.guest.read(f"{cluster.attach(dead, second)}/file") == "precious\n"
    cluster.detach(dead, second)
    oracle.judge(guest, f"{TARGET}/{alive}/records")
    guest.sh("pkill -9 -f writer.py")
    for volume_id in (alive, idle):
        cluster.detach(volume_id, cnode)
    for volume_id in volume_ids.values():
        cluster.delete(volume_id)


@pytest.mark.soak
def test_an_unmount_ends_when_the_kernel_gives_the_disk_up(cluster: Cluster, say: Say) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    volume_id = cluster.create()
    path = cluster.attach(volume_id, cnode)
    guest.sh(f"echo unsynced > {path}/file")
    assert guest.sh("cat /sys/class/iscsi_session/*/recovery_tmo") == "120"
    cluster.snode.guest.cut()
    began = time.monotonic()
    error = refused(lambda: cluster.leave(volume_id, cnode, timeout=5))
    assert (code_of(error), time.monotonic() - began < 7) == (Code.DEADLINE_EXCEEDED, True)
    while refused(lambda: cluster.unstage(volume_id, cnode, timeout=5)):
        assert time.monotonic() - began < 200
        time.sleep(1)
    say(f"network cut with replacement_timeout 120: unstaged after {seconds(began)}")
    nothing_is_mounted(guest, volume_id)
    cluster.snode.guest.heal()
    path = cluster.attach(volume_id, cnode)
    guest.sh(f"echo works > {path}/file && sync {path}/file")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


# -- copies, growth --------------------------------------------------------------------------------------------------


def made_by_hand(cluster: Cluster, name: str, *, size_bytes: int = 304 * MIB) -> str:
    """A volume with an XFS that was made on the SNODE: through the network it would take long."""
    volume_id = cluster.create(name, size_bytes=size_bytes, parameters={"pool": "thin"})
    cluster.snode.guest.sh(["mkfs.xfs", "-q", "-K", f"/dev/vg0/{volume_id}"])
    return volume_id


@pytest.mark.soak
def test_an_xfs_and_its_copy_are_used_on_one_node(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    origin = made_by_hand(cluster, "origin")
    path = cluster.attach(origin, cnode, how=_XFS)
    guest.sh(f"echo first > {path}/file && sync {path}/file")
    cluster.leave(origin, cnode)
    copy = cluster.create("copy", size_bytes=304 * MIB, parameters={"pool": "thin"})
    options = "bs=1M iflag=direct conv=sparse,fsync status=none"
    cluster.snode.guest.sh(f"dd if=/dev/vg0/{origin} of=/dev/vg0/{copy} {options}")
    paths = {origin: cluster.attach(origin, cnode, how=_XFS)}
    context = cluster.publish(copy, cnode, how=_XFS)
    error = refused(lambda: cluster.stage(copy, cnode, context, how=_XFS))
    assert error is None, error.details()
    paths[copy] = cluster.mount(copy, cnode, how=_XFS)
    uuids = [guest.sh(f"findmnt -n -o UUID {place}") for place in paths.values()]
    assert uuids[0] == uuids[1], "these are no copies, so this shows nothing"
    assert [guest.read(f"{place}/file") for place in paths.values()] == ["first\n", "first\n"]
    for volume_id, place in paths.items():
        guest.sh(f"echo {volume_id} > {place}/file && sync {place}/file")
    for volume_id in paths:
        cluster.detach(volume_id, cnode)
    for volume_id in paths:
        path = cluster.attach(volume_id, cnode, how=_XFS)
        assert guest.read(f"{path}/file") == f"{volume_id}\n"
        cluster.detach(volume_id, cnode)
        cluster.delete(volume_id)


#: The steps of NodeExpandVolume at which a node dies, by their numbers: around the rescan, and that of the filesystem.
_STEPS = {"ext4": ["attribute_helper:before", "attribute_helper:after", "resize2fs:before", "resize2fs:after"]}
_STEPS["xfs"] = [*_STEPS["ext4"][:2], "xfs_growfs:before", "xfs_growfs:after"]


@pytest.mark.soak
@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_growth_that_was_cut_short_is_completed(cluster: Cluster, fs_type: str) -> None:
    # Either request makes it good: the growth repeated, and a stage.
    check_growth(cluster, fs_type, {"expand": 3, "stage": 3})


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("again", ["expand", "stage"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("fs_type", list(_STEPS))
def test_a_growth_that_was_cut_short_anywhere_is_completed(
    cluster: Cluster, fs_type: str, step: int, again: str
) -> None:
    check_growth(cluster, fs_type, {again: step})


def check_growth(cluster: Cluster, fs_type: str, cuts: Mapping[str, int]) -> None:
    """Grow a volume, cut its growth on the node short at a step, and complete it by a request."""
    cnode = cluster.cnodes[0]
    how = capability(fs_type=fs_type)
    size_bytes = 304 * MIB if fs_type == "xfs" else 96 * MIB
    volume_id = made_by_hand(cluster, "grows") if fs_type == "xfs" else cluster.create("grows")
    context = cluster.publish(volume_id, cnode, how=how)
    cluster.stage(volume_id, cnode, context, how=how)
    path = cluster.mount(volume_id, cnode, how=how)
    cnode.guest.sh(f"echo precious > {path}/file && sync {path}/file")
    for again, step in cuts.items():
        size_bytes += 32 * MIB
        cluster.expand(volume_id, size_bytes)
        die_at(cluster, cnode, step, volume_id, size_bytes, _STEPS[fs_type][step - 1])
        if again == "expand":
            cluster.expand_node(volume_id, cnode, size_bytes)
        else:
            cluster.stage(volume_id, cnode, context, how=how)
        blocks, block_bytes = map(int, cnode.guest.sh(f"stat -f -c '%b %S' {path}").split())
        # What the filesystem counts is less than the disk, by its own structures (XFS: a log of 64 MiB).
        overhead = (72 if fs_type == "xfs" else 24) * MIB
        assert size_bytes - overhead < blocks * block_bytes <= size_bytes, (again, step)
    assert cnode.guest.read(f"{path}/file") == "precious\n"
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


def die_at(cluster: Cluster, cnode: Machine, number: int, volume_id: str, size_bytes: int, step: str) -> None:
    """Let the driver of a node die at a step of NodeExpandVolume; it is running again afterwards."""
    log = "/run/steps"
    assert cnode.driver is not None
    cnode.driver.kill9()
    cnode.guest.sh(f": > {log}")
    environment = ["SNODE_TEST=1", f"SNODE_CRASH_AT={number}", f"SNODE_CRASH_LOG={log}"]
    cluster.start_driver(cnode, environment=environment)
    assert refused(lambda: cluster.expand_node(volume_id, cnode, size_bytes)) is not None
    assert cnode.driver.process.wait(10) == -9
    assert cnode.guest.read(log).splitlines()[-1] == step
    cluster.start_driver(cnode)
