"""A node loses a volume without its consent: cut off, alive and mounted, with writes on their way, or not there at all.

Each time another node gets the volume, and nothing of the first one may reach it any more.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest

from csi.model import NodeId
from csi.pb import csi_pb2 as pb
from tests.lab import roles
from tests.lab.cluster import MIB, STAGING, Cluster, Machine, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.faults import initiator, tgtd
from tests.lab.guest import Guest
from tests.lab.oracle import Oracle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Code = grpc.StatusCode
RAW = capability(block=True)
_READERS = capability(mode="MULTI_NODE_READER_ONLY")
_DELAY_SECONDS = 4.0


def code_of(call: Callable[[], object]) -> Code:
    """The status of a call."""
    error = refused(call)
    return Code.OK if error is None else error.code()


def device_of(cluster: Cluster, volume_id: str) -> str:
    """A volume's device on the SNODE, in the pool thick."""
    return f"/dev/vg0/{volume_id}"


def assert_clean(cluster: Cluster, volume_id: str) -> None:
    """The filesystem of a volume that is published nowhere has no fault, not even one that e2fsck would mend."""
    snode = cluster.snode.guest
    device = device_of(cluster, volume_id)
    snode.sh(["lvchange", "-ay", "-K", f"vg0/{volume_id}"])
    rc, out = snode.run(["e2fsck", "-f", "-n", device], 120)
    assert rc == 0, out


def end_writers(guest: Guest) -> None:
    """End all writers, at once, also those that wait for a disk as far as the kernel lets them."""
    guest.run("pkill -9 -f writer.py")


def refusals(cnode: Machine) -> int:
    """How often a login of the node's iscsid, which tries again for ever, was told that there is no such target."""
    assert cnode.daemon is not None
    return cnode.daemon.out.count("target not found")


def wait_for_refusals(cnode: Machine, count: int, timeout: float = 30) -> None:
    """Return once so many logins of the node's iscsid have been refused."""
    end = time.monotonic() + timeout
    while refusals(cnode) < count:
        states = initiator.states(cnode.guest)
        assert time.monotonic() < end, f"the session of the fenced node is {states}, and its logins are not refused"
        time.sleep(0.1)


def give_up_after(guest: Guest, seconds: int) -> None:
    """Let the kernel fail the I/O of sessions that are lost so long; two minutes are too long for a test."""
    guest.sh(f"for f in /sys/class/iscsi_session/*/recovery_tmo; do echo {seconds} > $f; done")


def test_a_node_that_is_cut_off_while_it_writes_writes_no_more(cluster: Cluster, say: Say) -> None:
    first, second = cluster.cnodes
    oracle, new = Oracle("one"), Oracle("one again")
    volume_id = cluster.create()
    path = cluster.attach(volume_id, first)
    oracle.write(first.guest, f"{path}/records")
    oracle.wait_for(30)
    give_up_after(first.guest, 8)
    first.guest.cut()
    # What the node would write out when it can: over what is there, and new. It may hang on the journal, and then fail.
    late = f"head -c 1M /dev/zero | tr '\\0' X | tee {path}/late | dd of={path}/records conv=notrunc status=none"
    first.guest.spawn(late, name="late")
    error = refused(lambda: cluster.publish(volume_id, second))
    assert error is not None
    assert error.code() is Code.FAILED_PRECONDITION
    assert "published to node cnode1" in str(error.details())
    began = time.monotonic()
    cluster.unpublish(volume_id, first)
    fenced = seconds(began)
    acknowledged = oracle.acknowledged
    other = cluster.attach(volume_id, second)
    last = oracle.judge(second.guest, f"{other}/records")
    new.write(second.guest, f"{other}/new")
    new.wait_for(20)
    before = refusals(first)
    first.guest.heal()
    # Its iscsid is answered again, and told that there is no such target; then its kernel gives the writes up.
    until(lambda: refusals(first) >= before + 2 or oracle.acknowledged > acknowledged, "refused logins")
    assert oracle.acknowledged == acknowledged, "the fenced node had a write acknowledged"
    roles.until(first.guest, "grep -q FREE /sys/class/iscsi_session/*/state", "the end of the session", 400)
    first.guest.run("sync")
    assert oracle.acknowledged == acknowledged, "the fenced node had a write acknowledged"
    assert len(oracle.errors) == 1, "the fenced node's writer was not told"
    end_writers(second.guest)
    assert oracle.judge(second.guest, f"{other}/records") == last
    new.judge(second.guest, f"{other}/new")
    assert second.guest.run(["test", "-e", f"{other}/late"])[0] == 1
    cluster.leave(volume_id, first)
    cluster.detach(volume_id, second)
    assert_clean(cluster, volume_id)
    cluster.delete(volume_id)
    say(f"fenced in {fenced}: {acknowledged} records before, none after")


