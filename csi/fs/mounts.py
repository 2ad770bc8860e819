"""Mounting, binding and unmounting, decided by reading the mount table back.

Targets are reached as paths.py says: mount(8) gets `/proc/self/fd/N` and the descriptor itself, so a component that is
swapped for a link in the meantime leads nowhere else. Afterwards the table must show the mount at the intended path.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import Conflict, DataLoss, DriverError, InUse, Invalid, Unavailable
from csi.fs import paths
from csi.fs.flags import mount_options
from csi.fs.mountinfo import Mount, layers_at, origin_of, read_table
from csi.fs.usage import device_number
from csi.residents import helper
from csi.run import Boundary, Result, Runner, failed, no_boundary

__all__ = ["Mount", "Mounts"]

# --internal-only: no /sbin/mount.* helper. --no-mtab: nothing in /run/mount/utab, whose paths would be descriptors.
_MOUNT = ("mount", "--no-canonicalize", "--no-mtab", "--internal-only")
_UNMOUNT = helper(__file__, "unmount_helper.py")
_OWN_TABLE = Path("/proc/self/mountinfo")
#: Replaying a journal and writing out the page cache take long on slow disks; these are changing commands, so they
#: are not cut short by the deadline of one request.
_SECONDS = 600.0
_MOST_LAYERS = 64
_MOUNT_ADVICE = "dmesg(1) may have more information after failed mount system call."

#: Options of one mount, as opposed to one filesystem. A remount of a bind mount replaces them all, so those that are
#: there must be named again or they are lost.
_PER_MOUNT = ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "nosymfollow")


class Mounts:
    """The mounts of this node. Callers hold the lock of the volume whose device or target they name."""

    def __init__(
        self,
        runner: Runner,
        *,
        root: Path = paths.ROOT,
        table: Path | None = None,
        number_of: Callable[[Path], str | None] = device_number,
        boundary: Boundary = no_boundary,
    ) -> None:
        """root: the root folder of the mounts; in a container the host's, so that these are mounts of the host itself.

        table: the kernel's mount table. number_of: a device's "MAJOR:MINOR", None when there is no such device."""
        self._runner = runner
        self._boundary = boundary
        self._root = root
        # /proc/1/root is the root of the process whose mounts are listed beside it.
        self._table = table or (_OWN_TABLE if root == paths.ROOT else root.with_name("mountinfo"))
        self._number_of = number_of

    def all(self) -> list[Mount]:
        """Every mount, in the table's order."""
        return read_table(self._table)

    def at(self, path: Path) -> list[Mount]:
        """The layers mounted at exactly this path, lowest first."""
        return layers_at(self.all(), path)

    def of(self, major_minor: str) -> list[Mount]:
        """Every mount of the filesystem on this device; btrfs, which numbers its filesystems itself, by the source."""
        return [mount for mount in self.all() if self._is_on(mount, major_minor)]

    def of_node(self, path: Path) -> list[Mount]:
        """Every bind mount of this device node, as block volumes are published.

        Found by the node's place in its filesystem, and by the device number of what stands at the mount point: a
        bind of a node that was deleted and made anew opens the new device all the same.
        """
        mounts = self.all()
        origin, number = origin_of(mounts, path), self._number_of(path)
        return [mount for mount in mounts if mount.root != "/" and self._shows_node(mount, origin, number)]

    def mount(
        self, device: Path, target: Path, *, fs_type: str, flags: Sequence[str], readonly: bool, deadline: Deadline
    ) -> None:
        """Mount the device's filesystem at `target`, a folder that exists; `nosuid,nodev` always.

        Already mounted there, by this call in an earlier life, is success. Raises InUse when something else is
        mounted at the target, Conflict when it is mounted with the other of ro and rw, Invalid for a flag or a path
        that is not allowed, DataLoss for a damaged filesystem, Unavailable for a device that does not answer.
        """
        readonly = readonly or "ro" in flags
        options = mount_options(fs_type, flags, readonly=readonly)
        number = self._get_number(device)
        before = self.all()
        layers = layers_at(before, target)
        if layers:
            self._check_mounted(layers[-1], device, number, fs_type, readonly)
            return
        with paths.opened(target, root=self._root) as fd:
            argv = [*_MOUNT, f"--types={fs_type}", f"--options={options}", f"--source={device}"]
            # The option rw alone lets mount(8) fall back to read-only on a write-protected device.
            argv += ["--read-only" if readonly else "--read-write", f"--target=/proc/self/fd/{fd}"]
            result = self._run(argv, deadline, fds=(fd,))
        layers = self.at(target)
        if not layers:
            self._undo_strays(before, lambda mount: self._is_on(mount, number), deadline)
            if self._number_of(device) != number:  # mount(8) says of it what it says of a damaged filesystem
                raise Unavailable(
                    f"{device}: went away while it was mounted; see the connection to the SNODE, then repeat"
                )
            raise _mount_failed(device, target, flags, result)
        self._check_mounted(layers[-1], device, number, fs_type, readonly)

    def bind(self, source: Path, target: Path, *, readonly: bool, deadline: Deadline) -> None:
        """Show `source` at `target` as well: a staged folder onto a folder, or a device node onto a file.

        Repeating is success, and completes a read-only bind that was killed between its two steps. Read-only holds
        for files; writes to a device node pass through a read-only mount, so a read-only block volume must be
        read-only as a device.
        Raises Unavailable when nothing is mounted at a source folder (the container would write to the node's own
        disk), InUse when something else is mounted at the target, Conflict when it is bound there with the other of
        ro and rw.
        """
        before = self.all()
        if not self._number_of(source) and not layers_at(before, source):
            raise Unavailable(f"{source}: nothing is mounted there; stage the volume, then repeat")
        wanted = origin_of(before, source)
        layers = layers_at(before, target)
        if not layers:
            result = self._bind(source, target, deadline)
            layers = self.at(target)
            if not layers:
                self._undo_strays(before, lambda mount: (mount.major_minor, mount.root) == wanted, deadline)
                raise _mount_failed(source, target, (), result)
        top = layers[-1]
        if (top.major_minor, top.root) != wanted:
            raise InUse(f"{target}: {top.source} ({top.root}) is mounted there, not {source}; unmount it first")
        if readonly and "ro" not in top.options:
            self._make_readonly(top, target, deadline)
        elif not readonly and "ro" in top.options:
            raise Conflict(f"{target}: is bound read-only already, but asked for writable; unpublish it first")

    def unmount_all(self, target: Path, deadline: Deadline) -> None:
        """Unmount every layer at `target`; nothing mounted there is success.

        Returns only when the table shows none. Never lazy: a lazy unmount leaves a filesystem alive that nobody sees,
        whose device is then taken away. Raises InUse when it is busy, Timeout when the device is dead; repeat then.
        """
        for _ in range(_MOST_LAYERS):
            layers = self.at(target)
            if not layers:
                return
            top = layers[-1]
            with paths.parent_of(target, root=self._root) as (parent, name):
                argv = [*_UNMOUNT, f"/proc/self/fd/{parent}/{name}"]
                if self._root != paths.ROOT:
                    argv.append(str(self._root.with_name("ns") / "mnt"))
                result = self._run(argv, deadline, fds=(parent,))
            if any(layer.mount_id == top.mount_id for layer in self.at(target)):
                raise self._unmount_failed(top, result)
        raise InUse(f"{target}: more than {_MOST_LAYERS} mounts, or somebody keeps mounting there; repeat")

    def ensure_directory(self, path: Path) -> None:
        """Make the folder and its parents, mode 0750, following no link; a folder that is there is fine."""
        paths.ensure_directory(path, root=self._root, boundary=self._boundary)

    def ensure_file(self, path: Path) -> None:
        """Make the empty file, mode 0600, and its parent folders, following no link; a file that is there is fine."""
        paths.ensure_file(path, root=self._root, boundary=self._boundary)

    def remove_target(self, path: Path) -> None:
        """Remove the empty folder or file; absent is fine. Raises InUse when it is mounted or holds anything."""
        layers = self.at(path)
        if layers:
            raise InUse(f"{path}: {layers[-1].source} is still mounted there; unmount it first")
        paths.remove_target(path, root=self._root, boundary=self._boundary)

    def _run(self, argv: Sequence[str], deadline: Deadline, *, fds: Sequence[int]) -> Result:
        return self._runner.run(argv, deadline=deadline, ok=None, timeout=_SECONDS, pass_fds=fds)

    def _bind(self, source: Path, target: Path, deadline: Deadline) -> Result:
        with paths.opened(source, root=self._root) as origin, paths.opened(target, root=self._root) as fd:
            argv = [*_MOUNT, "--options=bind", f"--source=/proc/self/fd/{origin}", f"--target=/proc/self/fd/{fd}"]
            return self._run(argv, deadline, fds=(origin, fd))

    def _make_readonly(self, top: Mount, target: Path, deadline: Deadline) -> None:
        kept = [option for option in _PER_MOUNT if option in top.options]
        with paths.opened(target, root=self._root) as fd:
            argv = [*_MOUNT, f"--options={','.join(['remount', 'bind', 'ro', *kept])}", "--source=none"]
            argv.append(f"--target=/proc/self/fd/{fd}")
            result = self._run(argv, deadline, fds=(fd,))
        layers = self.at(target)
        if not layers or "ro" not in layers[-1].options:
            raise _mount_failed(Path(top.source), target, (), result)

    def _check_mounted(self, top: Mount, device: Path, number: str, fs_type: str, readonly: bool) -> None:
        where = top.mount_point
        if not self._is_on(top, number) or top.fs_type != fs_type:
            raise InUse(f"{where}: {top.source} ({top.fs_type}) is mounted there, not {device}; unmount it first")
        if readonly == top.readonly:
            return
        if readonly:
            raise Conflict(f"{where}: {device} is mounted there writable, but asked for read-only; unmount it first")
        if "ro" in top.options:
            raise Conflict(f"{where}: {device} is mounted there read-only, but asked for writable; unmount it first")
        raise Unavailable(
            f"{where}: the {fs_type} on {device} is read-only after an error (dmesg shows it); unmount it, which lets "
            "it be checked, and mount it again"
        )

    def _is_on(self, mount: Mount, number: str) -> bool:
        if mount.fs_type == "btrfs":
            return mount.source.startswith("/") and self._number_of(Path(mount.source)) == number
        return mount.major_minor == number

    def _shows_node(self, mount: Mount, origin: tuple[str, str] | None, number: str | None) -> bool:
        if (mount.major_minor, mount.root) == origin:
            return True
        if number is None or mount.fs_type not in ("devtmpfs", "tmpfs") or not mount.reachable:
            return False
        return self._number_of(mount.mount_point) == number

    def _get_number(self, device: Path) -> str:
        number = self._number_of(device)
        if number is None:
            raise Unavailable(f"{device}: no such block device; is the volume still attached?")
        return number

    def _undo_strays(self, before: Sequence[Mount], ours: Callable[[Mount], bool], deadline: Deadline) -> None:
        """Take back a mount that landed elsewhere, because a folder on the way was renamed at that moment."""
        known = {mount.mount_id for mount in before}
        for stray in self.all():
            if stray.mount_id not in known and stray.reachable and ours(stray):
                self.unmount_all(stray.mount_point, deadline)

    def _unmount_failed(self, top: Mount, result: Result) -> DriverError:
        where = top.mount_point
        said = " ".join(result.stderr.split())[-300:]
        if "busy" not in said:
            return Unavailable(f"{where}: {top.source} could not be unmounted ({said or 'no reason given'}); repeat")
        others = [mount for mount in self.all() if mount.parent_id == top.mount_id]
        holders = ", ".join(str(mount.mount_point) for mount in others[:5])
        who = f"other mounts in it: {holders}" if holders else f"a process has files open; `fuser -vm {where}` shows it"
        return InUse(f"{where}: busy, {who}; end that and repeat")


