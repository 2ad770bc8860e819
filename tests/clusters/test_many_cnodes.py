"""A cloud on one SNODE: 20 CNODEs at once, each with a volume of its own, and none near another one's.

Some are guests with the driver's node service and the kernel's initiator. The others are sessions of the library
libiscsi: each has an initiator name, a node key and CHAP secrets of its own, and opens its publish_context with the
code of the node service.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from csi import publish_context
from csi.errors import Invalid
from csi.model import Chap, IscsiPath, NodeId
from csi.records import RecordStore
from csi.sealing import NodeKey
from tests.lab import Lab
from tests.lab.cluster import MIB, Cluster
from tests.lab.conftest import Say, seconds
from tests.lab.libiscsi import SECTOR, IscsiError, find_targets

from .cnodes import Client, Guest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

GUESTS, CLIENTS = 4, 16
# What a target answers to a name that is not on its list, and to a wrong secret.
_NO_TARGET, _NO_CHAP = "Target not found", "Authentication failure"
# tgtd closes the connection without a word when it has no target at all.
_GONE = f"{_NO_TARGET}|reconnect"
T = TypeVar("T")
A = TypeVar("A")


@dataclass
class Cloud:
    """All of it."""

    cluster: Cluster
    guests: list[Guest]
    clients: list[Client]

    @property
    def cnodes(self) -> list[Guest | Client]:
        return [*self.guests, *self.clients]

    def on_disk(self, volume_id: str) -> str:
        """The checksum of a volume as the SNODE reads it."""
        return self.cluster.snode.guest.sh(f"sha256sum < /dev/vg0/{volume_id}").split()[0]


@pytest.fixture
def cloud(lab: Lab, tmp_path: Path) -> Iterator[Cloud]:
    cluster = Cluster(lab, cnodes=GUESTS, log_level="info")
    clients = [
        Client(name, NodeKey.load(RecordStore(tmp_path / name)), lab.network, cluster)
        for name in (f"client{n + 1:02}" for n in range(CLIENTS))
    ]
    yield Cloud(cluster, [Guest(machine, cluster) for machine in cluster.cnodes], clients)
    for client in clients:
        if client.session:
            client.session.close()


def at_once(act: Callable[[A], T], things: Sequence[A]) -> list[T]:
    """Results of `act` for each, called side by side; the first error is raised after all have ended."""
    with ThreadPoolExecutor(len(things)) as pool:
        return [job.result() for job in [pool.submit(act, thing) for thing in things]]


def test_twenty_cnodes_at_once(cloud: Cloud, say: Say) -> None:
    cnodes = cloud.cnodes

    def step(what: str, act: Callable[[Guest | Client], int | None]) -> None:
        began = time.monotonic()
        moved = sum(done or 0 for done in at_once(act, cnodes))
        took = time.monotonic() - began
        rate = f", {moved / MIB:.0f} MiB, {moved / MIB / took:.0f} MiB/s" if moved else f", {len(cnodes) / took:.1f}/s"
        say(f"{len(cnodes)} CNODEs at once: {what} {took:.2f} s{rate}")

    def create(cnode: Guest | Client) -> None:
        cnode.volume_id = cloud.cluster.create(f"cloud-{cnode.name}", size_bytes=cnode.size_bytes)

    step("create", create)
    step("publish", lambda cnode: cnode.publish())
    assert len({target_of(cnode).target for cnode in cnodes}) == len(cnodes)
    step("log in, check the identity; guests: format and mount", lambda cnode: cnode.attach())
    look = "tgtadm --lld iscsi --op show --mode target | grep -c 'I_T nexus:'"
    assert cloud.cluster.snode.guest.sh(look) == str(len(cnodes)), "all are connected in the same moment"
    step("write", lambda cnode: cnode.write())
    step("read back and compare", lambda cnode: cnode.verify())
    check_no_cross_talk(cloud, say)
    step("compare again", lambda cnode: cnode.verify())
    check_disks(cloud)
    step("unpublish; clients: while they write", lambda cnode: cnode.release())
    check_fenced(cloud)
    step("delete", lambda cnode: cloud.cluster.delete(cnode.volume_id))
    began = time.monotonic()
    while "trash" in cloud.cluster.snode.guest.sh("lvs --noheadings -o lv_name"):
        assert time.monotonic() - began < 200, "the wipe of the deleted volumes does not end"
        time.sleep(1)
    say(f"all wiped {seconds(began)} later")
    assert cloud.cluster.leftovers() == {}


def target_of(cnode: Guest | Client) -> IscsiPath:
    """Where a CNODE's volume is: no secret."""
    context = cnode.context

    def sealed(_text: str) -> Chap:
        return Chap(user="", secret="", mutual_user="", mutual_secret="")

    return publish_context.decode(cnode.volume_id, context, open_sealed=sealed).paths[0]


