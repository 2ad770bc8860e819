"""tgtd keeps nothing on disk: it is killed, its targets are spoiled by hand, a node is fenced while it writes."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from csi.model import NodeId, scsi_id_of
from tests.lab import roles
from tests.lab.channel import Command
from tests.lab.cluster import Cluster, Machine, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.faults import tgtd
from tests.lab.faults.login import CLOSED, GRANTED, NOT_FOUND, Login
from tests.lab.faults.tgtd import T
from tests.lab.oracle import Oracle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SHARED_RAW = capability(block=True, mode="MULTI_NODE_MULTI_WRITER")
_OTHER = "/tmp/other"


def end(command: Command) -> None:
    """End a writer, at once."""
    command.signal(9)
    command.wait(30)


def test_a_filesystem_goes_on_after_tgtd_was_killed(cluster: Cluster, say: Say) -> None:
    cnode = cluster.cnodes[0]
    oracle = Oracle("one")
    volume_id = cluster.create()
    path = cluster.attach(volume_id, cnode)
    writer = oracle.write(cnode.guest, f"{path}/records")
    oracle.wait_for(30)
    tgtd.kill(cluster)
    began = time.monotonic()
    tgtd.start(cluster)
    running = seconds(began)
    cluster.wait_for_targets(1)
    restored = seconds(began)
    oracle.wait_for_more()
    say(
        f"tgtd killed: runs again after {running}, has its target after {restored}, writes go on after {seconds(began)}"
    )
    oracle.judge(cnode.guest, f"{path}/records")
    assert oracle.errors == []
    end(writer)
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


@pytest.mark.soak
def test_sessions_come_back_after_their_new_connections_were_dropped(cluster: Cluster, say: Say) -> None:
    """As they are while targets are restored. iscsid alone stops for ever at one that is dropped at a bad moment.

    That moment is hard to meet, hence many sessions.
    """
    cnode = cluster.cnodes[0]
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode, how=SHARED_RAW)
    cluster.stage(volume_id, cnode, context, how=SHARED_RAW)
    [target] = tgtd.targets(cluster)
    record = f"iscsiadm -m node -T {target}"
    cnode.guest.sh(f"{record} -o update -n node.session.nr_sessions -v 12 && {record} --login")
    look = "cat /sys/class/iscsi_session/*/state | sort | uniq -c"
    assert cnode.guest.sh(look) == "12 LOGGED_IN"
    began = time.monotonic()
    with tgtd.dropped_connections(cluster):
        met = _refusals(cnode)
        while _refusals(cnode) == met and time.monotonic() - began < 20:
            time.sleep(0.1)
        dropped = seconds(began)
    tgtd.start(cluster)
    cluster.wait_for_targets(1)
    began = time.monotonic()
    while (states := cnode.guest.sh(look)) != "12 LOGGED_IN":
        assert time.monotonic() - began < 60, f"not back: {states}"
        time.sleep(0.2)
    say(f"connections dropped for {dropped}; 12 sessions are back {seconds(began)} after the target")
    cnode.guest.sh(f"{record} --logout")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


def _refusals(cnode: Machine) -> int:
    """How often iscsid has told that the kernel refuses a connection because of one before it (ENOTCONN)."""
    assert cnode.daemon is not None
    return cnode.daemon.out.count("retcode -107")


@pytest.mark.soak
@pytest.mark.parametrize("many", [40, pytest.param(200, marks=pytest.mark.soak)])
def test_logins_during_a_long_restoration_come_late_and_are_never_refused(
    cluster: Cluster, say: Say, many: int
) -> None:
    first, second = cluster.cnodes
    crowd, one = cluster.create("crowd"), cluster.create("one")
    began = time.monotonic()
    for number in range(many):
        node = replace(NodeId.parse(first.node_id), name=f"n{number}", initiator=f"iqn.2026-11.io.test:n{number}")
        reader = capability(block=True, mode="MULTI_NODE_READER_ONLY")
        cluster.publish(crowd, replace(first, node_id=str(node)), how=reader)
    took = seconds(began)
    numbers = tgtd.targets(cluster)
    assert len(set(numbers.values())) == many
    # The last record, so that it is the last target to come back.
    contexts = [cluster.publish(one, cnode, how=SHARED_RAW) for cnode in cluster.cnodes]
    cluster.stage(one, first, contexts[0], how=SHARED_RAW)
    [target] = [name for name in tgtd.targets(cluster) if name in contexts[0]["paths"]]
    first.guest.sh(["iscsiadm", "-m", "node", "-T", target, "--logout"])
    tgtd.kill(cluster)
    with ThreadPoolExecutor(3) as pool:
        knocks = pool.submit(_knock, cluster, target, roles.initiator(first.guest))
        by_hand = pool.submit(_log_in, first, target)
        staging = pool.submit(_stage, cluster, one, second, contexts[1])
        began = time.monotonic()
        tgtd.start(cluster)
        cluster.wait_for_targets(many + 2)
        restored = seconds(began)
        answers, codes = knocks.result(), by_hand.result()
        refusals = staging.result()
    say(
        f"{many} publications in {took}; back {restored} after tgtd's restart; exit codes of iscsiadm meanwhile "
        f"{codes}; of {len(answers)} first steps of a login {answers.count(CLOSED)} dropped"
    )
    assert NOT_FOUND not in answers
    assert 19 not in codes
    assert "(iscsiadm 19)" not in refusals
    assert answers.count(CLOSED) > 10 and answers[-1] == GRANTED
    assert tgtd.targets(cluster).items() >= numbers.items()
    for cnode in cluster.cnodes:
        cluster.leave(one, cnode)
    for volume_id in (one, crowd):
        cluster.unpublish(volume_id, replace(first, node_id=""))
        cluster.delete(volume_id)


def _knock(cluster: Cluster, target: str, initiator: str) -> list[int]:
    """Answers to the first step of a login, from the moment that tgtd listens to the first that lets us go on."""
    answers: list[int] = []
    while GRANTED not in answers:
        try:
            connection = cluster.lab.connect(cluster.snode.guest.ip, roles.PORT)
        except ConnectionRefusedError:
            continue
        login = Login(connection, initiator=initiator, target=target)
        answers.append(login.begin())
        login.close()
    return answers


def _stage(cluster: Cluster, volume_id: str, cnode: Machine, context: Mapping[str, str]) -> str:
    """Stage as an orchestrator does, again and again while it may help; returns why it was not done before."""
    refusals = ""
    while error := refused(partial(cluster.stage, volume_id, cnode, context, how=SHARED_RAW)):
        assert error.code().name == "UNAVAILABLE", error
        refusals += str(error.details())
    return refusals


def _log_in(cnode: Machine, target: str) -> list[int]:
    """Exit codes of iscsiadm until one login succeeds."""
    codes: list[int] = []
    while 0 not in codes:
        codes.append(cnode.guest.run(["iscsiadm", "-m", "node", "-T", target, "--login"])[0])
    return codes


# tgtd removes no LUN while a command of it is under way, such as udev's reads of a new disk.
_EXCHANGE = (
    f"for try in $(seq 50); do {T} --op delete --mode logicalunit --tid $TID --lun 1 && break; sleep .1; done && "
    f"{T} --op new --mode logicalunit --tid $TID --lun 1 -b {_OTHER}"
)
#: What is done by hand to a target, as a crash or an error in the middle may leave it.
HALF = {
    "no LUN": f"{T} --op delete --mode logicalunit --tid $TID --lun 1",
    "another device": f"{_EXCHANGE} && "
    f"{T} --op update --mode logicalunit --tid $TID --lun 1 --params scsi_id=$SCSI,scsi_sn=$VOLUME",
    "another identity": f"{T} --op update --mode logicalunit --tid $TID --lun 1 --params scsi_id=6{'0' * 31}",
    "no rule": f"{T} --op unbind --mode target --tid $TID --initiator-name $INITIATOR",
    "a rule for all": f"{T} --op bind --mode target --tid $TID --initiator-address ALL",
    "the name alone, under another number": f"{T} --op delete --mode target --tid $TID && "
    f"{T} --op new --mode target --tid 77 --targetname $TARGET",
}


def test_half_targets_are_made_whole_by_the_next_publish(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.snode.guest
    oracle = Oracle("one")
    volume_id = cluster.create()
    path = cluster.attach(volume_id, cnode)
    writer = oracle.write(cnode.guest, f"{path}/records")
    oracle.wait_for(20)
    end(writer)
    cluster.leave(volume_id, cnode)
    guest.sh(["truncate", "--size=96M", _OTHER])
    whole = tgtd.shown(cluster)
    [(target, tid)] = tgtd.targets(cluster).items()
    names = f"TID={tid} TARGET={target} SCSI={scsi_id_of(volume_id)} VOLUME={volume_id}"
    variables = f"{names} INITIATOR={roles.initiator(cnode.guest)}"
    for what, commands in HALF.items():
        with tgtd.stopped_driver(cluster.snode):
            guest.sh(f"{variables}; {commands}")
            assert tgtd.shown(cluster) != whole
        cluster.publish(volume_id, cnode)
        assert tgtd.shown(cluster) == whole, what
    path = cluster.attach(volume_id, cnode)
    oracle.judge(cnode.guest, f"{path}/records")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


def test_a_lun_that_was_exchanged_under_a_session_is_not_used(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.snode.guest
    raw = capability(block=True)
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode, how=raw)
    cluster.stage(volume_id, cnode, context, how=raw)
    path = cluster.mount(volume_id, cnode, how=raw)
    wwid = f"naa.{scsi_id_of(volume_id)}"
    assert cnode.guest.sh("cat /sys/block/sd*/device/wwid") == wwid
    guest.sh(f"truncate --size=96M {_OTHER} && printf %s other | dd of={_OTHER} conv=notrunc status=none")
    [tid] = tgtd.targets(cluster).values()
    with tgtd.stopped_driver(cluster.snode):
        guest.sh(f"TID={tid}; {_EXCHANGE}")
        # The kernel has noticed nothing, and reads another's data.
        assert cnode.guest.sh("cat /sys/block/sd*/device/wwid") == wwid
        assert cnode.guest.sh(f"dd if={path} iflag=direct bs=4k count=1 status=none | head -c 5") == "other"
        uses = [
            partial(cluster.stage, volume_id, cnode, context, how=raw),
            partial(cluster.expand_node, volume_id, cnode, 0),
        ]
        for use in uses:
            error = refused(use)
            assert error is not None, "the other device is used"
            assert error.code().name == "DATA_LOSS", error
            assert "is another disk" in str(error.details())
    cluster.leave(volume_id, cnode)
    path = cluster.attach(volume_id, cnode, how=raw)
    assert cnode.guest.sh(f"dd if={path} iflag=direct bs=4k count=1 status=none | tr -d '\\0'") == ""
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


def test_a_node_is_fenced_while_it_writes_with_all_its_might(cluster: Cluster, say: Say) -> None:
    first, second = cluster.cnodes
    volume_id = cluster.create()
    path = cluster.attach(volume_id, first, how=SHARED_RAW)
    other = cluster.attach(volume_id, second, how=SHARED_RAW)
    oracle = Oracle("one")
    oracle.write(second.guest, other)
    # Beyond the oracle's records. It shall give up soon once it is fenced, so that the test can end.
    first.guest.sh("echo 3 > $(echo /sys/class/iscsi_session/*/recovery_tmo)")
    load = [
        first.guest.spawn(
            f"while dd if=/dev/urandom of={path} bs=64k seek={64 * number} count=48 oflag=direct; do :; done",
            name=f"load-{number}",
        )
        for number in range(1, 13)
    ]
    busy = "awk '{ exit !($9 >= 4 && $5 > 200) }' /sys/block/sd*/stat"  # in flight now, and written so far
    roles.until(first.guest, busy, "the load")
    oracle.wait_for(20)
    began = time.monotonic()
    cluster.unpublish(volume_id, first)
    took = time.monotonic() - began
    assert len(tgtd.targets(cluster)) == 1
    before = cluster.snode.guest.sh(f"dd if=/dev/vg0/{volume_id} bs=1M skip=4 iflag=direct status=none | sha256sum")
    for command in load:
        command.wait(60)  # given up, so it was tried again until then
    assert tgtd.initiators(cluster) == [roles.initiator(second.guest)]
    after = cluster.snode.guest.sh(f"dd if=/dev/vg0/{volume_id} bs=1M skip=4 iflag=direct status=none | sha256sum")
    assert after == before, "a write of the fenced node came through"
    say(f"fenced under load in {1000 * took:.0f} ms, then no write and no session of it in {seconds(began)}")
    oracle.wait_for_more()
    oracle.judge(second.guest, other)
    second.guest.sh("pkill -9 -f writer.py")
    for cnode in cluster.cnodes:
        cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)
