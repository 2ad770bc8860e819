"""A folder of a test for as long as the test lives: what a killed one left is swept by the next.

Its owner holds a lock on it, which the kernel drops when the owner ends, of whatever. A folder without an owner goes,
with the mounts and loop devices in it. The lab has processes to end as well, and so its own: tests/lab/scratch.py.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.leftovers import all_below, loops_below, mounts_below

#: No other program's folders begin so, and none that has no lock.
_PREFIX = "snode-test-"
#: On a disk: a loop device needs one for direct I/O, a lab's guest to see it.
ON_DISK = Path("/var/tmp")


def in_memory() -> Path:
    """Where many small files are fast, and nothing is lost by a power cut that anybody would miss."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


@contextmanager
def scratch_folder(kind: str, *, base: Path | None = None) -> Iterator[Path]:
    """A new folder below `base`, else in the usual place for temporary files; it is removed at the end of the block."""
    base = base or Path(tempfile.gettempdir())
    _sweep_once(base)
    folder, lock = _make(kind, base)
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def sweep(base: Path) -> list[Path]:
    """Remove the folders below `base` whose owners are dead; returns them. One that is still in use stays."""
    swept = []
    for folder in sorted(base.glob(f"{_PREFIX}*")):
        lock = _try_lock(folder)
        if lock is None:
            continue
        try:
            empty(folder)
            if not all_below(folder):
                shutil.rmtree(folder)
                swept.append(folder)
        finally:
            os.close(lock)
    return swept


@cache
def _sweep_once(base: Path) -> None:
    """Once in a process: a test makes thousands of folders."""
    sweep(base)


def _make(kind: str, base: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", dir=base))
        lock = _try_lock(folder)
        if lock is not None:
            return folder, lock
        # Another process swept it before it had an owner.


def _try_lock(folder: Path) -> int | None:
    """The owner's lock of a folder of ours; None if its owner lives, or it is gone, or somebody else's."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.fstat(lock)
        if held.st_uid == os.geteuid() and os.path.samestat(held, folder.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def empty(folder: Path) -> None:
    """Take away what is mounted and attached there."""
    for point in reversed(mounts_below(folder)):
        subprocess.run(["umount", point], check=False, capture_output=True)
    for loop in loops_below(folder):
        subprocess.run(["losetup", "--detach", f"/dev/{loop}"], check=False, capture_output=True)
