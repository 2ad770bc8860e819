"""What stands on a device, making a filesystem there, and checking it before a mount.

The rule: nothing is ever written over something. "Blank" is a conclusion from proofs, never from silence: blkid ends
with 2 for a blank device and for an unreadable or a missing one alike, and drivers that took that for blank have
formatted live data. So a filesystem is made on a Look that has found nothing, and on nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from weakref import WeakSet

from csi.deadline import Deadline
from csi.errors import DataLoss, DriverError, InUse, OutOfRange, Unavailable
from csi.fs import grow
from csi.fs.flags import DEFAULT_FS, FS_TYPES, check_fs_type
from csi.fs.look import Look, look_at
from csi.fs.usage import device_number
from csi.model import MIB
from csi.run import Result, Runner, failed

__all__ = ["DEFAULT_FS", "FS_TYPES", "MINIMUM_BYTES", "Filesystems", "Look", "last_words"]

#: Smallest device in bytes that a filesystem is made on. ext4: room for a journal of 4 MiB in blocks of 4 KiB; xfs and
#: btrfs: what their mkfs demands (300 MiB; 109 MiB with two copies of metadata), and for btrfs some room for data.
MINIMUM_BYTES: Mapping[str, int] = {"ext4": 16 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB}

# ext4: blocks of 4 KiB always, since mke2fs takes 1 KiB on a small volume, which then can't grow far. No blocks kept
# for root (-m 0): what runs in the containers is mostly not root. The inode tables are left to the kernel to zero after
# the first mount, the journal is zeroed now: replaying what an older journal left there would be damage.
# No discard anywhere: a new volume has nothing to give back, and it takes minutes on some devices.
# No -f: the look that mkfs.xfs and mkfs.btrfs have themselves stays as one more guard (mke2fs has one on a terminal
# only).
_MKFS: Mapping[str, tuple[str, ...]] = {
    "ext4": ("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-K"),
    "btrfs": ("mkfs.btrfs", "--quiet", "--nodiscard"),
}
_MKFS_SECONDS = 3600.0
_FSCK_SECONDS = 6 * 3600.0

# fsck(8)'s exit code is a sum of these. 1: repaired; 2: repaired, and a mounted root would need a reboot.
_FSCK_REPAIRED = 1 | 2
_FSCK_ERRORS_LEFT = 4
_FSCK_FAILED = 8
_FSCK_CANCELLED = 32


class Filesystems:
    """The filesystem tools of a node."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._looks: WeakSet[Look] = WeakSet()

    def look(self, device: Path, deadline: Deadline) -> Look:
        """Look at a device: what stands there, and its size. Starts one process, which changes nothing.

        Raises Unavailable when the device is missing or can't be read, or when it can't be told what is there.
        """
        look = look_at(self._runner, device, deadline)
        self._looks.add(look)
        return look

    def make(self, look: Look, *, fs_type: str, deadline: Deadline) -> None:
        """Make a filesystem on a device that has nothing on it; the caller has made sure that it may.

        look: what `look` has just returned; it is good for one filesystem. The result is not looked at again: the mount
        that follows, of exactly this fs_type, proves it.
        Raises DataLoss when the look or mkfs has found anything, OutOfRange when the device is too small, Invalid for
        an unknown fs_type, InUse when something holds the device. Killed midway, it can be repeated.
        """
        check_fs_type(fs_type)
        if look not in self._looks:
            raise RuntimeError(f"{look.device}: a filesystem is made after a look at the device, one for each look")
        device = look.device
        if look.signature:
            found = look.signature.removeprefix("?")
            raise DataLoss(f"{device}: not formatted, since {found} is on it; if it may go, wipe the device by hand")
        if look.size_bytes < MINIMUM_BYTES[fs_type]:
            least = MINIMUM_BYTES[fs_type] // MIB
            raise OutOfRange(f"{device}: {look.size_bytes} bytes are too few for {fs_type}, which needs {least} MiB")
        self._looks.discard(look)
        if look.unfinished:
            self._runner.run(["wipefs", "--all", "--types=xfs", "--", str(device)], deadline=deadline)
        argv = [*_MKFS[fs_type], "--", str(device)]
        result = self._runner.run(argv, deadline=deadline, ok=None, timeout=_MKFS_SECONDS)
        if result.returncode != 0:
            raise _mkfs_failed(device, result)

    def check(self, device: Path, *, fs_type: str, deadline: Deadline) -> None:
        """Check and repair an unmounted filesystem so far as no data is at stake; call it before a writable mount.

        ext2/3/4: `e2fsck -p`, which replays the journal and ends at once when the filesystem is clean. xfs and btrfs:
        nothing, their mount replays the log. Raises DataLoss when errors are left that only a human may decide on,
        InUse when the device is mounted or held (e2fsck opens it exclusively, so this holds across namespaces),
        Unavailable when it can't be read.
        """
        if not fs_type.startswith("ext"):
            return
        argv = ["e2fsck", "-p", "--", str(device)]
        result = self._runner.run(argv, deadline=deadline, ok=None, timeout=_FSCK_SECONDS)
        if result.returncode & ~_FSCK_REPAIRED:
            raise _fsck_failed(device, result)

    def grow(self, device: Path, *, fs_type: str, mount_point: Path, deadline: Deadline) -> None:
        """Grow a mounted filesystem to its device; see csi.fs.grow.grow."""
        grow.grow(self._runner, device, fs_type=fs_type, mount_point=mount_point, deadline=deadline)

    def grow_before_mount(self, look: Look, deadline: Deadline) -> None:
        """Grow an unmounted filesystem where that can't be done mounted; see csi.fs.grow.grow_before_mount."""
        grow.grow_before_mount(self._runner, look, deadline=deadline)


