"""What stands on a device or file (filesystem, RAID, LVM, partition table), without a process.

libblkid itself, by ctypes: the same code that blkid and wipefs use, but with an answer that tells "nothing there" from
"can't be read". `blkid` the program says both with one exit code, and live data has been reformatted because of it.

The SNODE looks in-process; the CNODE, whose devices may hang, has the same look in a child (csi/fs/look_helper.py). So
this module imports little: the child's start is a good part of its time.

A superblock that is damaged enough is not seen. So "nothing" alone permits nothing: what was seen once has to be
remembered (`mark_used`).
"""

import ctypes
import errno
import os
import stat

from csi.errors import Unavailable

_LIBRARY = "libblkid.so.1"

_SUBLKS_TYPE = 1 << 5
_SUBLKS_USAGE = 1 << 7
_SUBLKS_MAGIC = 1 << 9
_SUBLKS_BADCSUM = 1 << 10  # a damaged superblock is still a sign that somebody's data is here
_SUBLKS = _SUBLKS_TYPE | _SUBLKS_USAGE | _SUBLKS_MAGIC | _SUBLKS_BADCSUM
_PARTS_FORCE_GPT = 1 << 1  # a GPT counts without its protective MBR too
_PARTS_MAGIC = 1 << 3

_FOUND = 0
_NOTHING = 1
_AMBIVALENT = -2

#: libblkid passes over an XFS whose superblock has fields that make no sense. An ext4 or a btrfs in such a state it
#: sees.
_XFS_MAGIC = b"XFSB"
# The byte of an XFS superblock that is 1 while mkfs runs and 0 once it is done (sb_inprogress of xfs_dsb).
_XFS_IN_PROGRESS_OFFSET = 126

#: Bytes at each end that must be readable before "nothing" is believed. That many because libblkid 2.41 takes an
#: unreadable label of ZFS, which has 256 KiB, for none; where it reads for all else it reports an error.
END_BYTES = 1 << 20
#: Bytes to see whether a place answers; of an alignment that O_DIRECT takes.
BLOCK_BYTES = 4096
_PIECE_BYTES = 128 << 10  # more memory than this takes longer to get than to read into

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def look(path: os.PathLike[str]) -> str:
    """What stands on `path`: "" = surely nothing known; else words such as `ext4` or `a partition table (gpt)`.

    Raises Unavailable when it can't be read at the start, the middle or the end, or the library gives up: in doubt
    nobody may format. Reads through the page cache, in this process.
    """
    found, _ = _look(path)
    return found.removeprefix("?")


def glance(path: os.PathLike[str]) -> str:
    """What stands on `path`, as `look` says it, without reading all that must be readable before anybody may format.

    Raises Unavailable when what has to be read for that can't be.
    """
    fd = _open(path)
    try:
        return probe(fd, path).removeprefix("?")
    finally:
        os.close(fd)


def holds_data(path: os.PathLike[str]) -> bool:
    """Whether anybody may have data on `path`: anything that `look` finds, but for an XFS whose mkfs never ended.

    Raises Unavailable as `look` does.
    """
    found, unfinished = _look(path)
    return bool(found) and not unfinished


def is_unfinished(found: str, fd: int, path: os.PathLike[str] | str) -> bool:
    """Whether what `probe` has found is an XFS whose mkfs runs or was killed.

    mkfs.xfs writes its superblock first, marked so. No kernel mounts it, so no file ever was on it; taken for data, a
    volume whose node died meanwhile could never be used. mkfs of ext4 and btrfs write what is seen last.
    """
    return found == "xfs" and _read(fd, path, _XFS_IN_PROGRESS_OFFSET, 1) == b"\1"


def places(size_bytes: int, *, end_bytes: int = END_BYTES) -> list[tuple[int, int]]:
    """Offset and length of what has to be readable before a device counts as blank: its start, middle and end."""
    end = min(end_bytes, size_bytes)
    middle = size_bytes // 2 // BLOCK_BYTES * BLOCK_BYTES
    return [(0, end), (middle, min(BLOCK_BYTES, size_bytes - middle)), (size_bytes - end, end)]


def check_length(path: os.PathLike[str] | str, offset: int, length: int, done: int) -> None:
    """Raise Unavailable if a read got less than it should have."""
    if done != length:
        raise Unavailable(f"{path}: can't be read at byte {offset + done} (a short read); see the kernel log")


def probe(fd: int, path: os.PathLike[str] | str) -> str:
    """What stands on an open device or file; `path` is for messages.

    "" = neither of two searches found anything, and no read of theirs failed. A filesystem's name when nothing else
    stands there. "?" and a description for all else: partition table, LVM, RAID, LUKS, swap, several signatures at
    once, a damaged superblock. Raises Unavailable when that can't be told.
    """
    blkid = _library()
    with_values = blkid.blkid_new_probe()
    try:
        _set_up(blkid, with_values, fd, path)
        answer = blkid.blkid_do_safeprobe(with_values)
        if answer == _FOUND:
            return _describe(blkid, with_values)
    finally:
        blkid.blkid_free_probe(with_values)
    listed = _list(blkid, fd, path)
    if answer == _NOTHING:
        return f"?traces of {', '.join(listed)}" if listed else _by_magic(fd, path)
    # Version 2.38 answers -2 for several signatures at once, 2.41 answers -1; all else below 0 is an error.
    if answer == _AMBIVALENT or len(listed) > 1:
        return f"?signatures that contradict each other ({', '.join(listed) or 'libblkid lists none'})"
    raise Unavailable(f"{path}: libblkid can't tell what is there (answer {answer}); see the kernel log")


