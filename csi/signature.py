"""A look for signatures (filesystem, RAID, LVM, partition table) on a device or file, without a process.

libblkid itself, by ctypes: the same code that blkid and wipefs use, but with an answer that tells "nothing there" from
"can't be read". `blkid` the program says both with one exit code, and live data has been reformatted because of it.

A superblock that is damaged enough is not seen by it (XFS with wrong fields, for one). So "nothing" alone permits
nothing: what was seen once has to be remembered (`mark_used`).
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from csi.errors import Unavailable

_LIBRARY = "libblkid.so.1"

_SUBLKS_TYPE = 1 << 5
_SUBLKS_USAGE = 1 << 7
_SUBLKS_MAGIC = 1 << 9
_SUBLKS_BADCSUM = 1 << 10  # a damaged superblock is still a sign that somebody's data is here
_PARTS_FORCE_GPT = 1 << 1  # a GPT counts without its protective MBR too
_PARTS_MAGIC = 1 << 3

_FOUND = 0
_NOTHING = 1
_AMBIVALENT = -2

#: Bytes at each end, and in the middle, that must be readable before "nothing" is believed.
_SAMPLE_BYTES = 1 << 20


def look(path: Path) -> str:
    """What stands on `path`: "" = surely nothing known; else words such as `ext4` or `partition table gpt`.

    Raises Unavailable when it can't be read at the start, the middle or the end, or the library gives up: in doubt
    nobody may format.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != 40:  # ELOOP: a device name below /dev/VG is a link, made by udev
            raise Unavailable(f"{path}: can't be opened to look at its content ({error.strerror})") from error
        fd = _open_link(path)
    try:
        _check_readable(fd, path)
        return _probe(fd, path)
    finally:
        os.close(fd)


def _open_link(path: Path) -> int:
    target = path.resolve()
    if not target.is_block_device():
        raise Unavailable(f"{path}: is a link that does not lead to a block device; nothing is read through it")
    try:
        return os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(f"{path}: can't be opened to look at its content ({error.strerror})") from error


def _check_readable(fd: int, path: Path) -> None:
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    if size_bytes <= 0:
        raise Unavailable(f"{path}: has no size; is the device still there?")
    sample = min(_SAMPLE_BYTES, size_bytes)
    for offset in (0, (size_bytes - sample) // 2, size_bytes - sample):
        try:
            done = len(os.pread(fd, sample, offset))
        except OSError as error:
            raise Unavailable(f"{path}: unreadable at byte {offset} ({error.strerror}); see the kernel log") from error
        if done != sample:
            raise Unavailable(f"{path}: ends at byte {offset + done} of {size_bytes}; see the kernel log")


def _probe(fd: int, path: Path) -> str:
    blkid = _library()
    probe = blkid.blkid_new_probe()
    if not probe:
        raise Unavailable(f"{path}: libblkid is out of memory")
    try:
        _set_up(blkid, probe, fd, path)
        answer = blkid.blkid_do_safeprobe(probe)
        if answer == _NOTHING:
            return ""
        if answer == _FOUND:
            return _describe(blkid, probe)
        if answer == _AMBIVALENT:
            return "several contradicting signatures"
        raise Unavailable(f"{path}: libblkid can't tell what is there (answer {answer}); see the kernel log")
    finally:
        blkid.blkid_free_probe(probe)


def _set_up(blkid: ctypes.CDLL, probe: int, fd: int, path: Path) -> None:
    superblocks = _SUBLKS_TYPE | _SUBLKS_USAGE | _SUBLKS_MAGIC | _SUBLKS_BADCSUM
    steps = (
        blkid.blkid_probe_set_device(probe, fd, 0, 0),
        blkid.blkid_probe_enable_superblocks(probe, 1),
        blkid.blkid_probe_set_superblocks_flags(probe, superblocks),
        blkid.blkid_probe_enable_partitions(probe, 1),
        blkid.blkid_probe_set_partitions_flags(probe, _PARTS_FORCE_GPT | _PARTS_MAGIC),
    )
    if any(steps):
        raise Unavailable(f"{path}: libblkid can't be set up ({steps})")


def _describe(blkid: ctypes.CDLL, probe: int) -> str:
    kind = _value(blkid, probe, b"TYPE")
    table = _value(blkid, probe, b"PTTYPE")
    words = [kind] if kind else []
    if table:
        words.append(f"partition table {table}")
    return ", ".join(words) or "an unnamed signature"


def _value(blkid: ctypes.CDLL, probe: int, name: bytes) -> str:
    data = ctypes.c_char_p()
    if blkid.blkid_probe_lookup_value(probe, name, ctypes.byref(data), None) != 0 or data.value is None:
        return ""
    return data.value.decode(errors="replace")


@cache
def _library() -> ctypes.CDLL:
    try:
        blkid = ctypes.CDLL(_LIBRARY)
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
    blkid.blkid_do_safeprobe.argtypes = [pointer]
    blkid.blkid_probe_lookup_value.argtypes = [pointer, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), pointer]
    return blkid
