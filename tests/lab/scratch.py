"""A lab's folder on the host, and the end of everything that belongs to it, however its owner ended.

Each lab has a folder `lab-…` below one base folder. Its owner holds a lock on it, which the kernel drops when the owner
dies, of whatever. Every process of a lab has the folder's path in its environment, children and all, so that it can be
found without a list that might be out of date.

Two things clean up after a dead owner: a keeper, this file run as a program, which waits for the owner's end and then
sweeps the folder at once; and the next lab, which sweeps what dead owners and dead keepers left. Stdlib only.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "SNODE_LAB"


def base_folder() -> Path:
    """Where labs live: $SNODE_LAB_DIR, else /var/tmp/snode-lab. Not /tmp, which guests do not see and tmpfs may be."""
    base = Path(os.environ.get("SNODE_LAB_DIR") or "/var/tmp/snode-lab").absolute()
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    # Anybody may make folders in /var/tmp; a stranger's would let them swap our files.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{base} is not a folder of ours alone")
    return base


class Scratch:
    """The folder of one living lab, and its keeper."""

    def __init__(self, base: Path | None = None) -> None:
        base = base or base_folder()
        with _locked(base / ".lock"):  # or a sweep could take the new folder for one without an owner
            sweep_all(base)
            self.folder = Path(tempfile.mkdtemp(prefix="lab-", dir=base))
            self._lock = _try_lock(self.folder)
        (self.folder / "share").mkdir()
        (self.folder / "logs").mkdir()
        self._keeper = subprocess.Popen(
            [sys.executable, "-IS", os.fspath(Path(__file__).resolve()), os.fspath(self.folder)],
            stdin=subprocess.PIPE, start_new_session=True, env={"PATH": os.environ.get("PATH", "")},
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Environment for every process of this lab; TMPDIR is left out, since a guest's memory would go there."""
        kept = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
        return kept | {MARK: os.fspath(self.folder)}

    def close(self) -> None:
        """Ends what still runs and removes the folder: done by the keeper, so that its way is the one always taken."""
        if self._lock is not None:
            assert self._keeper.stdin
            self._keeper.stdin.close()
            self._keeper.wait(30)
            os.close(self._lock)
            self._lock = None


def sweep_all(base: Path) -> list[Path]:
    """Sweeps the labs in `base` whose owners are dead; returns their folders."""
    swept = []
    for folder in sorted(base.glob("lab-*")):
        lock = _try_lock(folder)
        if lock is not None:
            sweep(folder)
            os.close(lock)
            swept.append(folder)
    return swept


def sweep(folder: Path) -> None:
    """Kills every process of the lab in `folder` and removes it."""
    for _ in range(100):
        found = sessions(folder)
        if not found:
            break
        for leader in found:
            kill_session(folder, leader)
    shutil.rmtree(folder, ignore_errors=True)


def sessions(folder: Path) -> set[int]:
    """The sessions of a lab: those of every process that has the lab's mark in its environment."""
    found = {session for pid in _all_pids() if marked(folder, pid) and (session := session_of(pid)) is not None}
    return found - {os.getsid(0)}  # never ours, should a caller be marked itself


def processes(folder: Path) -> list[int]:
    """Every process of a lab. Those that run a guest's programs have no environment: their session tells."""
    found = sessions(folder)
    return sorted(pid for pid in _all_pids() if session_of(pid) in found)


def marked(folder: Path, pid: int) -> bool:
    """Whether a process has the mark of the lab in `folder`."""
    mark = b"%s=%s" % (MARK.encode(), os.fsencode(folder))
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def session_of(pid: int) -> int | None:
    """Session of a process; None if it is gone or a zombie, which only its parent can end."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:4]
    except OSError:
        return None
    return None if state in "ZX" else int(session)


def kill_session(folder: Path, leader: int) -> list[int]:
    """Kills every process of a session that a guest or a program of the lab is; returns their ids.

    The order matters: with kernels before 7 the death of the guest's kernel alone sets the guest's processes free to
    run on, natively, on the host. So the kernel is stopped first and killed last.
    """
    if session_of(leader) is not None and not marked(folder, leader):
        return []  # somebody else's by now: the kernel gives a number away again once its session is empty
    killed: set[int] = set()
    _kill(leader, signal.SIGSTOP)
    while alive := {pid for pid in _all_pids() if session_of(pid) == leader}:
        for pid in alive - {leader} or alive:
            _kill(pid, signal.SIGKILL)
        killed |= alive
        time.sleep(0.002)
    return sorted(killed)


def _all_pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _try_lock(folder: Path) -> int | None:
    """The owner's lock of a lab's folder, None if its owner lives or it has just gone."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()  # ends when the owner is gone, of whatever
    sweep(Path(sys.argv[1]))