def test_a_node_that_gets_its_volume_back_must_let_go_of_the_old_attachment(cluster: Cluster, say: Say) -> None:
    first, second = cluster.cnodes
    new = Oracle("one")
    volume_id = cluster.create()
    path = cluster.attach(volume_id, first)
    first.guest.sh(f"mkdir {path}/old && echo old | tee {path}/old/{{1..50}} && sync -f {path}")
    give_up_after(first.guest, 10)
    [old] = initiator.sessions(first.guest)
    before = refusals(first)
    cluster.unpublish(volume_id, first)
    other = cluster.attach(volume_id, second)
    second.guest.sh(
        f"rm -r {other}/old && mkdir {other}/new && echo new | tee {other}/new/{{1..50}} && sync -f {other}"
    )
    writer = new.write(second.guest, f"{other}/records")
    new.wait_for(20)
    writer.signal(9)
    writer.wait(30)
    new.judge(second.guest, f"{other}/records")
    cluster.detach(volume_id, second)

    # The same volume for the same node; what it has mounted knows nothing of the other node's files.
    context = cluster.publish(volume_id, first)
    first.guest.sh(f"rm -r {path}/old && echo stale > {path}/stale")
    wait_for_refusals(first, before + 2)
    assert initiator.sessions(first.guest) == [old] != [initiator.target_of(context)]
    error = refused(lambda: cluster.stage(volume_id, first, context))
    assert error is not None
    assert error.code() is Code.FAILED_PRECONDITION
    for word in ("older attachment", f"mounted on {STAGING}", "must be unpublished and unstaged first"):
        assert word in str(error.details())
    assert initiator.sessions(first.guest) == [old]
    # What an orchestrator does then.
    began = time.monotonic()
    cluster.leave(volume_id, first)
    left = seconds(began)
    cluster.stage(volume_id, first, context)
    path = cluster.mount(volume_id, first)
    assert sorted(first.guest.sh(["ls", path]).split()) == ["lost+found", "new", "records"]
    assert first.guest.sh(f"cat {path}/new/*").split() == ["new"] * 50
    new.judge(first.guest, f"{path}/records")
    cluster.detach(volume_id, first)
    assert_clean(cluster, volume_id)
    cluster.delete(volume_id)
    say(f"{refusals(first) - before} logins of the old session refused; let go of in {left}; the new files are whole")


def test_the_fence_waits_for_writes_that_are_on_their_way(cluster: Cluster, say: Say) -> None:
    first, second = cluster.cnodes
    oracle = Oracle("one")
    volume_id = cluster.create(size_bytes=16 * MIB)
    path = cluster.attach(volume_id, first, how=RAW)
    writer = oracle.write(first.guest, path)
    oracle.wait_for(20)
    give_up_after(first.guest, 3)
    slow_disk(cluster, volume_id, _DELAY_SECONDS)
    until(lambda: writes_on_their_way(cluster, volume_id) == 1, "a write on its way")
    began = time.monotonic()
    # The requests end, the fence does not: a write of the old node could come after one of the new node.
    assert code_of(lambda: unpublish(cluster, volume_id, first.node_id, timeout=1)) is Code.DEADLINE_EXCEEDED
    request = pb.ControllerPublishVolumeRequest(volume_id=volume_id, node_id=second.node_id, volume_capability=RAW)
    publish = cluster.snode.stubs["controller"].ControllerPublishVolume
    assert code_of(lambda: publish(request, timeout=1)) in (Code.ABORTED, Code.DEADLINE_EXCEEDED)
    assert writes_on_their_way(cluster, volume_id) == 1, "the write was over too soon to show anything"
    while code_of(lambda: unpublish(cluster, volume_id, first.node_id)) is Code.ABORTED:
        time.sleep(0.05)  # the request before it is still under way
    assert writes_on_their_way(cluster, volume_id) == 0, "fenced, they say, and a write is still on its way"
    fenced, fenced_content = time.monotonic() - began, content(cluster, volume_id)
    slow_disk(cluster, volume_id, 0)  # lands what is still held back
    assert content(cluster, volume_id) == fenced_content
    other = cluster.attach(volume_id, second, how=RAW)
    writer.wait(30)
    cluster.leave(volume_id, first)
    oracle.judge(second.guest, other)
    cluster.detach(volume_id, second)
    cluster.delete(volume_id)
    say(f"a disk that takes {_DELAY_SECONDS:.0f} s for a write: two requests in vain, fenced after {fenced:.1f} s")


