"""A program, not a module: says what stands on the block device that is its only argument.

It runs as a process of its own because a read of a device that hangs holds its process for as long, and a thread that
does would keep the service from ending. It changes nothing.

Lines on stdout, `name=value`: size_bytes, signature (as csi.signature.probe says it), fs_bytes and fs_block_bytes (0
where the superblock does not tell), unfinished (1 for an XFS whose mkfs was killed). In any doubt it ends with 1 and
the reason on stderr, never with "nothing there".
"""

import errno
import mmap
import os
import stat
import struct
import sys

# Started without site-packages, so that it starts fast: what it needs is in this package and the standard library.
sys.path.append(__file__.rsplit("/", 3)[0])

from csi.errors import DriverError, Unavailable
from csi.signature import BLOCK_BYTES, END_BYTES, check_length, is_unfinished, places, probe, unreadable

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_LEAST_BYTES = 4096
_PIECE_BYTES = 128 << 10  # more memory than this takes longer to get than to read into


class Direct:
    """A device that is read past the page cache, which answers for a dead one too. `close` it."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self._buffer = memoryview(mmap.mmap(-1, _PIECE_BYTES))  # aligned to a page, as O_DIRECT demands
        try:
            self._fd = os.open(path, _FLAGS | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = self._open_cached()

    def check(self, *, end_bytes: int = END_BYTES) -> None:
        """Read start, middle and end. Raises Unavailable when one can't be read."""
        for begin, length in places(self._size_bytes, end_bytes=end_bytes):
            for offset in range(begin, begin + length, _PIECE_BYTES):
                self._check_piece(offset, min(_PIECE_BYTES, begin + length - offset))

    def close(self) -> None:
        """Close the device."""
        os.close(self._fd)

    def _check_piece(self, offset: int, length: int) -> None:
        try:
            done = self._read(length, offset)
        except OSError as error:
            raise unreadable(self._path, offset, error) from error
        check_length(self._path, offset, length, done)

    def _read(self, length: int, offset: int) -> int:
        try:
            return os.preadv(self._fd, [self._buffer[:length]], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        direct, self._fd = self._fd, self._open_cached()
        os.close(direct)
        return os.preadv(self._fd, [self._buffer[:length]], offset)

    def _open_cached(self) -> int:
        """For a driver that does not do O_DIRECT. What the page cache holds is given up: the device has to answer."""
        fd = os.open(self._path, _FLAGS)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return fd


def look(path: str) -> dict[str, str | int]:
    """The facts about the device at `path`. Raises Unavailable or OSError when they can't be had."""
    try:
        fd = os.open(path, _FLAGS)
    except OSError as error:
        raise Unavailable(f"{path}: can't be opened ({error.strerror}); is it still attached?") from error
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise Unavailable(f"{path}: is not a block device; is the volume still attached?")
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes < _LEAST_BYTES:
            raise Unavailable(f"{path}: has a size of {size_bytes} bytes; it is not attached any more, or not yet")
        direct = Direct(path, size_bytes)
        try:
            direct.check(end_bytes=BLOCK_BYTES)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that libblkid reads the device, not the page cache
            facts = _see(fd, path)
            # It may have been dead in between: only one that answers afterwards too counts. And all of its ends must be
            # readable before "nothing" is believed.
            is_data = facts["signature"] and not facts["unfinished"]
            direct.check(end_bytes=BLOCK_BYTES if is_data else END_BYTES)
        finally:
            direct.close()
    finally:
        os.close(fd)
    return {"size_bytes": size_bytes, **facts}


def _see(fd: int, path: str) -> dict[str, str | int]:
    signature = probe(fd, path)
    fs_bytes, block_bytes = _size_of(signature, fd)
    return {
        "signature": signature,
        "fs_bytes": fs_bytes,
        "fs_block_bytes": block_bytes,
        "unfinished": int(is_unfinished(signature, fd, path)),
    }


def _size_of(fs_type: str, fd: int) -> tuple[int, int]:
    """Size of the filesystem and of one of its blocks, in bytes. A journal that is not replayed may know of more."""
    if fs_type == "ext4":
        block = os.pread(fd, 1024, 1024)
        (low,), (shift,), (features,), (high,) = (struct.unpack_from("<I", block, at) for at in (4, 24, 96, 336))
        block_bytes = 1024 << min(shift, 16)
        return (low + (high << 32 if features & 0x80 else 0)) * block_bytes, block_bytes  # 0x80: INCOMPAT_64BIT
    if fs_type == "xfs":
        block_bytes, blocks = struct.unpack_from(">IQ", os.pread(fd, 16, 0), 4)
        return blocks * block_bytes, block_bytes
    if fs_type == "btrfs":
        fs_bytes, _, _, devices, sector_bytes = struct.unpack_from("<QQQQI", os.pread(fd, 256, 65536), 112)
        return (fs_bytes, sector_bytes) if devices == 1 else (0, 0)
    return 0, 0


def main(path: str) -> int:
    """Print the facts; returns what the program ends with."""
    try:
        facts = look(path)
    except OSError as error:
        sys.stderr.write(f"{path}: can't be read ({error.strerror})\n")
        return 1
    except DriverError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("".join(f"{name}={value}\n" for name, value in facts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
