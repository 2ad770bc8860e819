"""A stand-in for a database on Kubernetes: a StatefulSet of one pod that writes records, wherever it is started."""

from dataclasses import dataclass, field
from typing import Any

from tests.lab.guest import Guest
from tests.lab.kubernetes import Kubernetes
from tests.lab.kubernetes_objects import stateful_set, writer
from tests.lab.oracle import Oracle

#: The pod writes as soon as its volume is there; on a machine that does other things too that takes its time.
_SECONDS = 180


@dataclass
class StatefulWriter:
    """Its pod is `pod`; what its pods made durable, the oracle has heard."""

    kubernetes: Kubernetes
    name: str
    node: str = ""  # "" = any
    pod: Any = None
    oracle: Oracle = field(init=False)

    def __post_init__(self) -> None:
        self.oracle = Oracle(self._claim)

    def start(self, *, records: int = 50) -> Guest:
        """Returns the CNODE that it runs on, once it has written so many records."""
        template = writer(self.name, volume="volume", node=self.node)
        self.kubernetes.create(stateful_set(self.name, template))
        self.pod = self.kubernetes.wait_pod(f"{self.name}-0", seconds=_SECONDS)
        self.kubernetes.follow(self.pod, self.oracle)
        self.oracle.wait_for(records, _SECONDS)
        return self.kubernetes.node(self.pod.spec.node_name)

    def wait_elsewhere(self) -> None:
        """Return once its next pod is ready, on another node."""
        old = self.pod
        self.pod = self.kubernetes.wait_pod(f"{self.name}-0", seconds=_SECONDS, other_than=old.metadata.uid)
        assert self.pod.spec.node_name != old.spec.node_name

    def find_all(self) -> int:
        """The pod has found every durable record of those before it, which are so many, and writes."""
        before = self.oracle.heard()
        log = self.kubernetes.wait_log(f"{self.name}-0", "checked").partition("checked")[0]
        self.oracle.compare(log.splitlines(), before)
        self.kubernetes.follow(self.pod, self.oracle)
        self.oracle.wait_for(1, _SECONDS)
        return before[-1]

    def judge(self) -> None:
        """Nothing is there but what this pod wrote, and those before it while they had the volume."""
        self.oracle.wait_for_more(20, _SECONDS)
        volume = self.kubernetes.volume_of(self._claim).metadata.name
        path = f"/var/lib/kubelet/pods/{self.pod.metadata.uid}/volumes/kubernetes.io~csi/{volume}/mount/records"
        self.oracle.judge(self.kubernetes.node(self.pod.spec.node_name), path)

    @property
    def _claim(self) -> str:
        return f"volume-{self.name}-0"
