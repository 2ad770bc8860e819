"""Questions to a block device that no tool and no sysfs file answers: asked of the kernel, in this process."""

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import Protocol

from csi.deadline import Deadline
from csi.errors import Unavailable

_SG_IO = 0x2285
_SG_DXFER_FROM_DEV = -3
_PAGE_BYTES = 1024
_INQUIRY_MILLISECONDS = 10_000
#: How long a device must stay held to count as held.
_HELD_SECONDS = 1.0
#: How long a new disk may refuse to be opened.
_APPEAR_SECONDS = 1.0


class BlockDevices(Protocol):
    """What the connectors ask of a device node; the kernel in production."""

    def names(self, path: Path) -> frozenset[str]:
        """The NAA names (`naa.6…`) that the disk tells of itself now, past every cache.

        Raises Unavailable when the disk does not answer.
        """
        ...

    def held(self, path: Path) -> bool:
        """True if somebody has the device for himself: a mount in any namespace, device mapper, RAID, swap."""
        ...


class KernelBlockDevices:
    """The BlockDevices of production."""

    def names(self, path: Path) -> frozenset[str]:
        """See BlockDevices.names. Sends INQUIRY for the page of device identification (SPC-4, 7.8.6).

        The kernel shows a new disk a moment before it lets anybody open it, hence a little patience.
        """
        patience = Deadline.after(_APPEAR_SECONDS)
        while True:
            try:
                return naa_names(_identification(path))
            except OSError as error:
                if error.errno != errno.ENXIO or patience.remaining() <= 0:
                    raise Unavailable(
                        f"{path}: the disk does not say what it is ({error.strerror}); repeat later"
                    ) from error
            patience.sleep(0.01)

    def held(self, path: Path) -> bool:
        """See BlockDevices.held. An exclusive open is refused (EBUSY) while anybody in the kernel holds the device.

        Asked for up to a second: losetup holds devices for a moment while it looks for a free one, and the kernel lets
        go of a filesystem a little after the unmount.
        """
        patience = Deadline.after(_HELD_SECONDS)
        while _is_held(path):
            if patience.remaining() <= 0:
                return True
            patience.sleep(0.05)
        return False


def _identification(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _inquiry(fd, 0x83)
    finally:
        os.close(fd)


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        # Any other error means that the device is dead or gone: nobody can be using it to good effect.
        return error.errno == errno.EBUSY
    os.close(fd)
    return False


def naa_names(page: bytes) -> frozenset[str]:
    """The NAA names of the logical unit in a device identification page; others (T10, port names) are left out."""
    found = set()
    if len(page) >= 4 and page[1] == 0x83:
        end = min(len(page), 4 + int.from_bytes(page[2:4], "big"))
        at = 4
        while at + 4 <= end:
            code_set, kind, association = page[at] & 0xF, page[at + 1] & 0xF, page[at + 1] >> 4 & 3
            name = page[at + 4 : at + 4 + page[at + 3]]
            if (code_set, kind, association) == (1, 3, 0) and len(name) == page[at + 3] > 0:
                found.add("naa." + name.hex())
            at += 4 + page[at + 3]
    return frozenset(found)


class _SgIoHeader(ctypes.Structure):
    """struct sg_io_hdr of <scsi/sg.h>."""

    _fields_ = (
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    )


def _inquiry(fd: int, page: int) -> bytes:
    command = ctypes.create_string_buffer(bytes((0x12, 1, page, _PAGE_BYTES >> 8, _PAGE_BYTES & 0xFF, 0)), 6)
    data, sense = ctypes.create_string_buffer(_PAGE_BYTES), ctypes.create_string_buffer(32)
    header = _SgIoHeader(
        interface_id=ord("S"),
        dxfer_direction=_SG_DXFER_FROM_DEV,
        cmd_len=6,
        mx_sb_len=len(sense),
        dxfer_len=len(data),
        dxferp=ctypes.addressof(data),
        cmdp=ctypes.addressof(command),
        sbp=ctypes.addressof(sense),
        timeout=_INQUIRY_MILLISECONDS,
    )
    fcntl.ioctl(fd, _SG_IO, header)
    if header.status or header.host_status or header.driver_status & 0xF:
        raise OSError(errno.EIO, f"INQUIRY failed, status {header.status}, host status {header.host_status}")
    return data.raw[: len(data) - max(0, header.resid)]
