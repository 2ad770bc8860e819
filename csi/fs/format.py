"""What stands on a device, making a filesystem there, and checking it before a mount.

The rule: nothing is ever written over something. "Blank" is a conclusion from proofs, never from silence: blkid ends
with 2 for a blank device and for an unreadable or a missing one alike, and drivers that took that for blank have
formatted live data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import CommandFailed, DataLoss, DriverError, InUse, OutOfRange, Unavailable
from csi.fs import grow
from csi.fs.flags import DEFAULT_FS, FS_TYPES, check_fs_type
from csi.model import MIB
from csi.run import Result, Runner, failed

__all__ = ["DEFAULT_FS", "FS_TYPES", "MINIMUM_BYTES", "Filesystems", "last_words"]

#: Smallest device in bytes that a filesystem is made on. ext4: room for a journal of 4 MiB in blocks of 4 KiB; xfs and
#: btrfs: what their mkfs demands (300 MiB; 109 MiB with two copies of metadata), and for btrfs some room for data.
MINIMUM_BYTES: Mapping[str, int] = {"ext4": 16 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB}

# ext4: blocks of 4 KiB always, since mke2fs takes 1 KiB on a small volume, which then can't grow far. No blocks kept
# for root (-m 0): what runs in the containers is mostly not root. The inode tables are left to the kernel to zero after
# the first mount, the journal is zeroed now: replaying what an older journal left there would be damage.
# No discard anywhere: a new volume has nothing to give back, and it takes minutes on some devices.
# No -F, no -f: mkfs's own look at the device stays as one more guard.
_MKFS: Mapping[str, tuple[str, ...]] = {
    "ext4": ("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-K"),
    "btrfs": ("mkfs.btrfs", "--quiet", "--nodiscard"),
}
_MKFS_SECONDS = 3600.0
_FSCK_SECONDS = 6 * 3600.0
_READ_BYTES = 4096
_READ = ("dd", "of=/dev/null", "iflag=direct", f"bs={_READ_BYTES}", "count=1")

# fsck(8)'s exit code is a sum of these. 1: repaired; 2: repaired, and a mounted root would need a reboot.
_FSCK_REPAIRED = 1 | 2
_FSCK_ERRORS_LEFT = 4
_FSCK_FAILED = 8
_FSCK_CANCELLED = 32

# The byte of an XFS superblock that is 1 while mkfs runs and 0 once it is done (sb_inprogress of xfs_dsb).
_XFS_IN_PROGRESS_OFFSET = 126


@dataclass(frozen=True)
class _Look:
    """signature: as `probe` returns it. unfinished: a mkfs.xfs was killed here, and nothing else stands there."""

    signature: str
    unfinished: bool = False


class Filesystems:
    """The filesystem tools of a node."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def probe(self, device: Path, deadline: Deadline) -> str:
        """What stands on the device.

        "" = surely nothing: the device can be read at its start, middle and end, before and after the search, and
        neither of two searches found a signature. A filesystem's name as blkid has it. "?" and a description for
        anything else (partition table, LVM, RAID, LUKS, swap, several signatures at once, a damaged superblock).
        An XFS whose mkfs was killed counts as nothing: its superblock says so, no kernel mounts it, so no file ever
        was on it.
        Raises Unavailable when the device is missing or can't be read.
        """
        return self._look(device, deadline).signature

    def make(self, device: Path, *, fs_type: str, deadline: Deadline) -> None:
        """Make a filesystem on a device that has nothing on it; the caller has made sure that it may.

        Raises DataLoss when anything is found there, OutOfRange when the device is too small, Invalid for an unknown
        fs_type, InUse when something holds the device. Killed midway, it can be repeated.
        """
        check_fs_type(fs_type)
        size_bytes = self._size(device, deadline)
        if size_bytes < MINIMUM_BYTES[fs_type]:
            least = MINIMUM_BYTES[fs_type] // MIB
            raise OutOfRange(f"{device}: {size_bytes} bytes are too few for {fs_type}, which needs {least} MiB")
        look = self._look(device, deadline)
        if look.signature:
            found = look.signature.removeprefix("?")
            raise DataLoss(f"{device}: not formatted, since {found} is on it; if it may go, wipe the device by hand")
        if look.unfinished:
            self._runner.run(["wipefs", "--all", "--types=xfs", "--", str(device)], deadline=deadline)
        argv = [*_MKFS[fs_type], "--", str(device)]
        result = self._runner.run(argv, deadline=deadline, ok=None, timeout=_MKFS_SECONDS)
        if result.returncode != 0:
            raise _mkfs_failed(device, result)
        made = self.probe(device, deadline)
        if made != fs_type:
            raise CommandFailed(f"{device}: {argv[0]} succeeded, but {made or 'nothing'} is found there; see dmesg")

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

    def grow_before_mount(self, device: Path, *, fs_type: str, deadline: Deadline) -> None:
        """Grow an unmounted filesystem where that can't be done mounted; see csi.fs.grow.grow_before_mount."""
        grow.grow_before_mount(self._runner, device, fs_type=fs_type, deadline=deadline)

    def _look(self, device: Path, deadline: Deadline) -> _Look:
        size_bytes = self._size(device, deadline)
        self._prove_readable(device, size_bytes, deadline)
        argv = ["blkid", "--probe", "--output=export", "--", str(device)]
        result = self._runner.run(argv, deadline=deadline, read_only=True, ok=frozenset({0, 2, 8}))
        if result.returncode != 0:
            signatures = self._every_signature(device, deadline)
            if len(signatures) == 1:
                return _Look(f"?{signatures[0]} with a damaged superblock")
            if result.returncode == 8 or signatures:
                return _Look(f"?signatures that contradict each other ({', '.join(signatures) or 'wipefs lists none'})")
            # It may have been dead while blkid looked: only a device that answers afterwards too is blank.
            self._prove_readable(device, size_bytes, deadline)
            return _Look("")
        signature = _signature(result.stdout)
        if signature == "xfs" and self._xfs_unfinished(device, deadline):
            return _Look("", unfinished=True)
        return _Look(signature)

    def _size(self, device: Path, deadline: Deadline) -> int:
        size_bytes = grow.device_size(self._runner, device, deadline)
        if size_bytes < _READ_BYTES:
            raise Unavailable(f"{device}: has a size of {size_bytes} bytes; it is not attached any more, or not yet")
        return size_bytes

    def _prove_readable(self, device: Path, size_bytes: int, deadline: Deadline) -> None:
        """Read at start, middle and end past the page cache, which answers for a dead device too.

        By a process of its own: a read of a device that hangs would hold this one (and keep it from ending) as long.
        """
        last = size_bytes // _READ_BYTES - 1
        for block in sorted({0, last // 2, last}):
            argv = [*_READ, f"if={device}", f"skip={block}"]
            result = self._runner.run(argv, deadline=deadline, read_only=True, ok=None)
            if result.returncode != 0 or "1+0 records in" not in result.stderr:
                raise Unavailable(
                    f"{device}: can't be read at byte {block * _READ_BYTES} ({last_words(result)}); "
                    "see the connection to the SNODE and dmesg, then repeat"
                )

    def _every_signature(self, device: Path, deadline: Deadline) -> list[str]:
        """What wipefs lists, superblocks with wrong checksums too, nothing weighed against another; only looks.

        blkid of util-linux 2.41 (Debian 13) ends with 2 where there are several filesystems, as if there were none,
        where earlier ones end with 8; and mkfs, by the same library, then formats.
        """
        argv = ["wipefs", "--noheadings", "--output=TYPE", "--", str(device)]
        result = self._runner.run(argv, deadline=deadline, read_only=True, ok=None)
        if result.returncode != 0:
            raise Unavailable(f"{device}: can't be searched for signatures ({last_words(result)}); repeat")
        return sorted(set(result.stdout.split()))

    def _xfs_unfinished(self, device: Path, deadline: Deadline) -> bool:
        argv = ["dd", f"if={device}", "bs=1", "count=1", f"skip={_XFS_IN_PROGRESS_OFFSET}", "status=none"]
        return self._runner.run(argv, deadline=deadline, read_only=True).stdout == "\x01"


def last_words(result: Result) -> str:
    """The end of what a command said, on one line, for a message."""
    said = " ".join((result.stderr.strip() or result.stdout.strip()).split())
    return said[-400:] or f"exit code {result.returncode}"


def _signature(export: str) -> str:
    facts = dict(line.split("=", 1) for line in export.splitlines() if "=" in line)
    kind, table = facts.get("TYPE", ""), facts.get("PTTYPE", "")
    if kind and not table and facts.get("USAGE") == "filesystem":
        return kind
    names = [kind] if kind else []
    if table:
        names.append(f"a partition table ({table})")
    return "?" + (" with ".join(names) or "a signature that blkid does not name")


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
        if "superblock" in said and "Input/output error" not in said:
            return DataLoss(
                f"{device}: its superblock is damaged ({words}). Nothing was written. Run `e2fsck -b 32768 {device}` "
                "by hand (dumpe2fs -h says where copies are), or restore a copy; then repeat"
            )
        return Unavailable(f"{device}: could not be checked ({words}); see the connection and dmesg, then repeat")
    if result.returncode & _FSCK_CANCELLED:
        return Unavailable(f"{device}: its check was cancelled; repeat, it starts over")
    return failed(result)
