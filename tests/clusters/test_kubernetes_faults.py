"""What a real Kubernetes does to volumes when machines and daemons die under their pods: nothing durable is lost."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.lab.conftest import Say, seconds
from tests.lab.guest import Guest
from tests.lab.kubernetes import NAMESPACE, OUT_OF_SERVICE, Kubernetes
from tests.lab.kubernetes_control import until
from tests.lab.kubernetes_look import left_on_cnode, leftovers
from tests.lab.kubernetes_objects import claim, writer
from tests.lab.oracle import Oracle

from .stateful_writer import StatefulWriter

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def nothing_left(kubernetes: Kubernetes) -> Iterator[None]:
    yield
    kubernetes.restore()
    kubernetes.clear()
    until("nothing is left", lambda: not leftovers(kubernetes), 90)


def test_a_pod_writes_on_through_every_restart(kubernetes: Kubernetes, say: Say) -> None:
    kubernetes.create(claim("data"), writer("data", volume="data"))
    pod = kubernetes.wait_pod("data")
    node, oracle = kubernetes.node(pod.spec.node_name), Oracle("data")
    kubernetes.follow(pod, oracle)
    oracle.wait_for(20, 180)

    def pods() -> None:
        kubernetes.control.kubectl("delete", "pod", f"--namespace={NAMESPACE}", "--all", timeout=120)
        kubernetes.wait_driver()

    def kubelet() -> None:
        kubernetes.kill(node, "kubelet")
        kubernetes.start_kubelet(node)

    def tgtd() -> None:
        kubernetes.kill(kubernetes.snode, "tgtd")
        time.sleep(3)
        kubernetes.start_tgtd()

    def snode() -> None:
        kubernetes.snode.kill9()
        kubernetes.boot(kubernetes.snode)

    for restart in (pods, kubelet, tgtd, snode):
        began = time.monotonic()
        restart()
        oracle.wait_for_more(20, 180)
        say(f"{restart.__name__} restarted, the pod writes on after {seconds(began)}")
    assert oracle.errors == []
    assert kubernetes.find_pod("data").metadata.uid == pod.metadata.uid
    assert not kubernetes.find_pod("data").status.container_statuses[0].restart_count
    path = f"/var/lib/kubelet/pods/{pod.metadata.uid}/volumes/kubernetes.io~csi"
    oracle.judge(node, f"{path}/{kubernetes.volume_of('data').metadata.name}/mount/records")
    kubernetes.wait_driver()


# -- a lost CNODE ----------------------------------------------------------------------------------------------------


@dataclass
class Loss:
    """The loss of the CNODE that a writer runs on, and the times of its move to the other one."""

    kubernetes: Kubernetes
    say: Say
    writer: StatefulWriter = field(init=False)
    node: Guest = field(init=False)
    began: float = 0.0

    def __post_init__(self) -> None:
        self.writer = StatefulWriter(self.kubernetes, "db")
        self.node = self.writer.start(records=100)

    def lose(self, how: Callable[[], object]) -> int:
        """Lose it, let an admin say so, and wait until it is fenced; returns the number of durable records."""
        self.began = time.monotonic()
        how()
        self.kubernetes.wait_ready(self.node.name, ready=False)
        self._told("Kubernetes has seen it")
        self.kubernetes.control.kubectl("taint", "node", self.node.name, f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute")
        until("the lost CNODE is fenced", lambda: self.node.name not in self._attached_to(), 120)
        self._told("fenced")
        return self.writer.oracle.acknowledged

    def find_elsewhere(self) -> None:
        """The next pod finds every durable record, and writes."""
        self.writer.wait_elsewhere()
        self._told("its pod runs on the other CNODE")
        found = self.writer.find_all()
        self._told(f"all {found} records found, the first new one is durable")

    def come_back(self) -> None:
        """The lost CNODE is part of the cluster again, and has nothing of the volume."""
        self.began = time.monotonic()
        self.kubernetes.wait_ready(self.node.name)
        self._told("the lost CNODE is back")
        until("it has let go of the volume", lambda: not left_on_cnode(self.node), 180)
        self._told("it has let go of the volume")
        self.kubernetes.control.kubectl("taint", "node", self.node.name, f"{OUT_OF_SERVICE}-")

    def _told(self, what: str) -> None:
        self.say(f"{what} after {seconds(self.began)}")

    def _attached_to(self) -> list[str]:
        return [attachment.spec.node_name for attachment in self.kubernetes.storage.list_volume_attachment().items]


def test_a_cnode_loses_its_power(kubernetes: Kubernetes, say: Say) -> None:
    loss = Loss(kubernetes, say)
    loss.lose(loss.node.kill9)
    loss.find_elsewhere()
    kubernetes.boot(loss.node)
    loss.come_back()
    loss.writer.judge()


def test_a_cnode_is_cut_off_but_alive(kubernetes: Kubernetes, say: Say) -> None:
    loss = Loss(kubernetes, say)
    durable = loss.lose(loss.node.cut)
    loss.find_elsewhere()
    loss.node.heal()
    loss.come_back()
    assert loss.writer.oracle.heard()[0] == durable, "the lost CNODE wrote after it was fenced"
    loss.writer.judge()
