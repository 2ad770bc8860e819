"""Device nodes of logical volumes, looked at through stat and sysfs: no process, and no open that could hang."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from csi.errors import Unavailable

_SECTOR_BYTES = 512


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

    def _node(self, path: Path, facts: os.stat_result) -> Node | None:
        if not stat.S_ISBLK(facts.st_mode):
            raise Unavailable(f"{path}: is not a block device; remove it and repeat")
        folder = self._sys / "dev" / "block" / f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"
        size = _read(folder / "size")
        if not size:
            return None  # a node without a device behind it
        return Node(
            path=path,
            size_bytes=int(size) * _SECTOR_BYTES,
            dm_uuid=_read(folder / "dm" / "uuid"),
            suspended=_read(folder / "dm" / "suspended") == "1",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # the attribute, or the device, is not there
