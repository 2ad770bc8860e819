"""What calls to the SNODE and to CNODEs have in common."""

import time
from pathlib import Path

from google.protobuf.message import Message
from grpc import StatusCode as Code

from tests.model.book import NAMES, Call, Known
from tests.model.codes import ALLOWED
from tests.model.ground import Ground, Node, Reply


class Caller:
    """What the orchestrator knows of each volume, and how it reaches the services."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.volumes = [Known(name) for name in NAMES]
        self.alone = True  # no other request takes effect at the same time, in an order that nobody knows
        self.insist = False  # the orchestrator repeats its calls until they succeed
        self._began = time.monotonic()
        self.trail: list[str] = []  # every call and its answer, for the reader of a failure
        self.refused_by_hand = False  # a fault was injected that the driver can't foresee: INTERNAL is right then

    def staging_path(self, call: Call) -> Path:
        """The staging path of a call: of its own volume, or (place 2) of another one."""
        return self._path(call, "staging")

    def target_path(self, call: Call) -> Path:
        """The target path of a call."""
        return self._path(call, "target")

    def call(self, request: Message, node: Node | None = None, *, sure: bool = False) -> Reply:
        """Make a call; its status is one that CSI allows there."""
        began = time.monotonic()
        reply = self.ground.call(request, node, sure=sure, insist=sure and self.insist)
        name = type(request).__name__.removesuffix("Request")
        where = "" if node is None else f" on {node.name}"
        about = getattr(request, "volume_id", "") or getattr(request, "name", "")
        how = "" if sure else " (disturbed)"
        self.note(f"{name} {about}{where}{how}: {reply.code.name} {reply.details[:200]}", began)
        by_hand = self.refused_by_hand and reply.code is Code.INTERNAL and "defect" not in reply.details
        if not by_hand and reply.code not in ALLOWED[name]:
            raise AssertionError("\n".join([f"{name}: {reply.code.name}: {reply.details}", *self.ground.defects()]))
        return reply

    def note(self, text: str, began: float = 0.0) -> None:
        """Add to the trail, with the time, and how long it took."""
        took = f" ({time.monotonic() - began:.1f} s)" if began else ""
        self.trail.append(f"{time.monotonic() - self._began:6.1f} {text}{took}")

    def expect(self, reply: Reply, code: Code) -> None:
        """The answer was known beforehand."""
        assert reply.code is code, f"{reply.code.name} instead of {code.name}: {reply.details}"

    def way(self, call: Call) -> str:
        """How a volume is used on a node: as it was published there, but for odd calls."""
        published = self.volumes[call.volume].published.get(call.node)
        return call.way if call.odd or published is None else published.way

    def _path(self, call: Call, kind: str) -> Path:
        index = (call.volume + 1) % len(self.volumes) if call.place == 2 else call.volume
        return self.ground.nodes[call.node].root / kind / f"{NAMES[index]}{call.place % 2}"

    def shows(self, known: Known, node: Node, path: Path) -> None:
        """What is mounted at a path is this volume."""
        found = node.volume_at(path)
        assert found == known.volume_id, f"{found or 'no volume'} at {path}, not {known.name}"
