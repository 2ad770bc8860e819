"""Real devices and mounts in a scratch folder; everything is taken away again, also after a failed test."""

import ctypes
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.fs.format import Filesystems
from csi.fs.mountinfo import read_table
from csi.fs.mounts import Mounts
from csi.model import MIB
from csi.run import SubprocessRunner

MakeDisk = Callable[[int], Path]
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LOOPS = Path("/sys/block")


def tool(*argv: str, input: bytes | None = None, ok: tuple[int, ...] = (0,)) -> str:
    """Run a tool for a test; a missing one or another exit code fails the test by its name."""
    done = subprocess.run(argv, input=input, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode in ok, f"{argv}: {done.returncode}: {done.stderr.decode()} {done.stdout.decode()}"
    return done.stdout.decode()


def backing_file(device: Path) -> Path:
    return Path((_LOOPS / device.name / "loop/backing_file").read_text().strip())


def grow_disk(device: Path, size_bytes: int) -> None:
    os.truncate(backing_file(device), size_bytes)
    tool("losetup", "--set-capacity", str(device))


def write(device: Path, offset: int, data: bytes) -> None:
    with device.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def device_bytes(device: Path) -> int:
    return int(tool("blockdev", "--getsize64", str(device)))


def fingerprint(device: Path) -> tuple[int, str]:
    """What any mkfs would change: how much of the sparse file is allocated, and what its first MiB holds."""
    tool("sync", "--file-system", str(backing_file(device)))
    with device.open("rb") as file:
        return backing_file(device).stat().st_blocks, hashlib.sha256(file.read(MIB)).hexdigest()


def make_fs(filesystems: Filesystems, device: Path, fs_type: str, deadline: Deadline) -> None:
    """Look, and make a filesystem on what was found blank."""
    filesystems.make(filesystems.look(device, deadline), fs_type=fs_type, deadline=deadline)


@contextmanager
def swapping(folder: Path, victim: Path) -> Iterator[None]:
    """A thread exchanges the folder for a link to `victim` and back, as fast as it can."""
    link = folder.with_name("swapped-link")
    link.symlink_to(victim)
    libc = ctypes.CDLL(None, use_errno=True)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            assert libc.renameat2(_AT_FDCWD, bytes(folder), _AT_FDCWD, bytes(link), _RENAME_EXCHANGE) == 0

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if folder.is_symlink():
            libc.renameat2(_AT_FDCWD, bytes(folder), _AT_FDCWD, bytes(link), _RENAME_EXCHANGE)
        link.unlink()


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(60)


@pytest.fixture
def runner() -> SubprocessRunner:
    return SubprocessRunner()


@pytest.fixture
def filesystems(runner: SubprocessRunner) -> Filesystems:
    return Filesystems(runner)


@pytest.fixture
def mounts(runner: SubprocessRunner) -> Mounts:
    return Mounts(runner)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder; whatever is mounted in it is unmounted at the end, topmost first."""
    yield tmp_path
    for mount in reversed(read_table(Path("/proc/self/mountinfo"))):
        if tmp_path in mount.mount_point.parents:
            tool("umount", str(mount.mount_point))


@pytest.fixture
def make_disk(scratch: Path) -> Iterator[MakeDisk]:
    """Makes loop devices of a size in MiB, on sparse files."""
    made: list[Path] = []

    def make(size_mib: int) -> Path:
        image = scratch / f"disk-{len(made)}.img"
        with image.open("wb") as file:
            file.truncate(size_mib * MIB)
        made.append(Path(tool("losetup", "--find", "--show", str(image)).strip()))
        return made[-1]

    yield make
    for mount in reversed(read_table(Path("/proc/self/mountinfo"))):
        if scratch in mount.mount_point.parents:
            tool("umount", str(mount.mount_point))
    for device in made:
        tool("blockdev", "--setrw", str(device))  # a device left read-only would be so for its next user
        tool("losetup", "--detach", str(device))