def _mount_failed(source: Path, target: Path, flags: Sequence[str], result: Result) -> DriverError:
    said = " ".join(result.stderr.split()).removesuffix(_MOUNT_ADVICE).strip()[-400:] or "no reason given"
    begin = f"{source} can't be mounted at {target}: {said}"
    if result.returncode == 0:
        return Unavailable(f"{target}: was renamed while {source} was mounted there; nothing stays mounted, repeat")
    if "Structure needs cleaning" in said or "can't read superblock" in said:
        return DataLoss(f"{begin}. Repair it by hand on the unmounted device (e2fsck -f, xfs_repair), then repeat")
    if "wrong fs type" in said:
        if flags:
            return Invalid(f"{begin}. See whether the kernel knows the mount_flags {', '.join(flags)}, and dmesg")
        return DataLoss(f"{begin}. dmesg has the kernel's reason; repair it by hand, unmounted, then repeat")
    if "unknown filesystem type" in said:
        return Unavailable(f"{begin}. Load the kernel's module for it (modprobe), then repeat")
    if "already mounted" in said or "busy" in said:
        return InUse(f"{begin}. Something else holds the device or the target; end that, then repeat")
    if "write-protected" in said or "read-only" in said:
        return InUse(f"{begin}. The device is read-only: ask for the volume read-only, or publish it writable")
    if "not a directory" in said.lower():
        return Invalid(f"{begin}. Source and target must both be folders, or both be files")
    if any(words in said for words in ("Input/output error", "does not exist", "No such", "no medium")):
        return Unavailable(f"{begin}. See the connection to the SNODE and dmesg, then repeat")
    return failed(result)