def dm_name(volume_id: str) -> str:
    """What device-mapper calls a volume of the pool thick."""
    return "vg0-" + volume_id.replace("-", "--")


def slow_disk(cluster: Cluster, volume_id: str, delay_seconds: float) -> None:
    """Let every write to a volume's disk take so long; 0 = as before."""
    snode = cluster.snode.guest
    name = dm_name(volume_id)
    start, length, _, *rest = snode.sh(["dmsetup", "table", name]).split()
    place = " ".join(rest[:2])
    delay = int(delay_seconds * 1000)
    kind = f"delay {place} 0 {place} {delay}" if delay else f"linear {place}"
    snode.sh(f"modprobe dm-delay && dmsetup load {name} --table '{start} {length} {kind}'")
    snode.sh(f"dmsetup suspend {name} && dmsetup resume {name}")


def writes_on_their_way(cluster: Cluster, volume_id: str) -> int:
    """How many writes a disk made slow holds back now."""
    status = cluster.snode.guest.sh(
        ["dmsetup", "status", dm_name(volume_id)]
    )  # start length delay READS WRITES FLUSHES
    return int(status.split()[4])


def until(check: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Return once `check` is true."""
    end = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < end, f"{what}: not seen in {timeout} s"
        time.sleep(0.05)


def content(cluster: Cluster, volume_id: str) -> str:
    """A checksum of what is on a volume's disk, which the page cache does not tell."""
    device = device_of(cluster, volume_id)
    return cluster.snode.guest.sh(f"dd if={device} bs=1M iflag=direct status=none | sha256sum")


@pytest.mark.soak
def test_unpublish_needs_no_node(cluster: Cluster, say: Say) -> None:
    first = cluster.cnodes[0]
    volume_id = cluster.create()
    times = []
    for lose in (first.guest.cut, first.guest.kill9):
        path = cluster.attach(volume_id, first)
        first.guest.sh(f"echo here > {path}/file && sync -f {path}")
        lose()
        began = time.monotonic()
        unpublish(cluster, volume_id, first.node_id)
        times.append(seconds(began))
        assert tgtd.targets(cluster) == {}
        unpublish(cluster, volume_id, first.node_id)
        first.guest.kill9()
        cluster.restore()
        initiator.until_nothing_is_left(first.guest)
    say(f"fenced a node that is cut off in {times[0]}, one without power in {times[1]}")
    cluster.delete(volume_id)


@pytest.mark.soak
def test_unpublish_of_what_is_not_published_changes_nothing(cluster: Cluster) -> None:
    first, second = cluster.cnodes
    volume_id = cluster.create()
    stranger = str(replace(NodeId.parse(first.node_id), name="cnode9", initiator="iqn.2026-11.io.test:cnode9"))
    for node_id in (first.node_id, stranger, "no-node-of-ours", ""):
        for name in (volume_id, "no-volume-of-ours", f"v-{'a' * 26}"):
            unpublish(cluster, name, node_id)
    cluster.publish(volume_id, first)
    published = tgtd.targets(cluster)
    assert len(published) == 1
    for node_id in (second.node_id, stranger, "no-node-of-ours"):
        unpublish(cluster, volume_id, node_id)
    assert tgtd.targets(cluster) == published
    cluster.unpublish(volume_id, first)
    cluster.delete(volume_id)


def test_unpublish_without_a_node_is_from_all_nodes(cluster: Cluster) -> None:
    volume_id = cluster.create()
    for cnode in cluster.cnodes:
        cluster.publish(volume_id, cnode, how=_READERS)
    assert len(tgtd.targets(cluster)) == 2
    unpublish(cluster, volume_id, "")
    assert tgtd.targets(cluster) == {}
    cluster.delete(volume_id)


def unpublish(cluster: Cluster, volume_id: str, node_id: str, *, timeout: float = 30) -> None:
    """ControllerUnpublishVolume of any id from any node."""
    request = pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node_id)
    cluster.snode.stubs["controller"].ControllerUnpublishVolume(request, timeout=timeout)
