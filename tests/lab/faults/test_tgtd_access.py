"""Who gets in: the node that a volume is published to, with its secret, for as long as it is published; nobody else."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from csi.model import scsi_id_of, volume_id_of
from tests.lab import roles
from tests.lab.cluster import Cluster, Machine, capability
from tests.lab.conftest import Say
from tests.lab.faults import tgtd
from tests.lab.faults.login import GRANTED, Login
from tests.lab.kernel import PROJECT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

RAW = capability(block=True)
_RECORDS = "/var/lib/snode/publications"
_LOGIN = Path(__file__).with_name("login.py")
#: iscsiadm's exit codes.
_REFUSED, _CHAP_FAILED = 19, 24


def record_of(cluster: Cluster) -> Mapping[str, Any]:
    """The record of the one publication that there is."""
    fields = json.loads(cluster.snode.guest.sh(f"cat {_RECORDS}/*.json"))
    assert isinstance(fields, dict)
    return fields


def proven_login(cluster: Cluster, record: Mapping[str, Any]) -> Login:
    """A login of the node that a publication is for, with all its secrets; one step is left to do."""
    [target] = tgtd.targets(cluster)
    connection = cluster.lab.connect(cluster.snode.guest.ip, roles.PORT)
    login = Login(connection, initiator=record["node_id"].split(";")[3], target=target)
    assert login.begin() == GRANTED
    assert login.prove(record["chap"]["user"], record["chap"]["secret"]) == GRANTED
    return login


def test_a_login_begun_before_the_fence_gets_nothing_after_it(cluster: Cluster) -> None:
    first, second = cluster.cnodes
    one, two = cluster.create("one"), cluster.create("two")
    cluster.publish(one, first, how=RAW)
    record = record_of(cluster)
    right = proven_login(cluster, record)
    assert right.finish() == GRANTED, "the way to a session is not the one that the test takes"
    assert tgtd.initiators(cluster) == [roles.initiator(first.guest)]
    right.close()
    late, later, last = (proven_login(cluster, record) for _ in range(3))
    cluster.unpublish(one, first)
    assert late.finish() != GRANTED
    # Nor when another target has taken its place: of another volume, of another node; or of the same ones.
    for volume_id, cnode, login in ((two, second, later), (one, first, last)):
        cluster.publish(volume_id, cnode, how=RAW)
        assert login.finish() != GRANTED
        assert tgtd.initiators(cluster) == []
        cluster.unpublish(volume_id, cnode)
    for login in (late, later, last):
        login.close()
    for volume_id in (one, two):
        cluster.delete(volume_id)


def test_neither_another_node_nor_one_without_the_secret_gets_in(cluster: Cluster) -> None:
    first, second = cluster.cnodes
    volume_id = cluster.create()
    context = cluster.publish(volume_id, first, how=RAW)
    cluster.stage(volume_id, first, context, how=RAW)
    [target] = tgtd.targets(cluster)
    folder = first.guest.sh(f"ls -d /etc/iscsi/nodes/{target}/* 2>/dev/null || ls -d /var/lib/iscsi/nodes/{target}/*")
    record = first.guest.read(f"{folder}/default") if first.guest.run(["test", "-d", folder])[0] == 0 else ""
    assert "node.session.auth.password = " in record

    def log_in(cnode: Machine, text: str) -> int:
        cnode.guest.write(f"{folder}/default", text, mode=0o600)
        return cnode.guest.run(["iscsiadm", "-m", "node", "-T", target, "--login"])[0]

    # With the secret, but another name; then with the name, but without the secret.
    assert log_in(second, record) == _REFUSED
    first.guest.sh(["iscsiadm", "-m", "node", "-T", target, "--logout"])
    nothing = "".join(line for line in record.splitlines(keepends=True) if ".auth." not in line)
    assert log_in(first, nothing) == _CHAP_FAILED
    assert tgtd.initiators(cluster) == []
    assert log_in(first, record) == 0
    second.guest.sh(["iscsiadm", "-m", "node", "-T", target, "--op=delete"])
    cluster.detach(volume_id, first)
    cluster.delete(volume_id)


@pytest.mark.soak
def test_no_login_without_chap_while_volumes_come_and_go(cluster: Cluster, say: Say) -> None:
    cnode, guest = cluster.cnodes[0], cluster.snode.guest
    volume_id = cluster.create()
    knocks = guest.spawn(["/usr/bin/python3", str(_LOGIN), "knock", guest.ip, str(roles.PORT), _RECORDS], name="knock")
    knocks.wait_for("tries")
    rounds = 40
    for _ in range(rounds):
        cluster.publish(volume_id, cnode, how=RAW)
        cluster.unpublish(volume_id, cnode)
    knocks.signal(9)
    knocks.wait(10)
    tries = int([line for line in knocks.lines if line.startswith("tries")][-1].split()[1])
    granted = [line for line in knocks.lines if line.startswith("granted")]
    say(f"{rounds} times published and unpublished, {tries} logins without CHAP, {len(granted)} granted")
    assert granted == []
    assert tries > rounds
    cluster.delete(volume_id)


_EXPORT = """
import sys
from pathlib import Path
from csi.deadline import Deadline
from csi.exports.tgt import TgtExport
from csi.model import AccessMode, Capability, Chap, NodeId, Publication
from csi.run import SubprocessRunner

