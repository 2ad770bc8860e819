"""Unix sockets that one process serves, for root alone."""

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi.errors import Unavailable


def claim(path: Path) -> int:
    """Be the only server at this path: make its folder, lock `PATH.lock`, remove a dead server's socket.

    Returns the lock's descriptor; the claim lasts until it is closed. Raises Unavailable with the reason.
    """
    _prepare_folder(path.parent)
    fd = _own(path)
    try:
        _remove_stale(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _prepare_folder(folder: Path) -> None:
    """Make the socket's folder, for root alone; an existing one is used if nobody else may write there.

    A folder that was there before keeps its mode: it may be a shared one such as /run, or the orchestrator's.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise Unavailable(f"{folder}: can't make the folder of the socket: {error.strerror}") from error
    if status.st_uid not in (0, os.geteuid()):
        raise Unavailable(f"{folder}: belongs to another user, who could replace the socket; choose another folder")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise Unavailable(f"{folder}: others may write there and could replace the socket; chmod 0700 it")


def _own(path: Path) -> int:
    """Lock `<path>.lock` for our lifetime and return its descriptor. Raises Unavailable when another server has it.

    The file stays for ever: whoever removed it could lock a new one while the old is still held.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(f"{lock}: can't open the lock of the socket: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Unavailable(f"{path}: another driver (process {holder}) serves there; stop it first") from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed server left. The caller holds the lock."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise Unavailable(f"{path}: exists and is not a socket; move it away or choose another endpoint")
    if status.st_uid != os.geteuid():
        raise Unavailable(f"{path}: a socket of another user (uid {status.st_uid}); choose another endpoint")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise Unavailable(f"{path}: another program listens there; stop it first")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """The umask of the whole process for the time of a bind: called before other threads of ours make files."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
