"""The ground of real kernels: a SNODE and two CNODEs of the lab (tests/lab).

What comes in the middle of a request comes after a part of the time that such a request usually takes, so that a seed
plays the same requests and events, but not to the instant. Calls that a real orchestrator would repeat are repeated.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import grpc
from google.protobuf.message import Message
from grpc import StatusCode as Code

from csi.model import NodeId
from csi.pb import csi_pb2 as pb
from tests.lab import invariants
from tests.lab.cluster import Cluster, Machine
from tests.lab.oracle import Oracle
from tests.model.book import MIB, ON_NODE, Call, Event, Trouble
from tests.model.ground import Node, Reply, Seen, SeenNode
from tests.model.guest_events import GuestEvents
from tests.model.guest_node import GuestNode

_SERVICES = {
    method: service.name.lower()
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods_by_name
}
#: What the model calls the requests that may take a while.
_KINDS = {
    "CreateVolume": "create",
    "DeleteVolume": "delete",
    "ControllerPublishVolume": "publish",
    "ControllerUnpublishVolume": "unpublish",
    "ControllerExpandVolume": "expand",
    "NodeStageVolume": "stage",
    "NodeUnstageVolume": "unstage",
    "NodePublishVolume": "node publish",
    "NodeUnpublishVolume": "node unpublish",
    "NodeExpandVolume": "node expand",
}
#: Seconds of a call where everything is well; where a part is away that it may wait for; and for all its repetitions.
_WELL, _AWAY, _REPEATED, _INSIST = 60.0, 8.0, 60.0, 150.0


class Guests:
    """See Ground."""

    unit_bytes = 4 * MIB
    patience = 60.0
    exact = False

    def __init__(self, cluster: Cluster, *, pools: Sequence[str]) -> None:
        self.cluster = cluster
        self.pools = pools
        self.oracles: dict[str, Oracle] = {}
        self.nodes = [GuestNode(machine, self.oracles) for machine in cluster.cnodes]
        self.events = GuestEvents(cluster, self.nodes)
        self.trail: list[str] = []  # the orchestrator's
        self._usual: dict[str, float] = {}
        self._read: dict[Path, int] = {}
        self._disturbed = False

    @property
    def exporting(self) -> bool:
        """Whether tgtd runs, or did a moment ago."""
        return self._disturbed or self.events.tgtd_runs

    def close(self, *, failed: bool) -> None:
        """The cluster goes on to serve; see LabModel."""

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, request: Message, node: Node | None, *, sure: bool, insist: bool) -> Reply:
        """See Ground."""
        machine = self.cluster.snode if node is None else cast(GuestNode, node).machine
        self._before(request, node)
        again = {Code.ABORTED} if sure else set()
        if insist or (sure and node is None and self._well(node)):
            again |= {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}
        end = time.monotonic() + (_INSIST if insist else _REPEATED)
        while True:
            began = time.monotonic()
            reply = self._once(machine, request, _WELL if sure and self._well(node) else _AWAY)
            if reply.ok and sure:
                self._learn(request, time.monotonic() - began)
            if reply.code not in again or time.monotonic() > end:
                break
            time.sleep(0.3)
        self._after(request, reply)
        return reply

    def _once(self, machine: Machine, request: Message, seconds: float) -> Reply:
        name = type(request).__name__.removesuffix("Request")
        try:
            method = getattr(machine.stubs[_SERVICES[name]], name)
            return Reply(method(request, timeout=seconds), Code.OK, "")
        except grpc.RpcError as error:
            call = cast(grpc.Call, error)
            return Reply(None, call.code(), call.details() or "")

    def _learn(self, request: Message, seconds: float) -> None:
        """How long such a request takes; the long ones count, which had something to do."""
        kind = _KINDS.get(type(request).__name__.removesuffix("Request"), "")
        self._usual[kind] = max(seconds, 0.8 * self._usual.get(kind, 0.0))

    def _well(self, node: Node | None) -> bool:
        return self.events.tgtd_runs and not self.events.hangs and (node is None or node.reaches_snode)

    def _before(self, request: Message, node: Node | None) -> None:
        """An application ends before its volume is taken from it."""
        if isinstance(request, pb.NodeUnpublishVolumeRequest):
            cast(GuestNode, node).end_writing(Path(request.target_path))

    def _after(self, request: Message, reply: Reply) -> None:
        if isinstance(request, pb.DeleteVolumeRequest) and reply.code not in (Code.FAILED_PRECONDITION, Code.ABORTED):
            self.oracles.pop(request.volume_id, None)

    # -- questions -----------------------------------------------------------------------------------------------

    def defects(self) -> list[str]:
        """Tracebacks in the drivers' logs since the last time."""
        found = []
        for log in self.cluster.lab.logs.glob("*.driver-*.log"):
            with log.open(errors="replace") as file:
                file.seek(self._read.get(log, 0))
                text = file.read()
                self._read[log] = file.tell()
            found += [f"{log.name}: {text[at.start() : at.start() + 4000]}" for at in re.finditer("Traceback", text)]
        return found

    def sizes(self) -> Mapping[str, int]:
        """The size in bytes of every volume there is."""
        return invariants.look_at_snode(self.cluster.snode).volumes

    def records(self, volume_id: str) -> list[str] | None:
        """Only a mount can show that."""
        return None

    def signature(self, volume_id: str) -> str:
        """The filesystem on a volume, "" = none."""
        return self.cluster.snode.guest.run(f"blkid -p -o value -s TYPE /dev/vg?/{volume_id}")[1].strip()

    def sessions_of(self, volume_id: str, node: Node) -> int:
        """How many sessions of a node tgtd has for a volume, dead or alive."""
        initiator = NodeId.parse(node.node_id).initiator
        targets = invariants.look_at_snode(self.cluster.snode).targets.values()
        return sum(target.initiators.count(initiator) for target in targets if target.volume_id == volume_id)

    def in_flight(self) -> bool:
        """Whether a disk hangs."""
        return self.events.hangs

    def look(self) -> Seen:
        """See what there is now."""
        machines = [machine for machine in self.cluster.machines if machine.guest.alive]
        if self.events.hangs:
            machines = [machine for machine in machines if machine is not self.cluster.snode]
        with ThreadPoolExecutor(3) as pool:
            jobs = {
                machine.guest.name: pool.submit(invariants.look_at_cnode, machine)
                for machine in machines
                if machine is not self.cluster.snode
            }
            snode = invariants.look_at_snode(self.cluster.snode) if self.cluster.snode in machines else None
            cnodes = {name: job.result() for name, job in jobs.items()}
        problems = invariants.problems_of(snode, list(cnodes.values())) + self.defects()
        if not self.events.tgtd_runs:
            problems = [problem for problem in problems if "target" not in problem and "tgtd" not in problem]
        nodes = {index: _seen(cnodes[node.name]) for index, node in enumerate(self.nodes) if node.name in cnodes}
        return Seen(snode.volumes if snode else None, nodes, problems)

    def nothing_left(self) -> list[str]:
        """What is left of volumes though all were deleted."""
        found = [f"{where}: {what}" for where, what in self.cluster.leftovers().items()]
        for node in self.nodes:
            paths = node.machine.guest.run(f"find {node.root}/target -mindepth 1 2>/dev/null")[1].split()
            found += [f"{node.name}: {path}" for path in paths]
        return found

    # -- events --------------------------------------------------------------------------------------------------

    def happen(self, event: Event, volume_id: str, *, sure: bool) -> bool:
        """See Ground."""
        happened = self.events.happen(event, volume_id)
        if event.kind == "damage" and happened:
            self.oracles.pop(volume_id, None)
        return happened

    def heal(self) -> None:
        """End all faults."""
        for node in self.nodes:
            node.end_writing()
        self.events.heal()

    def disturbed(
        self, trouble: Trouble, what: Call | Event, act: Callable[[], None], meanwhile: Callable[[], None]
    ) -> None:
        """See Ground. An event is disturbed by requests only: two at once would need to know of each other."""
        if isinstance(what, Event) and not isinstance(trouble.meanwhile, Call):
            act()
            return
        machine = self.nodes[what.node].machine if what.kind in ON_NODE else self.cluster.snode
        errors: list[BaseException] = []

        def strike() -> None:
            try:
                time.sleep(1.2 * trouble.percent / 100 * self._usual.get(what.kind, 0.3))
                if trouble.kind == "meanwhile":
                    meanwhile()
                else:
                    self.trail += filter(None, [self.events.strike(trouble, machine)])
            except BaseException as error:
                errors.append(error)

        self._disturbed = True
        thread = threading.Thread(target=strike)
        thread.start()
        try:
            act()
        finally:
            thread.join()
            self._disturbed = False
            self.events.recover(trouble, machine)
        for error in errors:
            raise error


def _seen(cnode: invariants.Cnode) -> SeenNode:
    return SeenNode(
        mount_points={mount.mount_point for mount in cnode.mounts if mount.reachable},
        attached={session.volume_id for session in cnode.sessions},
        kept=set(cnode.records),
    )