def last_words(result: Result) -> str:
    """The end of what a command said, on one line, for a message."""
    said = " ".join((result.stderr.strip() or result.stdout.strip()).split())
    return said[-400:] or f"exit code {result.returncode}"


def _mkfs_failed(device: Path, result: Result) -> DriverError:
    said = result.stderr + result.stdout
    words = last_words(result)
    if "in use" in said or "is mounted" in said or "resource busy" in said:
        return InUse(f"{device}: not formatted, since something holds it ({words}); release it and repeat")
    if "Operation not permitted" in said or "Read-only" in said:
        return InUse(f"{device}: not formatted, since it is read-only ({words}); publish the volume writable")
    if "Proceed anyway" in said or "existing filesystem" in said or "overwrite" in said:
        return DataLoss(f"{device}: not formatted, since mkfs found something on it ({words}); look at it by hand")
    if "Input/output error" in said or "No such" in said or "short write" in said:
        return Unavailable(f"{device}: could not be formatted ({words}); see the connection and dmesg, then repeat")
    return failed(result)


def _fsck_failed(device: Path, result: Result) -> DriverError:
    said = result.stderr + result.stdout
    words = last_words(result)
    if result.returncode & _FSCK_ERRORS_LEFT:
        return DataLoss(
            f"{device}: the filesystem has errors that can't be repaired without a decision ({words}). It is not "
            f"mounted. With the volume attached run `e2fsck -f {device}` by hand, or restore a copy; then repeat"
        )
    if result.returncode & _FSCK_FAILED:
        if "in use" in said or "is mounted" in said:
            return InUse(f"{device}: not checked, since it is mounted or held ({words}); unmount it and repeat")
        # e2fsck blames the superblock too when the disk went away before it was opened.
        unreadable = "Input/output error" in said or ("Invalid argument" in said and device_number(device) is None)
        if "superblock" in said and not unreadable:
            return DataLoss(
                f"{device}: its superblock is damaged ({words}). Nothing was written. Run `e2fsck -b 32768 {device}` "
                "by hand (dumpe2fs -h says where copies are), or restore a copy; then repeat"
            )
        return Unavailable(f"{device}: could not be checked ({words}); see the connection and dmesg, then repeat")
    if result.returncode & _FSCK_CANCELLED:
        return Unavailable(f"{device}: its check was cancelled; repeat, it starts over")
    return failed(result)
