"""What an orchestrator knows: what it asked for, and what was acknowledged. Everything else may or may not be so."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi.model import volume_id_of
from csi.pb import csi_pb2 as pb
from tests.rpc.service import block, mount

MIB = 1 << 20
NAMES = ("a", "b", "c")

#: The ways to use a volume, and whether several nodes may do so at once.
CAPABILITIES: dict[str, pb.VolumeCapability] = {
    "ext4": mount(),
    "xfs": mount(fs_type="xfs"),
    "btrfs": mount(fs_type="btrfs", flags=("noatime",)),
    "single": mount("SINGLE_NODE_SINGLE_WRITER"),
    "multi": mount("SINGLE_NODE_MULTI_WRITER"),
    "reader": mount("SINGLE_NODE_READER_ONLY"),
    "readers": mount("MULTI_NODE_READER_ONLY"),
    "block": block(),
    "shared block": block("MULTI_NODE_MULTI_WRITER"),
    "shared": mount("MULTI_NODE_MULTI_WRITER"),
    "one of many": mount("MULTI_NODE_SINGLE_WRITER"),
}
SHARED = ("readers", "shared block")
UNSUPPORTED = ("shared", "one of many")


@dataclass
class Published:
    """A publication to a node, as far as the orchestrator knows."""

    way: str
    readonly: bool
    sure: bool = False  # acknowledged, and nothing was asked since that could have ended it


@dataclass
class Known:
    """One volume. exists: None = not known since a call went wrong."""

    name: str
    exists: bool | None = False
    size_bytes: int = 0
    may_have_grown: bool = False  # a growth was asked for beside another call, and its end was not looked at yet
    life: int = 1
    written: int = 0
    acknowledged: list[str] = field(default_factory=list)
    published: dict[int, Published] = field(default_factory=dict)
    contexts: dict[int, list[dict[str, str]]] = field(default_factory=dict)
    staged: set[tuple[int, Path]] = field(default_factory=set)
    targets: set[tuple[int, Path]] = field(default_factory=set)
    shown: dict[tuple[int, Path], bool] = field(default_factory=dict)  # acknowledged publishes: whether as block
    used: bool = False  # it may hold something that has no signature: a raw device, or a damaged filesystem
    damaged: bool = False  # what was on it is gone, and what is left of it may look like anything
    raw: bool = False  # what was written to it was written to the device itself

    @property
    def volume_id(self) -> str:
        """Its id, which follows from its name."""
        return volume_id_of(self.name)

    def next_record(self) -> str:
        """A text that no other volume, and no earlier volume of this name, ever gets."""
        self.written += 1
        return f"{self.name}.{self.life}.{self.written}"

    def owns(self, record: str) -> bool:
        """Whether a record was written to this volume in its present life."""
        return record.startswith(f"{self.name}.{self.life}.")

    def gone(self) -> None:
        """It was deleted, for sure."""
        self.exists, self.size_bytes, self.life, self.written = False, 0, self.life + 1, 0
        self.used = self.damaged = self.raw = self.may_have_grown = False
        self.acknowledged = []

    def copy(self) -> "Known":
        """What is known now, for `blur`."""
        return copy.deepcopy(self)

    def blur(self, before: "Known", calls: "Sequence[Call]", paths: "Sequence[tuple[int, Path]]") -> None:
        """Several calls were made at once since `before`: nobody knows in which order they took effect.

        paths: those that the calls named, with their nodes.
        """
        if any(call.kind in ("create", "delete") for call in calls) or self.exists != before.exists:
            self.exists = None
        asked = {
            call.node: Published(call.way, call.readonly or call.way in ("reader", "readers"))
            for call in calls
            if call.kind == "publish"
        }
        ended = any(call.kind == "unpublish" for call in calls)
        for node in before.published.keys() | self.published.keys() | asked.keys():
            now = self.published.get(node) or before.published.get(node) or asked[node]
            sure = now.sure and node in self.published and not ended and len(calls) == 1
            self.published[node] = replace(now, sure=sure)
        self.staged |= before.staged
        self.targets |= before.targets
        for call, path in zip(calls, paths, strict=True):
            if call.kind == "stage":
                self.staged.add(path)
            elif call.kind == "node publish":
                self.targets.add(path)
        if len(calls) > 1:
            self.shown = {path: block for path, block in self.shown.items() if before.shown.get(path) == block}
        self.used = self.used or (before.used and self.life == before.life)


@dataclass(frozen=True)
class Call:
    """One request: which, for which volume and node, with which of the choices."""

    kind: str
    volume: int = 0
    node: int = 0
    way: str = "ext4"
    size: int = 16 * MIB
    place: int = 0  # which of the paths; 2 is the path of another volume
    readonly: bool = False
    odd: bool = False  # the capability of `way` even if it was published in another; an earlier context; all nodes


#: What happens beside the requests: ends and starts of services and machines, background work, slow disks, damage.
KINDS = (
    "tend",
    "tend node",
    "restart controller",
    "restart node",
    "tgtd stops",
    "tgtd starts",
    "tgtd restarts",
    "iscsid restarts",
    "reboot",
    "power off",
    "power on",
    "snode reboots",
    "cut off",
    "back again",
    "connections break",
    "slow disk",
    "disk answers",
    "damage",
)
#: Those that may come between two steps of a request. A kill of its own service is another kind of trouble.
MEANWHILE = tuple(
    kind for kind in KINDS if kind not in ("restart controller", "restart node", "power off", "reboot", "snode reboots")
)


#: What is done on a CNODE, of the requests and events.
ON_NODE = frozenset(
    {"stage", "unstage", "node publish", "node unpublish", "stats", "health", "node expand", "info", "tend node"}
)


@dataclass(frozen=True)
class Event:
    """One of KINDS, at a node or a volume where that matters."""

    kind: str
    node: int = 0
    volume: int = 0


@dataclass(frozen=True)
class Trouble:
    """What comes in the middle of a request: its service is killed, tgtd or a command fails, or something else."""

    kind: str
    percent: int  # how far the request is then
    how: str = ""
    after: bool = False
    meanwhile: Call | Event | None = None
