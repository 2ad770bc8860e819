"""The initiator's faults: parallel logins, damaged records, a reboot, one name twice, late and wrong disks."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from csi.model import scsi_id_of
from csi.pb import csi_pb2 as pb
from tests.lab import roles
from tests.lab.cluster import STAGING, Cluster, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.guest import Guest
from tests.lab.kernel import PROJECT
from tests.lab.oracle import Oracle

from . import initiator

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Code = grpc.StatusCode
_RAW = capability(block=True)


def test_parallel_stages_of_one_volume_make_one_session(cluster: Cluster, say: Say) -> None:
    cnode = cluster.cnodes[0]
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    began = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        outcomes = list(pool.map(lambda _: code_of(lambda: cluster.stage(volume_id, cnode, context)), range(20)))
    say(f"20 stages at once in {seconds(began)}: {outcomes.count('OK')} OK, {outcomes.count('ABORTED')} ABORTED")
    assert "OK" in outcomes
    assert set(outcomes) <= {"OK", "ABORTED"}
    assert initiator.sessions(cnode.guest) == [initiator.target_of(context)]
    assert len(initiator.disks(cnode.guest)) == 1
    assert len(cnode.guest.sh(f"grep -F {STAGING}/{volume_id} /proc/self/mountinfo").splitlines()) == 1
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


# -- node records ----------------------------------------------------------------------------------------------------

_DAMAGES = {
    "empty": ": > {record}",
    "cut off": "printf '# BEGIN RECORD 2.1.8\\nnode.name = {target}\\nnode.tp' > {record}",
    "without its file": "rmdir {folder} 2>/dev/null; mkdir -p {folder}",
    "of the old form beside it": "rm -r {folder}; : > {old}",
}


def test_a_damaged_node_record_is_made_anew(cluster: Cluster) -> None:
    cnode = cluster.cnodes[0]
    guest = cnode.guest
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    target = initiator.target_of(context)
    address, _, port = roles.portal(cluster.snode.guest).partition(":")
    folder = f"/etc/iscsi/nodes/{target}/{address},{port},1"
    names = {"target": target, "folder": folder, "record": f"{folder}/default", "old": folder.removesuffix(",1")}
    for damage, line in _DAMAGES.items():
        guest.sh(f"mkdir -p {folder}; " + line.format(**names))
        cluster.stage(volume_id, cnode, context)
        assert initiator.sessions(guest) == [target], damage
        # Damaged while the session stands: there is no more in it that the way out would need.
        guest.sh(f": > {folder}/default")
        cluster.leave(volume_id, cnode)
        assert (initiator.sessions(guest), initiator.records(guest)) == ([], []), damage
    cluster.unpublish(volume_id, cnode)
    cluster.delete(volume_id)


def test_a_power_cut_leaves_no_login_and_no_record_behind(cluster: Cluster) -> None:
    """Of two staged volumes; the record of the second is an empty file then, since iscsiadm does not sync it."""
    cnode = cluster.cnodes[0]
    guest = cnode.guest
    contexts = {}
    for name in ("one", "two"):
        volume_id = cluster.create(name)
        contexts[volume_id] = cluster.publish(volume_id, cnode)
        cluster.stage(volume_id, cnode, contexts[volume_id])
    one, two = contexts
    records = initiator.records(guest)
    settings = [line for line in guest.read(record_of(records, one)).splitlines() if ".startup" in line]
    guest.sh(f": > {record_of(records, two)}; sync")
    guest.kill9()
    guest.boot()
    cnode.daemon = roles.start_cnode(guest)
    assert initiator.records(guest) == records, "the records did not outlive the power cut, so this shows nothing"
    # What the machine's own open-iscsi service does at boot.
    guest.run(["iscsiadm", "--mode=node", "--loginall=automatic"])
    assert initiator.sessions(guest) == []
    assert settings == ["node.startup = manual", "node.conn[0].startup = manual"]
    cluster.start_driver(cnode)
    initiator.until_nothing_is_left(guest)
    cluster.stage(two, cnode, contexts[two])
    assert initiator.sessions(guest) == [initiator.target_of(contexts[two])]
    for volume_id in (one, two):
        cluster.detach(volume_id, cnode)
        cluster.delete(volume_id)


def record_of(records: Sequence[str], volume_id: str) -> str:
    """The one record of a volume."""
    (found,) = [record for record in records if volume_id in record]
    return found


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_two_machines_with_one_initiator_name_are_refused(cluster: Cluster) -> None:
    first, clone = cluster.cnodes
    one, two = cluster.create("one"), cluster.create("two")
    oracle = Oracle("one")
    path = cluster.attach(one, first)
    writer = oracle.write(first.guest, f"{path}/records")
    oracle.wait_for(20)
    own_name, own_id = roles.initiator(clone.guest), clone.node_id
    try:
        rename(clone.guest, roles.initiator(first.guest))
        clone.node_id = clone.stubs["node"].NodeGetInfo(pb.NodeGetInfoRequest(), timeout=30).node_id
        assert clone.node_id != own_id
        error = refused(lambda: cluster.publish(two, clone))
        assert error is not None
        assert error.code() is Code.FAILED_PRECONDITION
        for word in ("node cnode2", "node cnode1", roles.initiator(first.guest), "iscsi-iname"):
            assert word in str(error.details())
    finally:
        rename(clone.guest, own_name)
        clone.node_id = own_id
    cluster.attach(two, clone)
    assert initiator.states(first.guest) == initiator.states(clone.guest) == ["LOGGED_IN"]
    oracle.wait_for_more()
    oracle.judge(first.guest, f"{path}/records")
    writer.signal(signal.SIGKILL)
    writer.wait(30)
    for volume_id, cnode in ((one, first), (two, clone)):
        cluster.detach(volume_id, cnode)
        cluster.delete(volume_id)


def rename(guest: Guest, name: str) -> None:
    """Give a machine another initiator name, as its administrator would."""
    guest.write("/etc/iscsi/initiatorname.iscsi", f"InitiatorName={name}\n", mode=0o600)


# -- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def silent_controller(cluster: Cluster) -> Iterator[None]:
    """The controller is down meanwhile, so that it does not mend what the test does to a target."""
    assert cluster.snode.driver is not None
    cluster.snode.driver.kill9()
    try:
        yield
    finally:
        cluster.start_driver(cluster.snode)


@pytest.mark.soak
def test_a_disk_that_comes_late_or_never(cluster: Cluster, say: Say) -> None:
    cnode = cluster.cnodes[0]
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    tgt = Tgtadm(cluster.snode.guest, initiator.target_of(context))
    with silent_controller(cluster), ThreadPoolExecutor(1) as pool:
        tgt.remove_lun()
        began = time.monotonic()
        error = refused(lambda: cluster.stage(volume_id, cnode, context, timeout=8))
        say(f"no disk: refused after {seconds(began)} of 8 s")
        assert error is not None
        assert error.code() is Code.UNAVAILABLE
        for word in (volume_id, "LUN 1 shows no disk", "snode doctor on the SNODE"):
            assert word in str(error.details())
        assert (initiator.sessions(cnode.guest), initiator.records(cnode.guest)) == ([], [])
        began = time.monotonic()
        stage = pool.submit(lambda: cluster.stage(volume_id, cnode, context, timeout=30))
        host = cnode.guest.sh("until ls /sys/class/iscsi_host 2>/dev/null | grep .; do sleep .05; done")
        assert cnode.driver is not None
        cnode.driver.process.wait_for(f"/{host}/scan")  # its log: the first look, in vain
        cnode.driver.process.signal(signal.SIGSTOP)  # it shall not see the disk before it has its identity
        tgt.add_lun(f"/dev/vg0/{volume_id}", volume_id)
        cnode.driver.process.signal(signal.SIGCONT)
        came = time.monotonic()
        stage.result()
        say(f"the disk came {came - began:.1f} s after the beginning: staged {seconds(came)} later")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


def test_another_disk_than_the_volume_is_refused(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    volume_id, other = cluster.create("one"), cluster.create("other")
    path = cluster.attach(other, cnode)
    guest.sh(f"echo precious > {path}/file")
    cluster.detach(other, cnode)
    context = cluster.publish(volume_id, cnode)
    tgt = Tgtadm(cluster.snode.guest, initiator.target_of(context))
    with silent_controller(cluster):
        tgt.remove_lun()
        tgt.add_lun(f"/dev/vg0/{other}", other)
        error = refused(lambda: cluster.stage(volume_id, cnode, context))
        assert error is not None
        assert error.code() is Code.DATA_LOSS
        for word in (volume_id, scsi_id_of(other), "nothing was changed", "publish again"):
            assert word in str(error.details())
        assert (initiator.sessions(guest), initiator.records(guest), initiator.disks(guest)) == ([], [], [])
    path = cluster.attach(other, cnode)
    assert guest.read(f"{path}/file") == "precious\n"
    cluster.detach(other, cnode)
    cluster.unpublish(volume_id, cnode)
    for gone in (volume_id, other):
        cluster.delete(gone)


@pytest.mark.soak
def test_crossed_links_to_disks_lead_nobody_astray(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    targets, disks = {}, {}
    for name in ("one", "two"):
        volume_id = cluster.create(name)
        context = cluster.publish(volume_id, cnode, how=_RAW)
        cluster.stage(volume_id, cnode, context, how=_RAW)
        targets[volume_id] = initiator.target_of(context)
        disks[volume_id] = initiator.disk_of(guest, targets[volume_id])
        guest.sh(f"printf {volume_id} | dd of=/dev/{disks[volume_id]} conv=fsync status=none")
    one, two = disks
    guest.sh("udevadm settle; mkdir -p /dev/disk/by-path /dev/disk/by-id")
    for volume_id, other in ((one, two), (two, one)):
        link = f"ip-{roles.portal(cluster.snode.guest)}-iscsi-{targets[volume_id]}-lun-1"
        guest.sh(f"ln -sfn /dev/{disks[other]} /dev/disk/by-path/{link}")
        guest.sh(f"ln -sfn /dev/{disks[other]} /dev/disk/by-id/scsi-3{scsi_id_of(volume_id)}")
    for volume_id in disks:
        path = cluster.mount(volume_id, cnode, how=_RAW)
        assert guest.sh(f"head -c {len(volume_id)} {path}") == volume_id
    for volume_id in disks:
        cluster.detach(volume_id, cnode)
        cluster.delete(volume_id)


@pytest.mark.soak
def test_a_portal_may_be_an_ipv6_address_but_no_name(cluster: Cluster) -> None:
    snode, cnode = cluster.snode, cluster.cnodes[0]
    config = snode.config
    quoted = f'"{roles.portal(snode.guest)}"'
    assert config.count(quoted) == 1
    snode.guest.write("/run/by-name.toml", config.replace(quoted, '"snode.lab:3260"'))
    python = f"cd {PROJECT} && .venv/bin/python -m csi controller"
    code, out = snode.guest.run(f"{python} --config /run/by-name.toml --endpoint unix:///run/by-name.sock")
    assert code != 0
    assert "'snode.lab:3260' is not ADDRESS:PORT, such as 192.0.2.10:3260" in out
    for guest, address in ((snode.guest, "fd00::1"), (cnode.guest, "fd00::2")):
        guest.sh(f"ip addr replace {address}/64 dev vec0 nodad")
    snode.guest.sh("tgtadm --lld iscsi --op new --mode portal --param 'portal=[fd00::1]:3260'")
    assert snode.driver is not None
    snode.driver.stop()
    snode.config = config.replace(quoted, '"[fd00::1]:3260"')
    try:
        cluster.start_driver(snode)
        volume_id = cluster.create()
        path = cluster.attach(volume_id, cnode)
        assert cnode.guest.sh("cat /sys/class/iscsi_connection/*/persistent_address") == "fd00::1"
        cnode.guest.sh(f"echo six > {path}/file && sync")
        cluster.detach(volume_id, cnode)
        cluster.delete(volume_id)
    finally:
        snode.config = config
        snode.driver.kill9()
        snode.guest.sh("tgtadm --lld iscsi --op delete --mode portal --param 'portal=[fd00::1]:3260'")


class Tgtadm:
    """What somebody does by hand to the LUN of a target."""

    def __init__(self, snode: Guest, target: str) -> None:
        self._snode = snode
        shown = snode.sh("tgtadm --lld iscsi --op show --mode target | grep '^Target '")
        self._tid = next(line.split()[1].strip(":") for line in shown.splitlines() if line.endswith(target))

    def remove_lun(self) -> None:
        """Take LUN 1 away."""
        self._run("--op delete")

    def add_lun(self, path: str, volume_id: str) -> None:
        """Offer a device with the identity of a volume."""
        self._run(f"--op new --backing-store {path}")
        self._run(f"--op update --params scsi_id={scsi_id_of(volume_id)},scsi_sn={volume_id}")

    def _run(self, arguments: str) -> None:
        self._snode.sh(f"tgtadm --lld iscsi --mode logicalunit --tid {self._tid} --lun 1 {arguments}")


def code_of(call: Callable[[], object]) -> str:
    """OK, or the name of the status that a call ends with."""
    error = refused(call)
    return "OK" if error is None else str(error.code().name)
