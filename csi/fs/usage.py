"""How full a volume is."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from csi.errors import Invalid, NotFound, Unavailable

_SECTOR_BYTES = 512  # sysfs counts in these whatever the device's own block size is


@dataclass(frozen=True)
class Usage:
    """One line of NodeGetVolumeStats."""

    unit: str  # "bytes" or "inodes"
    available: int
    total: int
    used: int


def filesystem_usage(path: Path) -> list[Usage]:
    """Bytes and inodes of the filesystem mounted at `path`; no inode line where the filesystem counts none (btrfs).

    `available` is what a user other than root may still use. Blocks for as long as the device does: the caller gives it
    a thread of its own. Raises NotFound when there is nothing at the path, Unavailable when the device does not answer.
    """
    try:
        facts = os.statvfs(path)
    except FileNotFoundError as error:
        raise NotFound(f"path {path}: does not exist") from error
    except OSError as error:
        raise Unavailable(f"path {path}: no statistics from the filesystem ({error.strerror})") from error
    unit = facts.f_frsize
    blocks = Usage("bytes", facts.f_bavail * unit, facts.f_blocks * unit, (facts.f_blocks - facts.f_bfree) * unit)
    if not facts.f_files:
        return [blocks]
    return [blocks, Usage("inodes", facts.f_favail, facts.f_files, facts.f_files - facts.f_ffree)]


def block_size(device: Path) -> int:
    """Size in bytes of a block device (or of the file that stands for one). Read from sysfs, so it can't hang.

    Raises NotFound when it does not exist, Invalid when it is neither.
    """
    try:
        found = device.stat()
        if stat.S_ISREG(found.st_mode):
            return found.st_size
        if not stat.S_ISBLK(found.st_mode):
            raise Invalid(f"{device}: not a block device")
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        return int(Path(f"/sys/dev/block/{number}/size").read_text(encoding="ascii")) * _SECTOR_BYTES
    except FileNotFoundError as error:
        raise NotFound(f"{device}: no such device") from error
    except OSError as error:
        raise Unavailable(f"{device}: can't learn its size ({error.strerror})") from error


def device_number(device: Path) -> str | None:
    """ "MAJOR:MINOR" of a block device, as the mount table writes it; None when there is no such device."""
    try:
        found = device.stat()
    except OSError:
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if stat.S_ISBLK(found.st_mode) else None
