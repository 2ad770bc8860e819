"""mount, the helpers that look and unmount, mkfs and their kin on a mount table of their own: no kernel, no processes.

Disks are told by a function (or registered with `add_disk`), so that the fake of a connector can say which devices
exist. What is on a disk is kept by the disk's key, not its path: a volume that is attached again elsewhere still has
its filesystem. Faults are injected by FakeRunner.fail.

    fake = FakeMounts(folder)
    runner = FakeRunner(fake.programs)
    mounts = Mounts(runner, table=fake.table, number_of=fake.number_of)
    filesystems = Filesystems(runner)
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi.fs.flags import FS_TYPES
from tests.fakes.runner import Program, Reply

_OK: Reply = (0, "", "")
_MKFS = {
    "mkfs.ext4": ["-q", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=0"],
    "mkfs.xfs": ["-q", "-K"],
    "mkfs.btrfs": ["--quiet", "--nodiscard"],
}
_FLAGS = ["--no-canonicalize", "--no-mtab", "--internal-only"]
_BLOCK = 4096


@dataclass
class FakeDisk:
    """A device as it is attached now. key: names what is on it, wherever it is attached."""

    key: str
    major_minor: str
    size_bytes: int
    readable: bool = True
    readonly: bool = False


@dataclass
class Contents:
    """What is on a disk, by its key."""

    signature: str = ""  # as csi.signature.probe says it
    fs_bytes: int = 0
    fsck_code: int = 0  # what e2fsck -p will end with


@dataclass
class _Line:
    mount_id: int
    parent_id: int
    number: str
    root: str
    point: str
    options: set[str]
    fs_type: str
    source: str
    super_options: set[str] = field(default_factory=lambda: {"rw"})

    def text(self) -> str:
        words = [_escape(self.root), _escape(self.point), ",".join(sorted(self.options))]
        rest = [self.fs_type, _escape(self.source), ",".join(sorted(self.super_options))]
        return f"{self.mount_id} {self.parent_id} {self.number} {' '.join(words)} - {' '.join(rest)}\n"


class FakeMounts:
    """State and programs. `busy`: mount points that can't be unmounted. `astray`: where the next mount lands.

    `unfinished`: keys of disks where a mkfs.xfs was killed.
    """

    def __init__(self, folder: Path, *, find_disk: Callable[[Path], FakeDisk | None] | None = None) -> None:
        self.table = folder / "mountinfo"
        self.contents: dict[str, Contents] = {}
        self.busy: set[Path] = set()
        self.astray: Path | None = None
        self.unfinished: set[str] = set()
        self._disks: dict[Path, FakeDisk] = {}
        self._find_disk = find_disk or self._disks.get
        self._next_id = 100
        self._lines: list[_Line] = []
        self.reboot()

    @property
    def programs(self) -> Mapping[str, Program]:
        """For FakeRunner."""
        named: dict[str, Program] = {
            "mount": self._mount,
            "unmount_helper": self._unmount,
            "look_helper": self._look,
            "e2fsck": self._e2fsck,
            "resize2fs": self._resize2fs,
            "xfs_growfs": self._xfs_growfs,
            "btrfs": self._btrfs,
            "wipefs": self._wipefs,
        }
        return {**named, **dict.fromkeys(_MKFS, self._mkfs)}

    def add_disk(self, path: Path, size_bytes: int, *, key: str = "") -> FakeDisk:
        """Attach a disk at this path; a new key is a blank one."""
        disk = FakeDisk(key or str(path), f"8:{16 * len(self._disks)}", size_bytes)
        self._disks[path] = disk
        return disk

    def number_of(self, path: Path) -> str | None:
        """For Mounts(number_of=…)."""
        disk = self._find_disk(path)
        return disk.major_minor if disk else None

    def on(self, key: str) -> Contents:
        """What is on the disk with this key."""
        return self.contents.setdefault(key, Contents())

    def mount_points(self) -> list[Path]:
        """Where something is mounted that was not so after the boot."""
        return [Path(line.point) for line in self._lines[2:]]

    def reboot(self) -> None:
        """Everything is unmounted; what is on the disks stays."""
        self._lines = [
            _Line(1, 0, "254:0", "/", "/", {"rw"}, "ext4", "/dev/root"),
            _Line(2, 1, "0:6", "/", "/dev", {"rw", "nosuid"}, "devtmpfs", "devtmpfs"),
        ]
        self._write()

    def _mount(self, argv: Sequence[str], _input: str | None) -> Reply:
        assert list(argv[1:4]) == _FLAGS, argv
        options, flags = _options(argv[4:])
        target = _descriptor(options.pop("--target"))
        words = options.pop("--options")
        if words == "bind":
            assert not flags, argv
            return self._bind(_descriptor(options.pop("--source")), target, options)
        if words.startswith("remount,bind,"):
            assert options.pop("--source") == "none" and not options and not flags, argv
            return self._remount(target, set(words.split(",")[2:]))
        return self._mount_device(Path(options.pop("--source")), target, options.pop("--types"), words, flags)

    def _mount_device(self, device: Path, target: Path, fs_type: str, words: str, flags: set[str]) -> Reply:
        disk = self._find_disk(device)
        readonly = "ro" in words.split(",")
        assert flags == {"--read-only" if readonly else "--read-write"}, flags
        if disk is None:
            return _failed(f"special device {device} does not exist.")
        if not disk.readable:
            return _failed(f"can't read superblock on {device}.")
        if not target.is_dir():
            return _failed("mount point is not a directory.")
        if self.on(disk.key).signature != fs_type:
            return _failed(f"wrong fs type, bad option, bad superblock on {device}")
        if disk.readonly and not readonly:
            return _failed(f"cannot mount {device} read-write, is write-protected.")
        options = {word for word in re.sub(r'"[^"]*"', "", words).split(",") if "=" not in word} - {"nouuid"}
        self._add(_Line(0, 0, disk.major_minor, "/", str(target), options, fs_type, str(device)))
        return _OK

    def _bind(self, source: Path, target: Path, options: dict[str, str]) -> Reply:
        assert not options, options
        if (self.number_of(source) is None) != target.is_dir():
            return _failed("mount(2) system call failed: Not a directory.")
        below = self._holder(source)
        inside = source.relative_to(below.point).as_posix()
        root = below.root if inside == "." else f"{below.root.rstrip('/')}/{inside}"
        line = _Line(0, 0, below.number, root, str(target), set(below.options), below.fs_type, below.source)
        line.super_options = below.super_options
        self._add(line)
        return _OK

    def _remount(self, target: Path, options: set[str]) -> Reply:
        top = self._holder(target)
        if top.point != str(target):
            return _failed("mount point not mounted or bad option.")
        top.options = options
        self._write()
        return _OK

    def _unmount(self, argv: Sequence[str], _input: str | None) -> Reply:
        folder, name = argv[4].rsplit("/", 1)
        path = _descriptor(folder) / name
        top = self._holder(path)
        if top.point != str(path):
            return 22, "", "umount2: Invalid argument"
        if path in self.busy or any(line.parent_id == top.mount_id for line in self._lines):
            return 16, "", "umount2: Device or resource busy"
        self._lines.remove(top)
        self._write()
        return _OK

    def _mkfs(self, argv: Sequence[str], _input: str | None) -> Reply:
        options = _MKFS[argv[0]]
        assert list(argv[1 : 1 + len(options)]) == options and argv[-2] == "--", argv
        assert len(argv) == len(options) + 3, argv
        disk = self._find_disk(Path(argv[-1]))
        if disk is None or not disk.readable:
            return 1, "", f"{argv[-1]}: No such file or directory, or Input/output error"
        contents = self.on(disk.key)
        if disk.readonly:
            return 1, "", f"{argv[-1]}: Operation not permitted while setting up superblock"
        if contents.signature:
            return 1, "", f"{argv[-1]} contains a {contents.signature} file system. Proceed anyway? (y,N)"
        if disk.key in self.unfinished:
            return 1, "", f"{argv[-1]} appears to contain an existing filesystem (xfs)."
        contents.signature, contents.fs_bytes = argv[0].removeprefix("mkfs."), disk.size_bytes
        return _OK

    def _look(self, argv: Sequence[str], _input: str | None) -> Reply:
        device = argv[4]
        disk = self._find_disk(Path(device))
        if disk is None:
            return 1, "", f"{device}: can't be opened (No such file or directory); is it still attached?"
        if not disk.readable:
            return 1, "", f"{device}: can't be read at byte 0 (Input/output error); see the kernel log"
        contents = self.on(disk.key)
        known = contents.signature in FS_TYPES
        facts = {
            "size_bytes": disk.size_bytes,
            "signature": contents.signature,
            "fs_bytes": contents.fs_bytes if known else 0,
            "fs_block_bytes": _BLOCK if known else 0,
            "unfinished": int(disk.key in self.unfinished),
        }
        return 0, "".join(f"{name}={value}\n" for name, value in facts.items()), ""

    def _wipefs(self, argv: Sequence[str], _input: str | None) -> Reply:
        assert list(argv[1:-1]) == ["--all", "--types=xfs", "--"], argv
        disk = self._find_disk(Path(argv[-1]))
        if disk is None or not disk.readable:
            return 1, "", f"wipefs: error: {argv[-1]}: probing initialization failed"
        self.unfinished.discard(disk.key)
        return _OK

    def _e2fsck(self, argv: Sequence[str], _input: str | None) -> Reply:
        assert list(argv[1:-1]) in (["-p", "--"], ["-f", "-p", "--"]), argv
        disk = self._find_disk(Path(argv[-1]))
        if disk is None or not disk.readable:
            return 8, "", f"e2fsck: No such file or directory while trying to open {argv[-1]}"
        if any(line.number == disk.major_minor for line in self._lines):
            return 8, "", f"{argv[-1]} is mounted.\ne2fsck: Cannot continue, aborting."
        contents = self.on(disk.key)
        code, contents.fsck_code = contents.fsck_code, contents.fsck_code & ~3
        return code, f"{argv[-1]}: clean" if not code else "", ""

    def _resize2fs(self, argv: Sequence[str], _input: str | None) -> Reply:
        assert argv[1] == "--" and len(argv) == 3, argv
        disk = self._find_disk(Path(argv[2]))
        if disk is None or self.on(disk.key).signature != "ext4":
            return 1, "", "resize2fs: Bad magic number in super-block\nCouldn't find valid filesystem superblock."
        self.on(disk.key).fs_bytes = disk.size_bytes
        return _OK

    def _xfs_growfs(self, argv: Sequence[str], _input: str | None) -> Reply:
        assert list(argv[1:3]) == ["-d", "--"] and len(argv) == 4, argv
        return self._grow_mounted(Path(argv[3]), "xfs")

    def _btrfs(self, argv: Sequence[str], _input: str | None) -> Reply:
        assert list(argv[1:4]) == ["filesystem", "resize", "max"] and len(argv) == 5, argv
        return self._grow_mounted(Path(argv[4]), "btrfs")

    def _grow_mounted(self, path: Path, fs_type: str) -> Reply:
        top = self._holder(path)
        disk = self._find_disk(Path(top.source))
        if top.point != str(path) or top.fs_type != fs_type or disk is None:
            return 1, "", f"{path} is not a mounted {fs_type} filesystem"
        self.on(disk.key).fs_bytes = disk.size_bytes
        return _OK

    def _holder(self, path: Path) -> _Line:
        """The topmost mount that `path` lies in."""
        found = [line for line in self._lines if Path(line.point) in (path, *path.parents)]
        return max(found, key=lambda line: (len(Path(line.point).parts), line.mount_id))

    def _add(self, line: _Line) -> None:
        if self.astray is not None:
            line.point, self.astray = str(self.astray), None
        line.parent_id, line.mount_id = self._holder(Path(line.point)).mount_id, self._next_id
        self._next_id += 1
        self._lines.append(line)
        self._write()

    def _write(self) -> None:
        temporary = self.table.with_suffix(".new")
        temporary.write_bytes(os.fsencode("".join(line.text() for line in self._lines)))
        temporary.replace(self.table)


def _options(words: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    flags = {word for word in words if "=" not in word}
    assert all(word.startswith("--") for word in words), words
    return options, flags


def _descriptor(text: str) -> Path:
    match = re.fullmatch(r"/proc/self/fd/\d+", text)
    assert match, text
    return Path(text).readlink()


def _failed(words: str) -> Reply:
    return 32, "", f"mount: {words}"


def _escape(text: str) -> str:
    return re.sub(r"[\\ \t\n#]", lambda match: f"\\{ord(match[0]):03o}", text)