number, volume_id, initiator, portal = sys.argv[1:]
publication = Publication(
    volume_id=volume_id, pool="p", node_id=str(NodeId("c1", "k" * 43, initiator)), protocol="iscsi", nonce="0" * 16,
    tid=1, device=Path("/tmp/disk"), size_bytes=64 << 20, readonly=False,
    capability=Capability(AccessMode.SINGLE_NODE_WRITER),
    chap=Chap("n0123456789abcdef", "a-secret-of-node", "t0123456789abcdef", "a-secret-of-target"),
)
export = TgtExport(Path(f"/var/run/tgtd/socket.{number}"), portals=[portal], runner=SubprocessRunner())
export.ensure(publication, Deadline.after(20))
print(publication.target)
"""


@contextmanager
def two_snodes(cluster: Cluster, volume_ids: list[str]) -> Iterator[list[tuple[str, str]]]:
    """Two more tgtd, that know nothing of each other, with a volume each as target number 1: targets and portals."""
    snode, cnode = cluster.snode.guest, cluster.cnodes[0]
    daemons, paths = [], []
    snode.sh(["truncate", "--size=64M", "/tmp/disk"])
    for number, volume_id in enumerate(volume_ids, start=1):
        portal = f"{snode.ip}:{roles.PORT + number}"
        argv = ["tgtd", "-f", "-C", str(number), "--iscsi", f"portal={portal}"]
        daemons.append(snode.spawn(argv, name=f"tgtd-{number}"))
        roles.until(snode, f"tgtadm -C {number} --op show --mode sys >/dev/null 2>&1", "tgtd")
        python = ["env", "-C", str(PROJECT), f"{PROJECT}/.venv/bin/python", "-"]
        initiator = roles.initiator(cnode.guest)
        paths.append((snode.sh([*python, str(number), volume_id, initiator, portal], stdin=_EXPORT), portal))
        assert "Target 1:" in snode.sh(f"tgtadm -C {number} --lld iscsi --op show --mode target")
    try:
        yield paths
    finally:
        for daemon in daemons:
            daemon.signal(9)
            daemon.wait(10)


def test_volumes_of_two_snodes_are_never_one_disk(cluster: Cluster) -> None:
    cnode = cluster.cnodes[0]
    volume_ids = [volume_id_of("one"), volume_id_of("two")]
    with two_snodes(cluster, volume_ids) as paths, tgtd.stopped_driver(cnode):
        for target, portal in paths:
            record = f"iscsiadm -m node -T {target} -p {portal}"
            settings = {
                "node.session.auth.authmethod": "CHAP",
                "node.session.auth.username": "n0123456789abcdef",
                "node.session.auth.password": "a-secret-of-node",
            }
            updates = [f"{record} -o update -n {name} -v {value}" for name, value in settings.items()]
            cnode.guest.sh(" && ".join([f"{record} -o new", *updates, f"{record} --login"]))
        roles.until(cnode.guest, "test $(ls /sys/block | grep -c ^sd) = 2", "the disks")
        wwids = cnode.guest.sh("cat /sys/block/sd*/device/wwid").split()
        assert sorted(wwids) == sorted(f"naa.{scsi_id_of(volume_id)}" for volume_id in volume_ids)
        look = "for d in /dev/sd?; do udevadm info -q property -n $d | sed -n 's/^ID_SERIAL=//p'; done"
        # udev hears of a disk a moment after it is there, so that its queue may be empty before.
        roles.until(cnode.guest, f"test $({look} | wc -l) = 2", "udev's names for the disks")
        assert sorted(cnode.guest.sh(look).split()) == sorted(f"3{wwid.removeprefix('naa.')}" for wwid in wwids)
        cnode.guest.sh("iscsiadm -m node --logoutall=all && iscsiadm -m node -o delete")
