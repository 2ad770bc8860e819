"""Growing a filesystem to the size of its device. Repeating it is harmless and takes some milliseconds."""

import re
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import DataLoss, DriverError, Unavailable
from csi.fs.flags import check_fs_type
from csi.fs.look import Look
from csi.run import Result, Runner, failed

_GROW_SECONDS = 3600.0
_FSCK_SECONDS = 6 * 3600.0
_CAP_SYS_RESOURCE = 24
_STATUS = Path("/proc/self/status")


def grow(runner: Runner, device: Path, *, fs_type: str, mount_point: Path, deadline: Deadline) -> None:
    """Grow a filesystem that is mounted, writable, at `mount_point`, to the size of `device`.

    Of a mounted filesystem there is no cheaper way to learn whether it is needed than to call the tool. Before the
    mount a look tells it (Look.fills_device).
    Raises DataLoss when the filesystem needs a repair first, Unavailable when the kernel refuses for another reason.
    """
    check_fs_type(fs_type)
    argv = {
        "ext4": ["resize2fs", "--", str(device)],
        "xfs": ["xfs_growfs", "-d", "--", str(mount_point)],
        "btrfs": ["btrfs", "filesystem", "resize", "max", str(mount_point)],
    }[fs_type]
    result = runner.run(argv, deadline=deadline, ok=None, timeout=_GROW_SECONDS)
    if result.returncode != 0:
        raise _failed(device, fs_type, mount_point, result)


def grow_before_mount(runner: Runner, look: Look, *, deadline: Deadline) -> None:
    """Grow an unmounted ext4 to its device if this process may not do so once it is mounted; else do nothing.

    The kernel lets only CAP_SYS_RESOURCE grow a mounted ext4, and containers and sandboxes are often without it. An
    unmounted one needs no capability, but a full check first, so this way is taken only where the other is closed.
    Raises DataLoss when the check finds errors that it can't repair.
    """
    if look.signature != "ext4" or look.fills_device or may_grow_mounted_ext4():
        return
    device = str(look.device)
    check = runner.run(["e2fsck", "-f", "-p", "--", device], deadline=deadline, ok=None, timeout=_FSCK_SECONDS)
    if check.returncode & ~3:  # 1 and 2: repaired
        raise _needs_repair(look.device, check)
    result = runner.run(["resize2fs", "--", device], deadline=deadline, ok=None, timeout=_GROW_SECONDS)
    if result.returncode != 0:
        raise _needs_repair(look.device, result)


def may_grow_mounted_ext4() -> bool:
    """True if this process has CAP_SYS_RESOURCE."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_SYS_RESOURCE & 1)


def _failed(device: Path, fs_type: str, mount_point: Path, result: Result) -> DriverError:
    said = " ".join((result.stderr or result.stdout).split())[-400:]
    if fs_type == "ext4" and "Permission denied" in said and not may_grow_mounted_ext4():
        return Unavailable(
            f"{device}: the kernel lets only CAP_SYS_RESOURCE grow a mounted ext4; give the driver this capability, or "
            "stop what uses the volume: it grows when it is staged again"
        )
    if fs_type == "ext4" and ("Permission denied" in said or "e2fsck" in said or "superblock" in said):
        return _needs_repair(device, result)
    if "Structure needs cleaning" in said or "Input/output error" in said:
        return DataLoss(f"{mount_point}: {fs_type} can't grow ({said}); stop what uses the volume and repair it first")
    if "Read-only" in said:
        return Unavailable(f"{mount_point}: is read-only, so it can't grow; stage the volume writable and repeat")
    return failed(result)


def _needs_repair(device: Path, result: Result) -> DataLoss:
    said = " ".join((result.stderr or result.stdout).split())[-400:]
    return DataLoss(
        f"{device}: the ext4 can't grow before it is repaired ({said}); stop what uses the volume, run "
        f"`e2fsck -f {device}` by hand on it unmounted, then repeat"
    )
