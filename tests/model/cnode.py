"""A CNODE in one process: the real node service, use cases and connector on a fake kernel, which outlives kills."""

from collections.abc import Sequence
from pathlib import Path

from csi.connectors.initiator import initiator_name
from csi.connectors.iscsi import IscsiConnector
from csi.deadline import Deadline
from csi.fs.format import Filesystems
from csi.fs.mounts import Mounts
from csi.locks import VolumeLocks
from csi.model import NodeId
from csi.records import RecordStore
from csi.rpc.method import Calls
from csi.sealing import NodeKey
from csi.services.node import Node
from csi.staging import Staging
from tests.fakes.mounts import FakeDisk
from tests.fakes.runner import FakeRunner, Program, Reply
from tests.fakes.tgt import FakeTgtd
from tests.model.images import Image
from tests.model.initiator import Initiator
from tests.model.node_mounts import NodeMounts
from tests.model.patience import Steps

_FIRST_MAJOR = 4000  # no device of any machine


class Cnode:
    """`up`: False while it has no power. `steps`: the boundary of its service."""

    def __init__(self, folder: Path, index: int, *, root: Path, tgtd: FakeTgtd, portal: str) -> None:
        """root: below which volumes are mounted."""
        self.name = f"c{index}"
        self.steps = Steps()
        self.up = True
        self.root = root
        self.root.mkdir()
        folder.mkdir()
        self._state = folder / "state"
        self._tgtd = tgtd
        self.initiator = Initiator(
            folder / "kernel",
            name=f"iqn.1993-08.org.debian:01:{self.name}",
            major=_FIRST_MAJOR + index,
            tgtd=tgtd,
            portal=portal,
            mounted=lambda: self.mounts.numbers(),
        )
        self.mounts = NodeMounts(folder, dev=self.initiator.dev, find_disk=self._find_disk)
        self.initiator.mountinfo = self.mounts.table
        self.runner = self.initiator.runner = FakeRunner(self._programs(), boundary=self.steps)
        self.start()

    def start(self) -> None:
        """Make all objects anew from what is on disk, as after a kill."""
        self._state.mkdir(exist_ok=True)
        records = RecordStore(self._state / "node", boundary=self.steps)
        self.connector: IscsiConnector = self.initiator.connector(boundary=self.steps)
        self.staging = Staging(
            [self.connector],
            filesystems=Filesystems(self.runner),
            mounts=Mounts(self.runner, table=self.mounts.table, boundary=self.steps),
            records=records,
            locks=VolumeLocks(self._state / "locks"),
            key=NodeKey.load(records),
            name=self.name,
            read_initiator=lambda: initiator_name(self.initiator.initiator_file),
            target_roots=[self.root],
        )
        self.records = records
        self.service = Node(calls=Calls(), staging=self.staging)

    @property
    def node_id(self) -> str:
        """What NodeGetInfo answers."""
        key = NodeKey.load(self.records)
        return str(NodeId(self.name, key.public, self.initiator.name))

    def tend(self) -> None:
        """One round of the node's background work."""
        self.staging.tend(Deadline.after(20.0))

    def look(self) -> None:
        """Let the kernel see what became of its sessions."""
        with self._tgtd.guard:
            self.initiator.look()

    def power(self, up: bool) -> None:
        """Off: the node is silent, its sessions stand in tgtd. On again: it boots, with nothing attached."""
        with self._tgtd.guard:
            self.up = self.initiator.connected = up
            self.initiator.reboot()
            self.mounts.reboot()
            self.start()

    def write(self, path: Path, record: str) -> bool:
        """What an application in a container does: True when the disk has said that it is written."""
        with self._tgtd.guard:
            self.look()
            number = self._number_at(path)
            seen = self.mounts.at(path)
            if not self.up or number is None or seen is None or (seen.readonly and seen.fs_type != "devtmpfs"):
                return False
            lun = self.initiator.lun(number)
            if lun is None or lun.readonly or not lun.online or not Path(lun.path).exists():
                return False
            image = Image(Path(lun.path))
            image.records = [*image.records, record]
            return not self.initiator.nexus(number).in_flight

    def read(self, path: Path) -> list[str] | None:
        """The records that an application sees, or None when it can't read."""
        with self._tgtd.guard:
            self.look()
            number = self._number_at(path)
            lun = self.initiator.lun(number) if number is not None else None
            if lun is None or not lun.online or not Path(lun.path).exists():
                return None
            return Image(Path(lun.path)).records

    def backing(self, path: Path) -> Path | None:
        """The file on the SNODE that is mounted at a path, dead or alive."""
        number = self._number_at(path)
        return self.initiator.backing(number) if number is not None else None

    def volume_at(self, path: Path) -> str:
        """The volume that is mounted at a path, dead or alive; "" for none."""
        backing = self.backing(path)
        return backing.stem if backing is not None else ""

    def is_mounted(self, path: Path) -> bool:
        """Whether anything is mounted at a path."""
        return self.mounts.at(path) is not None

    def exists(self, path: Path) -> bool:
        """Whether there is anything at a path."""
        return path.exists()

    @property
    def reaches_snode(self) -> bool:
        """Whether the network to the SNODE works."""
        return self.initiator.connected

    def is_block(self, path: Path) -> bool:
        """Whether a device node is published at a path."""
        seen = self.mounts.at(path)
        return seen is not None and seen.fs_type == "devtmpfs"

    def volumes(self) -> set[str]:
        """The volumes that the kernel has a session for, or the node database a record."""
        return set(self.connector.left_over())

    def is_alive(self, major_minor: str) -> bool:
        """Whether the kernel has a disk of this number."""
        return self.initiator.number_of_disk(major_minor) is not None

    def size_of(self, device: Path) -> int:
        """The size of a disk that the kernel shows."""
        return int((self.initiator.sysfs / "block" / device.name / "size").read_text()) * 512

    def is_readonly(self, device: Path) -> bool:
        """Whether a disk that the kernel shows takes no writes."""
        return (self.initiator.sysfs / "block" / device.name / "ro").read_text().strip() == "1"

    def _number_at(self, path: Path) -> int | None:
        seen = self.mounts.at(path)
        return self.initiator.number_of_disk(seen.major_minor) if seen is not None else None

    def _find_disk(self, major_minor: str) -> FakeDisk | None:
        number = self.initiator.number_of_disk(major_minor)
        if number is None:
            return None
        disk = self.initiator.sessions[number].disks[0]
        folder = disk.unit / "block" / disk.name
        path = self.initiator.backing(number)
        assert path is not None
        return FakeDisk(
            key=str(path),
            major_minor=major_minor,
            size_bytes=int((folder / "size").read_text()) * 512,
            readable=self.initiator.alive(number) and path.exists(),
            readonly=(folder / "ro").read_text().strip() == "1",
        )

    def _programs(self) -> dict[str, Program]:
        both = {**self.initiator.runner.programs, **self.mounts.programs}
        return {name: self._guarded(name, program) for name, program in both.items()}

    def _guarded(self, name: str, program: Program) -> Program:
        def run(argv: Sequence[str], input: str | None) -> Reply:
            self.steps(f"{name}:runs")
            with self._tgtd.guard:
                self.initiator.look()
                return self.mounts.answer(program, argv, input)

        return run
