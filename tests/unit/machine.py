"""A SNODE and CNODE on this machine, on files and real loop devices, with everything that one test may leave behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi.backends.files import FilesBackend
from csi.connectors.loop import LoopConnector
from csi.exports.none import NoExport
from csi.fs.format import Filesystems
from csi.fs.mounts import Mounts
from csi.fs.usage import Usage
from csi.locks import VolumeLocks
from csi.model import AccessMode, Capability
from csi.publications import Publications
from csi.records import RecordStore
from csi.run import SubprocessRunner
from csi.sealing import NodeKey
from csi.staging import Staging
from csi.volumes import Pool, Volumes
from tests.leftovers import all_below
from tests.scratch_folder import ON_DISK, empty, scratch_folder
from tests.unit.snode import MIB, soon

WRITER = Capability(AccessMode.SINGLE_NODE_WRITER)
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
READER = Capability(AccessMode.SINGLE_NODE_READER_ONLY)
SINGLE = Capability(AccessMode.SINGLE_NODE_SINGLE_WRITER)


class Machine:
    """A SNODE and CNODE on files and loop devices, one volume `a`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging_path = folder / "staging"
        self.target = folder / "targets" / "one"
        self.start()
        self.volume = self.create("a")
        self.volume_id = self.volume.volume_id

    def start(self) -> None:
        state = self.folder / "state"
        state.mkdir(exist_ok=True)
        runner = SubprocessRunner()
        records = RecordStore(state / "node")
        self.staging = Staging(
            [LoopConnector(runner, roots=[self.folder / "pool"])],
            filesystems=Filesystems(runner),
            mounts=Mounts(runner),
            records=records,
            locks=VolumeLocks(state / "locks"),
            key=NodeKey.load(records),
            name="one",
            read_initiator=lambda: "",
            target_roots=[self.folder],
        )
        backend = FilesBackend("files", directory=self.folder / "pool", state=state / "pools")
        self.volumes = Volumes(
            {"files": Pool(backend, NoExport(), local_to="one")},
            default_pool="files",
            publications=Publications(RecordStore(state / "publications")),
            locks=VolumeLocks(state / "locks"),
        )

    def create(self, name: str, size_bytes: int = 16 * MIB):  # type: ignore[no-untyped-def]
        return self.volumes.create(
            name=name, required_bytes=size_bytes, limit_bytes=0, capabilities=[WRITER], parameters={}, requisite=[],
            deadline=soon(),
        )  # fmt: skip

    def context(self, capability: Capability = WRITER, *, readonly: bool = False) -> dict[str, str]:
        """What ControllerPublishVolume answers."""
        node_id = self.staging.info(soon()).node_id
        return self.volumes.publish(
            self.volume_id, node_id=node_id, capability=capability, readonly=readonly, deadline=soon()
        )

    def record(self) -> Path:
        """Where the node remembers how the volume is staged."""
        return self.folder / "state" / "node" / f"{self.volume_id}.json"

    def stats(self, path: Path) -> list[Usage]:
        """NodeGetVolumeStats."""
        return self.staging.stats(self.volume_id, volume_path=path, deadline=soon())

    def stage(
        self,
        capability: Capability = WRITER,
        *,
        path: Path | None = None,
        context: dict[str, str] | None = None,
        **changes: str,
    ) -> None:
        """context: by default that of a ControllerPublishVolume with this capability."""
        self.staging.stage(
            self.volume_id,
            staging_path=path or self.staging_path,
            capability=capability,
            publish_context=(self.context(capability) if context is None else context) | changes,
            deadline=soon(),
        )

    def publish(self, capability: Capability = WRITER, *, target: Path | None = None, readonly: bool = False) -> None:
        self.staging.publish(
            self.volume_id,
            staging_path=self.staging_path,
            target_path=target or self.target,
            capability=capability,
            readonly=readonly,
            publish_context={},
            deadline=soon(),
        )

    def unpublish(self, target: Path | None = None) -> None:
        self.staging.unpublish(self.volume_id, target_path=target or self.target, deadline=soon())

    def unstage(self, path: Path | None = None) -> None:
        self.staging.unstage(self.volume_id, staging_path=path or self.staging_path, deadline=soon())

    def leave(self) -> None:
        """Unstage, and let the SNODE see it."""
        self.unstage()
        self.volumes.unpublish(self.volume_id, node_id="", deadline=soon())


@contextmanager
def machine_in_use() -> Iterator[Machine]:
    """A machine; afterwards nothing of it may be mounted or attached."""
    with scratch_folder("staging", base=ON_DISK) as folder:
        try:
            yield Machine(folder)
            left = all_below(folder)
        finally:
            empty(folder)
    assert left == []
