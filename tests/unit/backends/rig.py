"""An LVM backend over a fake LVM that outlives it."""

from pathlib import Path

from csi.backends.lvm import LvmBackend
from csi.backends.lvm_space import Space
from csi.backends.lvm_thick import Thick
from csi.deadline import Deadline
from csi.model import Volume, volume_id_of
from csi.run import Boundary, no_boundary
from tests.fakes.lvm import FakeLvm
from tests.fakes.runner import FakeRunner

MIB = 1 << 20


def soon(seconds: float = 20.0) -> Deadline:
    return Deadline.after(seconds)


class Rig:
    """`start` makes the backend anew from what is on disk, as after a kill of the driver."""

    def __init__(self, folder: Path, *, space: Space | None = None, disks: dict[str, int] | None = None) -> None:
        self.folder = folder
        self.lvm = FakeLvm(folder / "dev", disks=disks)
        self.nodes = self.lvm.nodes()
        self.runner = FakeRunner(self.lvm.programs)
        self.space = space or Thick()
        self.start()

    def start(
        self, *, space: Space | None = None, pool: str = "fast", boundary: Boundary = no_boundary, seconds: float = 5.0
    ) -> LvmBackend:
        self.backend = LvmBackend(
            pool,
            vg=self.lvm.vg,
            space=space or self.space,
            state=self.folder / "state" / pool,
            runner=self.runner,
            nodes=self.nodes,
            boundary=boundary,
            wipe_seconds=seconds,
        )
        return self.backend

    def create(
        self, name: str = "one", *, size_bytes: int = 4 * MIB, parameters: dict[str, str] | None = None
    ) -> Volume:
        """As CreateVolume does: look first."""
        volume_id = volume_id_of(name)
        found = self.backend.find(volume_id, soon())
        return found or self.backend.create(
            volume_id,
            name=name,
            size_bytes=self.backend.round_size(size_bytes),
            parameters=parameters if parameters is not None else {"pool": "fast"},
            deadline=soon(),
        )

    def delete(self, name: str = "one") -> None:
        """As DeleteVolume does."""
        volume = self.backend.find(volume_id_of(name), soon())
        if volume is not None:
            self.backend.delete(volume, soon())

    def settle(self) -> None:
        """Let the background come to its end."""
        for _ in range(20):
            self.backend.tend(soon())

    @property
    def thick_names(self) -> list[str]:
        return sorted(name for name, lv in self.lvm.lvs.items() if lv.kind != "thin-pool")

    def records(self) -> list[str]:
        """What is left in the state folder beside the group's identity."""
        state = self.folder / "state"
        return sorted(
            str(path.relative_to(state)) for path in state.rglob("*") if path.is_file() and path.name != "vg.json"
        )

    def stage_fs(self, volume: Volume) -> None:
        """What mkfs leaves: an ext4 superblock's magic number."""
        with volume.device.open("r+b") as file:
            file.seek(1024)
            file.write(EXT4)


#: The first 1 KiB of an ext4 superblock, enough for libblkid.
EXT4 = bytearray(1024)
EXT4[0:8] = (64).to_bytes(4, "little") + (1024).to_bytes(4, "little")
EXT4[0x38:0x3A] = b"\x53\xef"
EXT4[0x4C:0x50] = (1).to_bytes(4, "little")
EXT4[0x60:0x64] = (0x42).to_bytes(4, "little")
EXT4[0x68:0x78] = bytes(range(1, 17))