def check_no_cross_talk(cloud: Cloud, say: Say) -> None:
    """Nobody gets to another one's volume: not with its own name, nor under that of the other one."""
    began = time.monotonic()
    tries = sum(at_once(lambda client: intrude(client, cloud), cloud.clients))
    say(f"{tries} logins that must fail, all refused {seconds(began)}")


def intrude(client: Client, cloud: Cloud) -> int:
    """Tries all that this client can try; returns how many logins were refused."""
    others = [other for other in cloud.cnodes if other is not client]
    at = cloud.cnodes.index(client)
    peer = cloud.clients[(cloud.clients.index(client) + 1) % len(cloud.clients)]
    guest = cloud.guests[at % len(cloud.guests)]
    own, chap = client.path, client.chap
    tries: list[tuple[str, IscsiPath, str, Chap | None]] = [
        (_NO_TARGET, peer.path, client.initiator, chap),  # the other one's target
        (_NO_TARGET, peer.path, client.initiator, peer.chap),  # with its secrets
        (_NO_CHAP, peer.path, peer.initiator, chap),  # under its name
        (_NO_CHAP, peer.path, peer.initiator, None),
        (_NO_CHAP, target_of(guest), NodeId.parse(guest.node_id).initiator, chap),
        (_NO_TARGET, own, peer.initiator, chap),  # its own target under another name
        (_NO_CHAP, own, client.initiator, peer.chap),
        (_NO_CHAP, own, client.initiator, None),
        (_NO_CHAP, own, client.initiator, replace(chap, secret=peer.chap.secret)),
        # A target that does not know its part of the secret is not the SNODE.
        ("Invalid CHAP_R response from the target", own, client.initiator, replace(chap, mutual_secret="no" * 16)),
    ]
    for word, path, initiator, pair in tries:
        refuse(client, path, word, initiator=initiator, chap=pair)
    seen = client.network.inside(lambda: find_targets(own.portal, initiator=client.initiator))
    assert seen == [own.target], "a CNODE is told of its own target alone"
    for other in others:
        with pytest.raises(Invalid, match=r"publish_context\.sealed: not made for this node"):
            client.opened(other.volume_id, other.context, node_id=other.node_id)
    return len(tries)


def refuse(client: Client, path: IscsiPath, word: str, *, initiator: str = "", chap: Chap | None) -> None:
    """A login that must fail, and with this word."""
    with pytest.raises(IscsiError, match=word):
        client.log_in(path, initiator=initiator, chap=chap).close()


def check_disks(cloud: Cloud) -> None:
    """On the SNODE's disks stands what each client wrote, from end to end."""
    for client in cloud.clients:
        wanted = hashlib.sha256(client.pattern(0, client.size_bytes)).hexdigest()
        assert cloud.on_disk(client.volume_id) == wanted, f"{client.name}: its disk holds something else"


def check_fenced(cloud: Cloud) -> None:
    """What was unpublished is gone for good, with right name and secrets; nothing more arrives on the disks."""
    before = [cloud.on_disk(client.volume_id) for client in cloud.clients]
    at_once(lambda client: refuse(client, client.path, _GONE, chap=client.chap), cloud.clients)
    for client in cloud.clients:
        assert client.session
        with pytest.raises(IscsiError):
            client.session.write(0, bytes(SECTOR))
    assert [cloud.on_disk(client.volume_id) for client in cloud.clients] == before
