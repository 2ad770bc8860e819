"""What the model stands on: one SNODE and two CNODEs, as fakes in one process (world.py) or as guests (guests.py)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from tests.model.book import Call, Event, Trouble


@dataclass(frozen=True)
class Reply:
    """What a call ended with."""

    message: Any
    code: grpc.StatusCode
    details: str

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.code is grpc.StatusCode.OK


@dataclass
class SeenNode:
    """What a look found on a CNODE: where something is mounted, of which volumes there are sessions and records."""

    mount_points: set[Path]
    attached: set[str]
    kept: set[str]


@dataclass
class Seen:
    """What a look found. `sizes`: bytes of every volume; `nodes`: those that could be looked at, by index."""

    sizes: Mapping[str, int] | None
    nodes: Mapping[int, SeenNode]
    problems: list[str] = field(default_factory=list)  # what must never be, whatever was asked for


class Node(Protocol):
    """A CNODE. Questions about it are for one that is `up`."""

    name: str
    root: Path

    @property
    def up(self) -> bool:
        """Whether it has power."""
        ...

    @property
    def reaches_snode(self) -> bool:
        """Whether the network to the SNODE works."""
        ...

    @property
    def node_id(self) -> str:
        """What NodeGetInfo answers."""
        ...

    def volume_at(self, path: Path) -> str:
        """The volume that is mounted at a path, dead or alive; "" for none."""
        ...

    def is_mounted(self, path: Path) -> bool:
        """Whether anything is mounted at a path."""
        ...

    def is_block(self, path: Path) -> bool:
        """Whether a device node is published at a path."""
        ...

    def exists(self, path: Path) -> bool:
        """Whether there is anything at a path."""
        ...

    def volumes(self) -> set[str]:
        """The volumes that the kernel has a session for, or open-iscsi a record."""
        ...

    def write(self, path: Path, record: str) -> bool:
        """What an application in a container does: True when the disk has said that it is written."""
        ...

    def read(self, path: Path) -> list[str] | None:
        """The records that an application sees, or None when it can't read."""
        ...


class Ground(Protocol):
    """Everything that the model acts on.

    `pools`: to be taken in turn by the volumes. `unit_bytes`: what sizes are rounded up to. `patience`: seconds that
    the background gets to make true what must hold. `exact`: what comes in the middle of a request comes at a known
    step of it, so that the order of their effects is known.
    """

    pools: Sequence[str]
    unit_bytes: int
    patience: float
    exact: bool

    @property
    def nodes(self) -> Sequence[Node]:
        """The CNODEs."""
        ...

    @property
    def exporting(self) -> bool:
        """Whether tgtd runs."""
        ...

    def call(self, request: Message, node: Node | None, *, sure: bool, insist: bool) -> Reply:
        """Run the RPC whose request this is, on the SNODE or on a CNODE.

        sure: nothing disturbs it. insist: the orchestrator repeats it until it succeeds.
        """
        ...

    def defects(self) -> list[str]:
        """Tracebacks of unforeseen errors in the driver so far."""
        ...

    def look(self) -> Seen:
        """See what there is now."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """The size in bytes of every volume there is."""
        ...

    def records(self, volume_id: str) -> list[str] | None:
        """What was written to a volume, or None where only a mount can show that."""
        ...

    def signature(self, volume_id: str) -> str:
        """The filesystem on a volume, "" = none."""
        ...

    def sessions_of(self, volume_id: str, node: Node) -> int:
        """How many sessions of a node tgtd has for a volume, dead or alive."""
        ...

    def in_flight(self) -> bool:
        """Whether any command of a node is still at work in tgtd, for longer than a moment."""
        ...

    def happen(self, event: Event, volume_id: str, *, sure: bool) -> bool:
        """Make an event come true; returns whether it was possible. See book.KINDS."""
        ...

    def disturbed(
        self, trouble: Trouble, what: Call | Event, act: Callable[[], None], meanwhile: Callable[[], None]
    ) -> None:
        """Do `act` while the trouble comes over it, and make everything run again that the trouble ended.

        meanwhile: what happens in the middle of it, for that kind of trouble.
        """
        ...

    def heal(self) -> None:
        """End all faults: everything runs, and reaches everything."""
        ...

    def nothing_left(self) -> list[str]:
        """What is left of volumes though all were deleted."""
        ...

    def close(self, *, failed: bool) -> None:
        """Remove everything. Nothing of it serves another run if this one failed."""
        ...
