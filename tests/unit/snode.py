"""A SNODE in one process for tests: files or a fake LVM, exported by a fake tgtd; killed and started at will."""

from collections.abc import Mapping
from pathlib import Path

from csi.backends.base import Backend
from csi.backends.files import FilesBackend
from csi.backends.lvm import LvmBackend
from csi.backends.lvm_space import Space
from csi.backends.lvm_thick import Thick
from csi.backends.lvm_thin import Thin
from csi.deadline import Deadline
from csi.exports.tgt import TgtExport
from csi.locks import VolumeLocks
from csi.model import AccessMode, Capability, NodeId, Volume
from csi.publications import Publications
from csi.records import RecordStore
from csi.run import Boundary, no_boundary
from csi.sealing import NodeKey
from csi.volumes import Pool, Volumes
from tests.fakes.lvm import FakeLvm
from tests.fakes.runner import FakeRunner
from tests.fakes.tgt import FakeTgtd

MIB = 1 << 20
WRITER = Capability(AccessMode.SINGLE_NODE_WRITER)
_SPACES: Mapping[str, Space] = {"lvm": Thick(), "thin": Thin("tp"), "mirror": Thick("raid1")}


class Snode:
    """The use cases over a folder and a fake tgtd, both of which outlive `kill`."""

    def __init__(self, folder: Path, tgtd: FakeTgtd, *, kind: str = "files", boundary: Boundary = no_boundary) -> None:
        """kind: "files", or in a volume group of a fake LVM "lvm" (thick), "thin" or "mirror"."""
        self._folder = folder
        self._tgtd = tgtd
        self._kind = kind
        folder.mkdir(exist_ok=True)
        disks = {"/dev/sda": 100, "/dev/sdb": 100} if kind == "mirror" else None
        self.lvm = FakeLvm(folder / "dev", disks=disks) if kind != "files" else None
        if self.lvm is not None and kind == "thin":
            self.lvm.add("tp", extents=90, kind="thin-pool")
        self.runner = FakeRunner(self.lvm.programs if self.lvm else {})
        self.node = _node(folder, "c1")
        self.other = _node(folder, "c2")
        self.start(boundary)

    def start(self, boundary: Boundary = no_boundary) -> None:
        """Make all objects anew from what is on disk, as after a kill."""
        state = self._folder / "state"
        state.mkdir(parents=True, exist_ok=True)
        self.publications = Publications(RecordStore(state / "publications", boundary=boundary))
        self.runner.boundary = boundary
        self.backend = self._backend(state / "pools" / "files", boundary)
        self.export = TgtExport(self._tgtd.path, portals=["127.0.0.1:3260"], runner=self.runner, boundary=boundary)
        self.volumes = Volumes(
            {"files": Pool(self.backend, self.export)},
            default_pool="files",
            publications=self.publications,
            locks=VolumeLocks(state / "locks"),
        )

    def _backend(self, state: Path, boundary: Boundary) -> Backend:
        if self.lvm is None:
            return FilesBackend("files", directory=self.pool, state=state, boundary=boundary)
        return LvmBackend(
            "files",
            vg=self.lvm.vg,
            space=_SPACES[self._kind],
            state=state,
            runner=self.runner,
            nodes=self.lvm.nodes(),
            boundary=boundary,
            wipe_seconds=5.0,
        )

    def settle(self) -> None:
        """Let the background come to its end: wipes, marks, restorations."""
        for _ in range(20):
            self.volumes.tend(soon())
            if not any(name.startswith("trash-") for name in self.volumes_there()) and not self.notes():
                return

    def volumes_there(self) -> dict[str, int]:
        """The size in bytes of everything in the pool that holds or held data, deleted volumes too."""
        if self.lvm is None:
            return {path.stem: path.stat().st_size for path in self.pool.glob("*.img")}
        return {name: lv.extents * MIB for name, lv in self.lvm.lvs.items() if lv.kind != "thin-pool"}

    def notes(self) -> list[str]:
        """The notes that LVM's background works on."""
        state = self._folder / "state" / "pools" / "files"
        return [path.name for kind in ("creating", "used", "wipes") for path in (state / kind).glob("*.json")]

    @property
    def state(self) -> Path:
        """The state folder."""
        return self._folder / "state"

    @property
    def pool(self) -> Path:
        """The folder of the files."""
        return self._folder / "pool"

    def create(self, name: str = "a", *, size_bytes: int = 8 * MIB, limit_bytes: int = 0) -> Volume:
        """CreateVolume."""
        return self.volumes.create(
            name=name,
            required_bytes=size_bytes,
            limit_bytes=limit_bytes,
            capabilities=[WRITER],
            parameters={},
            requisite=[],
            deadline=soon(),
        )

    def publish(
        self, volume_id: str, node: NodeId | None = None, *, capability: Capability = WRITER, readonly: bool = False
    ) -> dict[str, str]:
        """ControllerPublishVolume."""
        return self.volumes.publish(
            volume_id, node_id=str(node or self.node), capability=capability, readonly=readonly, deadline=soon()
        )

    def unpublish(self, volume_id: str, node: NodeId | None = None) -> None:
        """ControllerUnpublishVolume."""
        self.volumes.unpublish(volume_id, node_id=str(node) if node else "", deadline=soon())

    def unpublish_all(self) -> None:
        """ControllerUnpublishVolume of everything."""
        for publication in self.publications.all():
            self.unpublish(publication.volume_id)

    def targets(self) -> set[str]:
        """The names of all targets in tgtd."""
        return {target.name for target in self._tgtd.targets.values()}

    def files(self) -> set[str]:
        """Everything in the pool's folder and the pool's state."""
        folders = (self._folder / "pool", self._folder / "state" / "pools", self._folder / "state" / "publications")
        found = {path.name for folder in folders for path in folder.rglob("*") if path.is_file()}
        return (found | set(self.lvm.lvs if self.lvm else ())) - {"pool.json", "vg.json", "tp"}


def soon() -> Deadline:
    """A deadline that no test should reach."""
    return Deadline.after(20)


def _node(folder: Path, name: str) -> NodeId:
    key = NodeKey.load(RecordStore(folder / name))
    return NodeId(name=name, public_key=key.public, initiator=f"iqn.1993-08.org.debian:01:{name}")
