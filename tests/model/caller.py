"""What calls to the SNODE and to CNODEs have in common."""

from pathlib import Path

from google.protobuf.message import Message
from grpc import StatusCode as Code

from tests.model.book import NAMES, Call, Known
from tests.model.cnode import Cnode
from tests.model.codes import ALLOWED
from tests.model.world import Reply, World


class Caller:
    """What the orchestrator knows of each volume, and how it reaches the services."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.volumes = [Known(name) for name in NAMES]
        self.refused_by_hand = False  # a fault was injected that the driver can't foresee: INTERNAL is right then

    def staging_path(self, call: Call) -> Path:
        """The staging path of a call: of its own volume, or (place 2) of another one."""
        return self._path(call, "staging")

    def target_path(self, call: Call) -> Path:
        """The target path of a call."""
        return self._path(call, "target")

    def call(self, request: Message, node: Cnode | None = None) -> Reply:
        """Make a call; its status is one that CSI allows there."""
        reply = self.world.call(request, node=node)
        name = type(request).__name__.removesuffix("Request")
        by_hand = self.refused_by_hand and reply.code is Code.INTERNAL and "defect" not in reply.details
        defects = "\n".join(self.world.tracebacks)
        assert by_hand or reply.code in ALLOWED[name], f"{name}: {reply.code.name}: {reply.details}\n{defects}"
        return reply

    def expect(self, reply: Reply, code: Code) -> None:
        """The answer was known beforehand."""
        assert reply.code is code, f"{reply.code.name} instead of {code.name}: {reply.details}"

    def way(self, call: Call) -> str:
        """How a volume is used on a node: as it was published there, but for odd calls."""
        published = self.volumes[call.volume].published.get(call.node)
        return call.way if call.odd or published is None else published.way

    def _path(self, call: Call, kind: str) -> Path:
        index = (call.volume + 1) % len(self.volumes) if call.place == 2 else call.volume
        return self.world.nodes[call.node].root / kind / f"{NAMES[index]}{call.place % 2}"

    def shows(self, known: Known, node: Cnode, path: Path) -> None:
        """What is mounted at a path is this volume."""
        backing = node.backing(path)
        assert backing is not None and backing.stem == known.volume_id, f"{backing} at {path}, not {known.name}"

    def in_flight(self) -> bool:
        """Whether any command of any node is still at work in tgtd."""
        return any(session.in_flight for target in self.world.tgtd.targets.values() for session in target.sessions)
