"""Device nodes of logical volumes, looked at through stat and sysfs: no process, and no open that could hang."""

import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from csi.errors import Unavailable

_SECTOR_BYTES = 512
# struct dm_ioctl of <linux/dm-ioctl.h>: version, sizes, targets, open count, flags, event, padding, dev, name, uuid.
_DM_IOCTL = struct.Struct("=3I2IIiIIIQ128s129s7x")
_DM_DEV_STATUS = 0xC138FD07
_OPEN_COUNT = 6


@dataclass(frozen=True)
class Node:
    """An active device."""

    path: Path
    size_bytes: int
    dm_uuid: str = ""  # "LVM-" + uuid of the group + uuid of the volume; "" when sysfs does not say
    suspended: bool = False  # a killed command left it so; I/O would wait for ever


class DeviceNodes:
    """The nodes below /dev/VG."""

    def __init__(self, *, dev: Path = Path("/dev"), sys: Path = Path("/sys")) -> None:
        self._dev = dev
        self._sys = sys

    def path(self, vg: str, name: str) -> Path:
        """Where the node of a logical volume stands when it is active."""
        return self._dev / vg / name

    def look(self, vg: str, name: str) -> Node | None:
        """The node, or None when there is none (the volume is not active). Raises Unavailable when it can't be seen."""
        path = self.path(vg, name)
        try:
            facts = path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(f"{path}: can't be looked at ({error.strerror})") from error
        return self._node(path, facts)

    def is_unused(self, node: Node) -> bool:
        """Whether device-mapper says that nothing here has the device open; False as well when it says nothing."""
        request = bytearray(_DM_IOCTL.size)
        _DM_IOCTL.pack_into(
            request, 0, 4, 0, 0, _DM_IOCTL.size, _DM_IOCTL.size, 0, 0, 0, 0, 0, 0, b"", node.dm_uuid.encode()
        )
        try:
            fd = os.open(self._dev / "mapper" / "control", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.ioctl(fd, _DM_DEV_STATUS, request)
        except OSError:
            return False
        finally:
            os.close(fd)
        return bool(node.dm_uuid) and _DM_IOCTL.unpack(request)[_OPEN_COUNT] == 0

    def _node(self, path: Path, facts: os.stat_result) -> Node | None:
        if not stat.S_ISBLK(facts.st_mode):
            raise Unavailable(f"{path}: is not a block device; remove it and repeat")
        folder = f"{self._sys}/dev/block/{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"
        size = _read(f"{folder}/size")
        if not size:
            return None  # a node without a device behind it
        return Node(
            path=path,
            size_bytes=int(size) * _SECTOR_BYTES,
            dm_uuid=_read(f"{folder}/dm/uuid"),
            suspended=_read(f"{folder}/dm/suspended") == "1",
        )


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 4096).decode(errors="replace").strip()
        finally:
            os.close(fd)
    except OSError:
        return ""  # the attribute, or the device, is not there
