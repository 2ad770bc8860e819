"""Who may touch what, when.

Order: a volume's lock first, then a resource (pool, tgtd, portal); two volumes in sorted order. A volume's lock is not
waited for: CSI lets the caller repeat (ABORTED, "operation pending for volume"). Resource locks are short and waited
for within the deadline.
"""

import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import Busy, Timeout, Unavailable

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
_FLOCK = "hhqqi4x"
_LOOK_SECONDS = 5.0


class VolumeLocks:
    """One try-lock for each volume id, against threads of this process and against other processes.

    Other processes (the command line beside the service) are kept out by an open file description lock on one byte of
    one file, at a position derived from the id: nothing to clean up, and gone with the process that held it.
    """

    def __init__(self, path: Path) -> None:
        """path: the lock file; its folder must exist."""
        self._path = path
        self._held: dict[str, bool] = {}  # volume id -> held by the background
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, volume_id: str, *, background: bool = False) -> Iterator[None]:
        """Hold the lock of a volume, or raise Busy at once; Unavailable when the state folder takes no lock.

        background: it is held for a short look between requests. A request waits for that, since its caller can't know
        of the look and would take Busy for a request of its own.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._held.get(volume_id, False), timeout=_LOOK_SECONDS)
            if volume_id in self._held:
                raise Busy(f"volume {volume_id}: another request for it is under way; repeat later")
            self._held[volume_id] = background
        try:
            fd = self._open()
            try:
                _set_lock(fd, volume_id, fcntl.F_WRLCK)
                try:
                    yield
                finally:
                    # Closing is not enough: a child that another thread forks has a copy of the descriptor until exec.
                    _set_lock(fd, volume_id, fcntl.F_UNLCK)
            finally:
                os.close(fd)
        finally:
            with self._changed:
                del self._held[volume_id]
                self._changed.notify_all()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(
                f"{self._path}: can't be opened ({error.strerror}); see that its filesystem is there and writable, and "
                "repeat"
            ) from error


def _set_lock(fd: int, volume_id: str, kind: int) -> None:
    digest = hashlib.sha256(volume_id.encode()).digest()
    position = int.from_bytes(digest[:8], "big") >> 2
    request = struct.pack(_FLOCK, kind, os.SEEK_SET, position, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows EACCES for the same condition
        raise Busy(f"volume {volume_id}: another process works on it; repeat later") from error
    except OSError as error:
        raise Unavailable(f"volume {volume_id}: can't be locked ({error.strerror}) in the state folder") from error


class ResourceLock:
    """A short lock that is waited for, at most until the deadline."""

    def __init__(self, name: str) -> None:
        """name: what a message calls the resource, such as `pool fast`."""
        self._name = name
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, deadline: Deadline) -> Iterator[None]:
        """Hold the lock; raises Timeout when the deadline comes first."""
        if not self._lock.acquire(timeout=deadline.remaining()):
            raise Timeout(f"{self._name}: still busy with other requests; repeat later")
        try:
            yield
        finally:
            self._lock.release()


class Slots:
    """A bounded number of requests that may change something at once, so that Probe always finds a free worker."""

    def __init__(self, count: int) -> None:
        self._free = threading.BoundedSemaphore(count)
        self._count = count

    @contextmanager
    def take(self) -> Iterator[None]:
        """Take a slot without waiting; raises Unavailable when all are taken."""
        if not self._free.acquire(blocking=False):
            raise Unavailable(f"{self._count} requests are under way already; repeat later")
        try:
            yield
        finally:
            self._free.release()
