"""Overwriting data with zeros, in the process, in bounded steps."""

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from csi.errors import DataLoss, InUse, Unavailable
from csi.run import Boundary, no_boundary, step

_BLKZEROOUT = 0x127F  # _IO(0x12, 127), range of two 64-bit numbers; never leaves old data, unlike a discard
_STEP_BYTES = 8 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 4096

#: What is zeroed at each end to remove every signature that libblkid knows (the largest distance is ZFS's 512 KiB,
#: btrfs's copies further in are not looked at by anybody without the first).
END_BYTES = 4 << 20


def wipe_step(path: Path, *, start: int, size_bytes: int, seconds: float, boundary: Boundary = no_boundary) -> int:
    """Zero `path` from byte `start` on, for about `seconds`; returns the offset up to which zeros are on the disk.

    The device is held exclusively, so that a mounted or claimed one is refused. Raises InUse, Unavailable.
    """
    fd = _open(path)
    try:
        end = time.monotonic() + seconds
        offset = start
        while offset < size_bytes:
            length = min(_STEP_BYTES, size_bytes - offset)
            with step(boundary, "zero"):
                _zero(fd, offset, length, path)
            offset += length
            if time.monotonic() >= end:
                break
        with step(boundary, "zero-sync"):
            os.fdatasync(fd)
        return offset
    except OSError as error:
        raise Unavailable(f"{path}: can't be zeroed ({error.strerror}); see the kernel log") from error
    finally:
        os.close(fd)


def check_zero(path: Path, *, size_bytes: int) -> None:
    """Read samples over the whole of `path` back. Raises DataLoss when one is not zero, Unavailable when unreadable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The kernel dropped the cached pages when it zeroed the device; for a file this makes the read honest.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        last = max(0, size_bytes - _SAMPLE_BYTES)
        for number in range(_SAMPLES):
            offset = last * number // (_SAMPLES - 1)
            data = os.pread(fd, min(_SAMPLE_BYTES, size_bytes), offset)
            if data.strip(b"\0"):
                raise DataLoss(f"{path}: byte range at {offset} is not zero after it was zeroed; is the disk sound?")
    except OSError as error:
        raise Unavailable(f"{path}: can't be read back ({error.strerror}); see the kernel log") from error
    finally:
        os.close(fd)


def zero_ends(path: Path, *, size_bytes: int, boundary: Boundary = no_boundary) -> None:
    """Zero the first and last 4 MiB, where signatures are. Only for volumes that nobody ever saw."""
    length = min(END_BYTES, size_bytes)
    for start in (0, size_bytes - length):
        wipe_step(path, start=start, size_bytes=start + length, seconds=60.0, boundary=boundary)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUse(f"{path}: mounted or held by another device here; it can't be zeroed") from error
        raise Unavailable(f"{path}: can't be opened to zero it ({error.strerror})") from error


def _zero(fd: int, offset: int, length: int, path: Path) -> None:
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
        return
    _write_zeros(lambda data, at: os.pwrite(fd, data, at), offset, length, path)


def _write_zeros(write: Callable[[bytes, int], int], offset: int, length: int, path: Path) -> None:
    zeros = bytes(min(length, 1 << 20))
    end = offset + length
    while offset < end:
        done = write(zeros[: end - offset], offset)
        if done <= 0:
            raise Unavailable(f"{path}: the write at byte {offset} came to nothing")
        offset += done
