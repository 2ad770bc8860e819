"""What an orchestrator knows: what it asked for, and what was acknowledged. Everything else may or may not be so."""

from dataclasses import dataclass, field
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
    life: int = 1
    written: int = 0
    acknowledged: list[str] = field(default_factory=list)
    published: dict[int, Published] = field(default_factory=dict)
    contexts: dict[int, list[dict[str, str]]] = field(default_factory=dict)
    staged: set[tuple[int, Path]] = field(default_factory=set)
    targets: set[tuple[int, Path]] = field(default_factory=set)
    shown: dict[tuple[int, Path], bool] = field(default_factory=dict)  # acknowledged publishes: whether as block
    used: bool = False  # it may hold something that has no signature: a raw device, or a damaged filesystem

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
        self.exists, self.size_bytes, self.life, self.written, self.used = False, 0, self.life + 1, 0, False
        self.acknowledged = []


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