def _look(path: os.PathLike[str]) -> tuple[str, bool]:
    """What `probe` finds, and whether it is unfinished; only if start, middle and end can be read."""
    fd = _open(path)
    try:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes <= 0:
            raise Unavailable(f"{path}: has no size; is the device still there?")
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for begin, length in places(size_bytes):
            for offset in range(begin, begin + length, _PIECE_BYTES):
                piece = min(_PIECE_BYTES, begin + length - offset)
                check_length(path, offset, piece, _read_into(fd, path, offset, buffer[:piece]))
        found = probe(fd, path)
        return found, is_unfinished(found, fd, path)
    finally:
        os.close(fd)


def _open(path: os.PathLike[str]) -> int:
    try:
        try:
            return os.open(path, _OPEN | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        # A device name below /dev/VG is a link, made by udev.
        fd = os.open(path, _OPEN)
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            os.close(fd)
            raise Unavailable(f"{path}: is a link that does not lead to a block device; nothing is read through it")
        return fd
    except OSError as error:
        raise Unavailable(f"{path}: can't be opened to look at its content ({error.strerror})") from error


def _list(blkid: ctypes.CDLL, fd: int, path: os.PathLike[str] | str) -> list[str]:
    """Everything that is there, nothing weighed against another, as wipefs does."""
    probe = blkid.blkid_new_probe()
    found: dict[str, None] = {}
    try:
        _set_up(blkid, probe, fd, path)
        while (answer := blkid.blkid_do_probe(probe)) == _FOUND:
            found[_value(blkid, probe, b"TYPE") or f"a partition table ({_value(blkid, probe, b'PTTYPE')})"] = None
        if answer != _NOTHING:
            raise Unavailable(f"{path}: can't be read where a signature may be (answer {answer}); see the kernel log")
        return list(found)
    finally:
        blkid.blkid_free_probe(probe)


def _set_up(blkid: ctypes.CDLL, probe: int | None, fd: int, path: os.PathLike[str] | str) -> None:
    if not probe:
        raise Unavailable(f"{path}: libblkid is out of memory")
    steps = (
        blkid.blkid_probe_set_device(probe, fd, 0, 0),
        blkid.blkid_probe_enable_superblocks(probe, 1),
        blkid.blkid_probe_set_superblocks_flags(probe, _SUBLKS),
        blkid.blkid_probe_enable_partitions(probe, 1),
        blkid.blkid_probe_set_partitions_flags(probe, _PARTS_FORCE_GPT | _PARTS_MAGIC),
    )
    if any(steps):
        raise Unavailable(f"{path}: libblkid can't be set up ({steps})")


def _describe(blkid: ctypes.CDLL, probe: int) -> str:
    kind, table = _value(blkid, probe, b"TYPE"), _value(blkid, probe, b"PTTYPE")
    damaged = _value(blkid, probe, b"SBBADCSUM") == "1"
    if kind and not table and not damaged and _value(blkid, probe, b"USAGE") == "filesystem":
        return kind
    words = [f"{kind} with a damaged superblock" if damaged else kind] if kind else []
    if table:
        words.append(f"a partition table ({table})")
    return "?" + (" and ".join(words) or "a signature without a name")


def _by_magic(fd: int, path: os.PathLike[str] | str) -> str:
    begin = _read(fd, path, 0, len(_XFS_MAGIC))
    return "?xfs with a damaged superblock" if begin == _XFS_MAGIC else ""


def _read(fd: int, path: os.PathLike[str] | str, offset: int, length: int) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise unreadable(path, offset, error) from error


def _read_into(fd: int, path: os.PathLike[str] | str, offset: int, buffer: memoryview) -> int:
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as error:
        raise unreadable(path, offset, error) from error


def unreadable(path: os.PathLike[str] | str, offset: int, error: OSError) -> Unavailable:
    """The error for a read that failed."""
    return Unavailable(f"{path}: can't be read at byte {offset} ({error.strerror}); see the kernel log")


def _value(blkid: ctypes.CDLL, probe: int, name: bytes) -> str:
    data = ctypes.c_char_p()
    if blkid.blkid_probe_lookup_value(probe, name, ctypes.byref(data), None) != 0 or data.value is None:
        return ""
    return data.value.decode(errors="replace")


def _library() -> ctypes.CDLL:
    try:
        blkid = ctypes.CDLL(_LIBRARY)  # loaded once, by the loader's own count
    except OSError as error:
        raise Unavailable(f"{_LIBRARY}: not found; install the package libblkid1 (util-linux)") from error
    number, pointer = ctypes.c_int, ctypes.c_void_p
    blkid.blkid_new_probe.restype = pointer
    blkid.blkid_new_probe.argtypes = []
    blkid.blkid_free_probe.restype = None
    blkid.blkid_free_probe.argtypes = [pointer]
    blkid.blkid_probe_set_device.argtypes = [pointer, number, ctypes.c_int64, ctypes.c_int64]
    for name in ("enable_superblocks", "set_superblocks_flags", "enable_partitions", "set_partitions_flags"):
        function = getattr(blkid, f"blkid_probe_{name}")
        function.argtypes = [pointer, number]
    for name in ("do_probe", "do_safeprobe"):
        getattr(blkid, f"blkid_{name}").argtypes = [pointer]
    blkid.blkid_probe_lookup_value.argtypes = [pointer, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), pointer]
    return blkid
