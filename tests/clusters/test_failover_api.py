"""`snode failover` against a real API server. What kubelets, SNODEs and clocks do is played, so it can be anything.

On real machines: tests/clusters/test_failover.py.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration

from csi.deadline import Deadline
from csi.errors import DriverError, Unavailable
from csi.failover.board import LEADER, LEADER_SECONDS
from csi.failover.controller import Failover
from csi.failover.nodes import MARK
from csi.failover.rules import Rules, Silence, View
from csi.kube import OUT_OF_SERVICE, Kube
from csi.kube_objects import Lease
from csi.model import NodeId, Publication
from tests.clusters.api_server import ApiServer, api_server
from tests.unit.exports.conftest import Make
from tests.unit.exports.conftest import folder as folder
from tests.unit.exports.conftest import make as make

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
]

_NUMBERS = itertools.count()
DRIVER, OTHER = "csi.snode.io", "other.snode.io"
RULES = Rules()


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with api_server() as made:
        yield made


@dataclass
class Snode:
    """A SNODE: what it sees and what it fenced."""

    name: str
    driver: str
    exported: list[Publication] = field(default_factory=list)
    silent: dict[str, float] = field(default_factory=dict)
    stuck: bool = False
    blind: bool = False

    def look(self, _deadline: Deadline) -> View:
        if self.blind:
            raise Unavailable("tgtd does not answer")
        nodes = {one.node.name for one in self.exported}
        return View(
            self.name,
            self.driver,
            {
                node: Silence(
                    self.silent.get(node, 0.0),
                    frozenset(one.volume_id for one in self.exported if one.node.name == node),
                    True,
                )
                for node in nodes
            },
        )

    def publications(self) -> list[Publication]:
        return list(self.exported)

    def fence(self, publication: Publication) -> None:
        if self.stuck:
            raise Unavailable("commands of the node are in flight on a slow disk")
        self.exported.remove(publication)


class World:
    """A cluster of nodes `a` to `d`, and SNODEs that are nodes too; time passes as told."""

    def __init__(self, server: ApiServer, make: Make, *, snodes: int = 1) -> None:
        self._make = make
        self.now = 1000.0
        self.errors: list[str] = []
        settings = Configuration()
        settings.host, settings.verify_ssl, settings.retries = server.url, False, 0
        settings.api_key = {"authorization": server.token}
        settings.api_key_prefix = {"authorization": "Bearer"}
        self.api = ApiClient(settings)
        self.server = server
        self.kube = Kube(self.api, namespace="default")
        self.snodes = [Snode(f"s{number}", DRIVER if number == 0 else OTHER) for number in range(snodes)]
        self.parts = [self.part(snode) for snode in self.snodes]
        self.alive = {"a", "b", "c", "d", *(snode.name for snode in self.snodes)}
        for name in sorted(self.alive):
            self.ask("POST", "/api/v1/nodes", {"metadata": {"name": name}})
            self.ready(name, True)
        self._beat = 0
        accounts = "/api/v1/namespaces/default/serviceaccounts"
        if not self.ask("GET", accounts)["items"]:
            self.ask("POST", accounts, {"metadata": {"name": "default"}})

    def part(self, snode: Snode, *, act: bool = True) -> Failover:
        return Failover(
            self.kube,
            snode,
            snode.fence,
            name=snode.name,
            rules=RULES,
            act=act,
            clock=lambda: self.now,
        )

    def ask(self, method: str, path: str, body: Any = None, *, content: str = "application/json") -> Any:
        return self.kube._ask(method, path, body=body, content=content)

    def ready(self, name: str, ready: bool, *, in_use: tuple[str, ...] = ()) -> None:
        """What kubelet reports of itself."""
        status = {
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "volumesInUse": [f"kubernetes.io/csi/{DRIVER}^{volume}" for volume in in_use],
        }
        self.ask("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, content="application/merge-patch+json")

    def use(self, snode: Snode, node: str, claim: str, *, driver: str = "") -> str:
        """A pod with a volume on a node, as it stands in the API and at the SNODE; returns the volume's id."""
        publication = self._make(node=NodeId(name=node, initiator=f"iqn.2026-11.io.test:{node}"))
        snode.exported.append(publication)
        source = {"driver": driver or snode.driver, "volumeHandle": publication.volume_id}
        name = f"pv-{next(_NUMBERS)}"  # a deleted one stays for as long as its finalizer does
        self.ask("POST", "/api/v1/persistentvolumes", {
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "csi": source,
                "claimRef": {"namespace": "default", "name": claim},
            },
        })  # fmt: skip
        self.ask("POST", "/apis/storage.k8s.io/v1/volumeattachments", {
            "metadata": {"name": f"va-{claim}"},
            "spec": {
                "attacher": source["driver"], "nodeName": node, "source": {"persistentVolumeName": name},
            },
        })  # fmt: skip
        self.ask("PATCH", f"/apis/storage.k8s.io/v1/volumeattachments/va-{claim}/status",
                 {"status": {"attached": True}}, content="application/merge-patch+json")  # fmt: skip
        self.ask("POST", "/api/v1/namespaces/default/pods", {
            "metadata": {"name": f"pod-{claim}"},
            "spec": {
                "nodeName": node, "containers": [{"name": "main", "image": "localhost/none:1"}],
                "terminationGracePeriodSeconds": 30, "automountServiceAccountToken": False,
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}],
            },
        })  # fmt: skip
        self.ask("PATCH", f"/api/v1/namespaces/default/pods/pod-{claim}/status", {"status": {"containerStatuses": [{
            "name": "main", "ready": True, "restartCount": 0, "image": "", "imageID": "",
            "state": {"running": {}},
        }]}}, content="application/merge-patch+json")  # fmt: skip
        return publication.volume_id

    def detach(self, claim: str) -> None:
        """What the controller manager does."""
        self.ask("DELETE", f"/apis/storage.k8s.io/v1/volumeattachments/va-{claim}")

    def pass_(self, seconds: float, *, rounds: bool = True) -> None:
        """Time passes: kubelets that live renew, SNODEs look."""
        end = self.now + seconds
        while self.now < end:
            self.now += 2.0
            self._beat += 1
            for node in self.alive:
                self._renew(node)
            for snode in self.snodes:
                for node in snode.silent:
                    snode.silent[node] += 2.0
            if rounds:
                self.rounds()

    def rounds(self) -> None:
        for part in self.parts:
            try:
                part.round(Deadline.after(10))
            except DriverError as error:
                self.errors.append(str(error))

    def lose(self, *nodes: str) -> None:
        """Power cut."""
        for node in nodes:
            self.alive.discard(node)
            for snode in self.snodes:
                snode.silent[node] = 0.0

    def _renew(self, node: str) -> None:
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        spec = {"holderIdentity": node, "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
        body = {"metadata": {"name": node}, "spec": spec}
        if self._beat > 1 and node in self.kube.node_leases():
            self.ask("PATCH", f"{path}/{node}", body, content="application/merge-patch+json")
        else:
            self.ask("POST", path, body)

    def leaders(self) -> list[str]:
        return [part.name for part in self.parts if part.leading]

    # -- what is there -------------------------------------------------------------------------------------------

    def taints(self, node: str) -> set[str]:
        return {taint.key for taint in self.kube.node(node).taints if taint.key in (OUT_OF_SERVICE, "x/y")}

    def pods(self) -> set[str]:
        return {item["metadata"]["name"] for item in self.ask("GET", "/api/v1/namespaces/default/pods")["items"]}

    def events(self, node: str) -> list[str]:
        items = self.ask("GET", "/api/v1/namespaces/default/events")["items"]
        return [item["reason"] for item in items if item["involvedObject"]["name"] == node]

    def clear(self) -> None:
        for path in ("/api/v1/nodes", "/api/v1/persistentvolumes", "/apis/storage.k8s.io/v1/volumeattachments"):
            self.ask("DELETE", path)
        for namespace in ("default", "kube-node-lease"):
            self.ask("DELETE", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases")
        self.ask("DELETE", "/api/v1/namespaces/default/events")
        for name in self.pods():
            self.ask("DELETE", f"/api/v1/namespaces/default/pods/{name}", {"gracePeriodSeconds": 0})
        self.kube.close()


@contextmanager
def world_of(server: ApiServer, make: Make, *, snodes: int = 1) -> Iterator[World]:
    made = World(server, make, snodes=snodes)
    try:
        yield made
    finally:
        made.clear()


@pytest.fixture
def world(server: ApiServer, make: Make) -> Iterator[World]:
    with world_of(server, make) as made:
        yield made


def test_a_lost_node_is_given_up_and_comes_back(world: World) -> None:
    (snode,) = world.snodes
    world.use(snode, "a", "one")
    world.use(snode, "b", "two")
    world.ask("PATCH", "/api/v1/nodes/a", {"spec": {"taints": [{"key": "x/y", "effect": "NoSchedule"}]}},
              content="application/merge-patch+json")  # fmt: skip
    world.pass_(40)
    assert world.events("a") == [] and world.pods() == {"pod-one", "pod-two"}
    world.lose("a")
    world.pass_(24)
    assert world.taints("a") == {"x/y"}, "not before its time"
    world.pass_(6)
    assert world.taints("a") == {"x/y", OUT_OF_SERVICE}
    assert [one.node.name for one in snode.exported] == ["b"], "fenced before"
    assert world.pods() == {"pod-two"}, "its successor needs its name"
    node = world.kube.node("a")
    assert node.labels[MARK] == "given-up"
    assert json.loads(node.annotations[MARK])["claims"] == ["default/one"]
    assert world.events("a") == ["FailoverBegins", "FailoverMarked"]
    world.detach("one")
    world.pass_(100)
    assert world.events("a") == ["FailoverBegins", "FailoverMarked", "FailoverDone"], "and nothing is said twice"
    # Back, with the volume still mounted; then clean.
    world.ready("a", True, in_use=("v-1",))
    world.alive.add("a")
    world.pass_(20)
    assert OUT_OF_SERVICE in world.taints("a") and world.events("a")[-1] == "FailoverWaiting"
    world.ready("a", True)
    world.pass_(4)
    node = world.kube.node("a")
    assert world.taints("a") == {"x/y"} and MARK not in node.annotations and MARK not in node.labels
    assert world.events("a")[-1] == "FailoverEnded"
    assert world.errors == []


def test_a_refusal_is_an_event_said_once(world: World) -> None:
    (snode,) = world.snodes
    for node in "ab":
        world.use(snode, node, f"claim-{node}")
    world.pass_(20)
    world.alive.discard("a")
    snode.silent = {"a": 0.0, "b": 0.0}  # the SNODE's network is cut
    world.pass_(60)
    assert world.events("a") == ["FailoverRefused"] and world.taints("a") == set()
    assert len(snode.exported) == 2
    # It is healed, and one is lost indeed.
    del snode.silent["b"]
    world.pass_(RULES.after_seconds - 3)
    assert world.events("a") == ["FailoverRefused"] * 2 and world.taints("a") == set(), "not all are back at once"
    world.pass_(6)
    assert world.taints("a") == {OUT_OF_SERVICE}


def test_a_node_with_volumes_of_another_driver_is_left_alone(world: World) -> None:
    (snode,) = world.snodes
    world.use(snode, "a", "one")
    world.use(Snode("x", "ebs.example"), "a", "foreign")
    world.pass_(20)
    world.lose("a")
    world.pass_(60)
    assert world.events("a") == ["FailoverRefused"] and world.taints("a") == set()


def test_to_observe_changes_nothing(world: World) -> None:
    (snode,) = world.snodes
    world.use(snode, "a", "one")
    world.parts = [world.part(snode, act=False)]
    world.pass_(20)
    world.lose("a")
    world.pass_(60)
    assert world.events("a") == ["FailoverWouldAct"]
    assert world.taints("a") == set() and len(snode.exported) == 1 and world.pods() == {"pod-one"}


def test_a_fence_that_hangs_holds_everything_up(world: World) -> None:
    (snode,) = world.snodes
    world.use(snode, "a", "one")
    world.pass_(20)
    snode.stuck = True
    world.lose("a")
    world.pass_(60)
    assert world.taints("a") == set() and world.pods() == {"pod-one"}
    assert world.events("a") == ["FailoverBegins", "FencingFailed", "FailoverWaiting"]
    # Another process goes on with what stands in the API.
    world.parts = [world.part(snode)]
    snode.stuck = False
    world.pass_(4)
    assert world.taints("a") == {OUT_OF_SERVICE} and world.pods() == set()


def test_what_is_not_observed_is_no_silence(world: World) -> None:
    """The API server was gone for a minute: nobody could renew; or our own process stood still."""
    (snode,) = world.snodes
    world.use(snode, "a", "one")
    world.pass_(20)
    snode.silent["a"] = 0.0
    world.alive, alive = set(), world.alive
    world.pass_(60, rounds=False)
    world.alive = alive - {"a"}
    world.pass_(20)
    assert world.events("a") == []
    world.pass_(10)
    assert world.taints("a") == {OUT_OF_SERVICE}


def test_a_taint_of_somebody_else_stays_his(world: World) -> None:
    (snode,) = world.snodes
    world.use(snode, "a", "one")
    taint = {"key": OUT_OF_SERVICE, "effect": "NoExecute", "value": "nodeshutdown"}
    world.ask("PATCH", "/api/v1/nodes/a", {"spec": {"taints": [taint]}}, content="application/merge-patch+json")
    world.pass_(20)
    world.lose("a")
    world.pass_(40)
    assert world.events("a") == ["FailoverRefused"]
    world.alive.add("a")
    world.pass_(40)
    assert world.taints("a") == {OUT_OF_SERVICE}


def test_a_node_that_is_removed_ends_it(world: World) -> None:
    (snode,) = world.snodes
    world.use(snode, "a", "one")
    world.pass_(20)
    snode.stuck = True
    world.lose("a")
    world.pass_(30)
    world.ask("DELETE", "/api/v1/nodes/a")
    snode.stuck = False
    world.pass_(4)
    assert snode.exported == [] and world.errors == []
    lease = world.kube.find_lease(LEADER)
    assert lease is not None and json.loads(lease.annotations["snode.io/failover-orders"])["orders"] == []


@pytest.mark.parametrize("broken", ["none", "leader dies", "other is blind", "other does not fence"])
def test_several_snodes(broken: str, server: ApiServer, make: Make) -> None:
    with world_of(server, make, snodes=2) as world:
        first, second = world.snodes
        world.use(first, "a", "one")
        world.use(second, "a", "two")
        world.use(second, "b", "three")
        world.pass_(20)
        assert world.leaders() == ["s0"]
        if broken == "other is blind":
            second.blind = True
            world.pass_(20)
        second.stuck = broken == "other does not fence"
        world.lose("a")
        if broken == "leader dies":
            # It has ordered, and not marked.
            while "FailoverBegins" not in world.events("a"):
                world.pass_(2)
            world.parts = world.parts[1:]
            world.snodes[0].exported = [one for one in first.exported if one.node.name != "a"]
            world.pass_(LEADER_SECONDS + 4)
            assert world.leaders() == ["s1"]
            # The order names both: without a word of the other one nothing is marked.
            assert world.taints("a") == set() and [one.node.name for one in second.exported] == ["b"]
            world.parts.append(world.part(first))
            world.pass_(4)
            assert world.taints("a") == {OUT_OF_SERVICE}
            return
        world.pass_(40)
        done = broken == "none"
        assert world.taints("a") == ({OUT_OF_SERVICE} if done else set())
        if done:
            assert [one.node.name for one in first.exported + second.exported] == ["b"]
            assert world.pods() == {"pod-three"}
        if broken == "other is blind":
            assert world.events("a") == ["FailoverRefused"] and len(first.exported) == 1


def test_one_leads(world: World) -> None:
    first, second = world.parts[0], world.part(Snode("s1", OTHER))
    world.parts.append(second)
    world.pass_(10)
    assert world.leaders() == ["s0"]
    first.stop()
    world.parts = [second]
    world.pass_(2)
    assert world.leaders() == ["s1"], "it was handed over"
    # Somebody holds it who never renews.
    lease = world.kube.find_lease(LEADER)
    assert lease is not None
    world.kube.put_lease(Lease(LEADER, "x", annotations={}, version=lease.version), labels={}, seconds=15)
    world.pass_(LEADER_SECONDS - 3)
    assert world.leaders() == []
    world.pass_(6)
    assert world.leaders() == ["s1"]
