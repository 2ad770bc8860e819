"""The mounts and filesystems of a node whose disks are those of its initiator; what is on them is in the backing files.

A raw block volume that is published shows as a device node at its target, since the driver looks there.
"""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.mounts import Contents, FakeDisk, FakeMounts
from tests.fakes.runner import Program, Reply
from tests.model.images import Image

#: What the programs end with on a disk that does not answer. The rest works on paths and mount tables.
_DEAD: dict[str, Reply] = {
    "e2fsck": (8, "", "e2fsck: Input/output error while trying to open the device"),
    "resize2fs": (1, "", "resize2fs: Input/output error while trying to open the device"),
    "xfs_growfs": (1, "", "xfs_growfs: XFS_IOC_FSGROWFSDATA xfsctl failed: Input/output error"),
    "btrfs": (1, "", "ERROR: unable to resize: Input/output error"),
    "mkfs.ext4": (1, "", "mkfs.ext4: Input/output error while writing superblock"),
    "mkfs.xfs": (1, "", "mkfs.xfs: pwrite failed: Input/output error"),
    "mkfs.btrfs": (1, "", "ERROR: failed to write superblock: Input/output error"),
}


@dataclass(frozen=True)
class Seen:
    """The topmost mount at a path: which disk, and whether it may be written through it."""

    major_minor: str
    fs_type: str
    readonly: bool


class NodeMounts(FakeMounts):
    """`formatted_over`: files with records on which a filesystem was made."""

    def __init__(self, folder: Path, *, dev: Path, find_disk: Callable[[str], FakeDisk | None]) -> None:
        """dev: where the device nodes are. find_disk: by its number."""
        self._dev = dev
        self._by_number = find_disk
        self._nodes: set[Path] = set()
        self.formatted_over: list[str] = []
        super().__init__(folder, find_disk=self._disk_at)

    def answer(self, program: Program, argv: Sequence[str], input: str | None) -> Reply:
        """Run a program of ours, unless its disk is dead."""
        name = argv[0]
        disk = self._disk_of_call(argv)
        if name in _DEAD and (disk is None or not disk.readable):
            return _DEAD[name]
        return program(argv, input)

    def on(self, key: str) -> Contents:
        return Image(Path(key))

    def at(self, path: Path) -> Seen | None:
        """What is mounted at a path."""
        lines = [line for line in self._lines if line.point == str(path)]
        if not lines:
            return None
        top = lines[-1]
        number = _number(path) if top.fs_type == "devtmpfs" else top.number
        readonly = "ro" in top.options | top.super_options
        return Seen(number or "", top.fs_type, readonly)

    def numbers(self) -> frozenset[str]:
        """The numbers of all disks that are mounted, or bound as a node."""
        return frozenset(seen.major_minor for point in self.mount_points() if (seen := self.at(point)))

    def reboot(self) -> None:
        super().reboot()
        self._lines[1].point = str(self._dev)
        self._write()
        self._hide_nodes()

    def _disk_at(self, path: Path) -> FakeDisk | None:
        number = _number(path)
        return self._by_number(number) if number else None

    def _disk_of_call(self, argv: Sequence[str]) -> FakeDisk | None:
        operand = argv[-1]
        if argv[0] in ("xfs_growfs", "btrfs"):
            seen = self.at(Path(operand))
            return self._by_number(seen.major_minor) if seen else None
        return self._disk_at(Path(operand))

    def _bind(self, source: Path, target: Path, options: dict[str, str]) -> Reply:
        number = _number(source)
        reply = super()._bind(source, target, options)
        if reply[0] == 0 and number:
            target.unlink()
            os.mknod(target, stat.S_IFBLK | 0o600, os.makedev(*map(int, number.split(":"))))
            self._nodes.add(target)
        return reply

    def _unmount(self, argv: Sequence[str], input: str | None) -> Reply:
        reply = super()._unmount(argv, input)
        self._hide_nodes()
        return reply

    def _hide_nodes(self) -> None:
        for path in self._nodes - set(self.mount_points()):
            path.unlink()
            path.touch(0o600)
            self._nodes.remove(path)

    def _mkfs(self, argv: Sequence[str], input: str | None) -> Reply:
        disk = self._disk_at(Path(argv[-1]))
        records = Image(Path(disk.key)).records if disk else []
        reply = super()._mkfs(argv, input)
        if reply[0] == 0 and records:
            self.formatted_over += records
        return reply


def _number(path: Path) -> str:
    """MAJOR:MINOR of a device node; "" for anything else."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if stat.S_ISBLK(found.st_mode) else ""
