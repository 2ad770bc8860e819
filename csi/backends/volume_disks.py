"""Which block devices of this machine are volumes of ours, or stand on one: a volume group in them is a guest's."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from csi.model import VOLUME_ID

#: What our targets answer to INQUIRY, for volumes of any SNODE that this machine has attached.
VENDOR = "SNODE"
_IMAGE = re.compile(rf"{VOLUME_ID.pattern}\.img( \(deleted\))?")
_LOGICAL_VOLUME = re.compile(rf".+-({VOLUME_ID.pattern}|trash-[0-9a-f]{{16}})")


def volume_disks(sys: Path = Path("/sys")) -> set[str]:
    """The kernel's names of them, such as sdc, loop3 or dm-7: volumes, their partitions, and what is built on these."""
    below = {folder.name: _below(folder) for folder in (sys / "class" / "block").glob("*")}
    found = {name for name in below if _is_volume(sys / "class" / "block" / name)}
    while more := {name for name, parts in below.items() if name not in found and not found.isdisjoint(parts)}:
        found |= more
    return found


def is_on(device: str, disks: Collection[str]) -> bool:
    """Whether the node `device`, under whatever name, is one of the disks."""
    return Path(os.path.realpath(device)).name in disks


def _is_volume(folder: Path) -> bool:
    backing = Path(_read(folder / "loop" / "backing_file")).name
    return (
        _IMAGE.fullmatch(backing) is not None
        or _read(folder / "device" / "vendor") == VENDOR
        # Device-mapper doubles the hyphens of a name.
        or _LOGICAL_VOLUME.fullmatch(_read(folder / "dm" / "name").replace("--", "-")) is not None
    )


def _below(folder: Path) -> set[str]:
    """What a device stands on: the disk of a partition, the parts of a device-mapper or md device."""
    parts = {part.name for part in (folder / "slaves").glob("*")}
    return parts | {folder.resolve().parent.name} if (folder / "partition").exists() else parts


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""  # another kind of device, or it went away in this moment
