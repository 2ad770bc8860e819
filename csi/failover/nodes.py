"""Nodes that are given up, as Kubernetes knows them: marked, cleared of pods, unmarked when they are back and clean.

The mark is the out-of-service taint and, in the same patch, a label and an annotation that say it is ours: somebody
else's taint is never touched.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from csi.errors import Busy, NotFound
from csi.failover.board import Order
from csi.failover.rules import Held, Holdings
from csi.kube import OUT_OF_SERVICE, Kube
from csi.kube_objects import Attachment, Node, PersistentVolume, Taint

MARK = "snode.io/failover"
_LABEL_VALUE = "given-up"
_TAINT_VALUE = "snode-failover"
_TRIES = 5


@dataclass(frozen=True)
class Mark:
    """What we remember of a node that we gave up."""

    why: str
    drivers: tuple[str, ...]  # whose volumes it held
    claims: frozenset[str]  # "namespace/name", of the same


@dataclass(frozen=True)
class Leftovers:
    """What ties volumes of ours to a node that was given up."""

    pods: tuple[str, ...]  # "namespace/name"
    attachments: tuple[str, ...]
    in_use: tuple[str, ...]  # as its kubelet says

    def __bool__(self) -> bool:
        return bool(self.pods or self.attachments or self.in_use)

    def __str__(self) -> str:
        parts = [("pods", self.pods), ("attachments", self.attachments), ("volumes mounted", self.in_use)]
        return "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in parts if names)


class Nodes:
    """See above. Methods raise what csi.kube does."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube

    def marked(self) -> dict[str, Node]:
        """The nodes that we have given up, by name."""
        return {node.name: node for node in self._kube.nodes(f"{MARK}={_LABEL_VALUE}")}

    def holdings(self, node: str, drivers: Collection[str]) -> tuple[Holdings, frozenset[str]]:
        """What a suspect holds, and the claims ("namespace/name") of the volumes of these drivers."""
        held, claims = [], set()
        for attachment in self._attachments(node):
            volume = self._volume_of(attachment) if attachment.driver in drivers else None
            if volume is not None:
                claims.add(volume.claim)
            held.append(Held(attachment.driver, volume.handle if volume else attachment.name, attachment.attached))
        claims.discard("")
        started = any(pod.started and pod.claims & claims for pod in self._kube.pods_on(node)) if claims else False
        tainted = any(taint.key == OUT_OF_SERVICE for taint in self._kube.node(node).taints)
        return Holdings(held, started, tainted), frozenset(claims)

    def mark(self, order: Order) -> None:
        """Set the taint, with the sign that it is ours; from then on Kubernetes moves its pods and volumes away."""
        mark = Mark(order.why, order.drivers, frozenset(order.claims))
        ours = Taint(OUT_OF_SERVICE, "NoExecute", _TAINT_VALUE)

        def change(node: Node) -> None:
            if any(taint.key == OUT_OF_SERVICE for taint in node.taints):
                return  # ours, by a patch whose answer was lost; or somebody was faster, and it stays theirs
            self._kube.patch_node(
                node, taints=[*node.taints, ours], annotations={MARK: _to_text(mark)}, labels={MARK: _LABEL_VALUE}
            )

        self._change(order.node, change)

    def unmark(self, name: str) -> None:
        """Take our taint away. One that somebody else took away, or exchanged for his own, is fine."""

        def change(node: Node) -> None:
            taints = [taint for taint in node.taints if (taint.key, taint.value) != (OUT_OF_SERVICE, _TAINT_VALUE)]
            self._kube.patch_node(node, taints=taints, annotations={MARK: None}, labels={MARK: None})

        self._change(name, change)

    def is_tainted(self, node: Node) -> bool:
        """Whether our taint is there still."""
        return any((taint.key, taint.value) == (OUT_OF_SERVICE, _TAINT_VALUE) for taint in node.taints)

    def leftovers(self, node: Node) -> Leftovers:
        """What is left of our volumes on a node that we have given up."""
        mark = mark_of(node)
        prefixes = tuple(f"kubernetes.io/csi/{driver}^" for driver in mark.drivers)
        return Leftovers(
            pods=tuple(f"{p.namespace}/{p.name}" for p in self._kube.pods_on(node.name) if p.claims & mark.claims),
            attachments=tuple(one.name for one in self._attachments(node.name) if one.driver in mark.drivers),
            in_use=tuple(volume for volume in node.volumes_in_use if volume.startswith(prefixes)),
        )

    def forget_pods(self, claims: Collection[str], node: str) -> None:
        """Delete the pods of a node that mount these claims from the API, since no kubelet does: their volumes are
        fenced, and their successors wait for their names and volumes.
        """
        for pod in self._kube.pods_on(node):
            if pod.claims & frozenset(claims):
                self._kube.forget_pod(pod)

    def _change(self, name: str, change: Callable[[Node], None]) -> None:
        """Change a node as it is now: others write to it at the same time. Raises Busy when they always are faster."""
        for left in reversed(range(_TRIES)):
            try:
                change(self._kube.node(name))
            except Busy:
                if not left:
                    raise
            else:
                return

    def _volume_of(self, attachment: Attachment) -> PersistentVolume | None:
        if not attachment.volume_name:
            return None
        try:
            return self._kube.persistent_volume(attachment.volume_name)
        except NotFound:
            return None

    def _attachments(self, node: str) -> Sequence[Attachment]:
        return [attachment for attachment in self._kube.attachments() if attachment.node == node]


def mark_of(node: Node) -> Mark:
    """What the annotation says; damaged or missing, nothing is known."""
    try:
        fields: dict[str, Any] = json.loads(node.annotations.get(MARK, ""))
        return Mark(str(fields["why"]), tuple(fields["drivers"]), frozenset(fields["claims"]))
    except (ValueError, KeyError, TypeError):
        return Mark("", (), frozenset())


def _to_text(mark: Mark) -> str:
    return json.dumps({**asdict(mark), "format": 1, "claims": sorted(mark.claims)})
