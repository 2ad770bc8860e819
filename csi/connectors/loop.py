"""Attaching a volume that is a file on this very machine: a loop device over it.

losetup's detach of a device that somebody still has open succeeds at once and happens later, so each step is read back.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from csi.connectors.block_device import BlockDevices
from csi.connectors.devices import MOUNT_TABLES, Devices, read_attribute
from csi.deadline import Deadline, wait_until
from csi.errors import DataLoss, InUse, Invalid, NotFound, Timeout, Unavailable, Unsupported
from csi.log import get_logger
from csi.model import VOLUME_ID, Attachment, Complaint, Device
from csi.run import Runner

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("=QQQQQIIII64s64s32sQQ")  # struct loop_info64 of <linux/loop.h>
_READ_ONLY, _AUTOCLEAR = 1, 4
_DELETED = " (deleted)"
_SUFFIX = ".img"
_GONE_SECONDS = 10.0


@dataclass(frozen=True)
class _Backing:
    """What a loop device stands on: the file's device and inode, and how it is attached."""

    device: int
    inode: int
    offset: int
    flags: int

    def is_whole(self, file: os.stat_result) -> bool:
        """True if it is this file from its first byte on."""
        return (self.device, self.inode, self.offset) == (file.st_dev, file.st_ino, 0)


class LoopConnector:
    """The Connector of protocol "loop"; see connectors/base.py."""

    def __init__(
        self,
        runner: Runner,
        *,
        roots: Sequence[Path],
        sysfs: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        mount_tables: Sequence[Path] = MOUNT_TABLES,
        block: BlockDevices | None = None,
    ) -> None:
        """roots: the folders whose files may be attached, those of the pools; all else is refused."""
        self._runner = runner
        self._roots = tuple(roots)
        self._sysfs = sysfs
        self._dev = dev
        self._devices = Devices(runner, sysfs=sysfs, dev=dev, mount_tables=mount_tables, block=block)
        self._log = get_logger("loop")

    @property
    def protocol(self) -> str:
        """See Connector.protocol."""
        return "loop"

    def connect(self, attachment: Attachment, deadline: Deadline) -> Device:
        """See Connector.connect. Raises InUse while the volume is attached otherwise (another file, read-only)."""
        file = self._checked_file(attachment)
        with _open_regular(file, writable=not attachment.readonly) as found:
            if found.st_size < attachment.size_bytes:
                raise DataLoss(
                    f"volume {attachment.volume_id}: {file} has {found.st_size} bytes, the volume has "
                    f"{attachment.size_bytes}; the file was cut; restore it, nothing was changed"
                )
            name = self._adopt(attachment, found, deadline) or self._attach(attachment, file, found, deadline)
            if self._devices.size_bytes(name) < attachment.size_bytes:
                self._set_capacity(name, deadline)  # the file grew after it was attached
            return self._verified(name, attachment.volume_id, size_bytes=attachment.size_bytes)

    def find(self, volume_id: str) -> Device | None:
        """See Connector.find."""
        for name in self._names(volume_id):
            if device := self._devices.describe(name, generation=""):
                return device
        return None

    def disconnect(self, volume_id: str, deadline: Deadline) -> None:
        """See Connector.disconnect."""
        names = self._names(volume_id)
        for name in names:
            self._devices.refuse_if_used(name, f"volume {volume_id}")
        for name in names:
            self._detach(name, volume_id, deadline)

    def rescan(self, volume_id: str, *, size_bytes: int, deadline: Deadline) -> Device:
        """See Connector.rescan. Raises NotFound when the volume is not attached, Timeout while its file is smaller."""
        names = self._names(volume_id)
        if not names:
            raise NotFound(f"volume {volume_id}: not attached to this machine; stage it first")

        def grown() -> bool:
            if self._devices.size_bytes(names[0]) < size_bytes:
                self._set_capacity(names[0], deadline)
            return self._devices.size_bytes(names[0]) >= size_bytes

        try:
            wait_until(grown, deadline, what="the new size", first=0.05, most=1.0)
        except Timeout as error:
            raise Timeout(
                f"volume {volume_id}: {names[0]} has {self._devices.size_bytes(names[0])} bytes, not yet {size_bytes} "
                "bytes; see that its file has the new size, and repeat"
            ) from error
        return self._verified(names[0], volume_id, size_bytes=size_bytes)

    def problems(self, deadline: Deadline) -> list[str]:
        """See Connector.problems. Starts no process."""
        found = []
        if not (self._dev / "loop-control").exists():
            found.append(_no_loop(self._dev))
        if not self._runner.has("losetup"):
            found.append("losetup is missing -> install the package mount (util-linux)")
        return found

    def complaints(self, volume_id: str) -> list[Complaint]:
        """See Connector.complaints. Nothing can come between a loop device and its file."""
        return []

    def left_over(self) -> list[str]:
        """See Connector.left_over."""
        return sorted(self._attached())

    def _checked_file(self, attachment: Attachment) -> Path:
        """The file with its folder resolved; raises Invalid when it is not a volume's file below one of the roots."""
        file, what = attachment.file, f"publish_context.file of volume {attachment.volume_id}"
        if file is None or file.name != attachment.volume_id + _SUFFIX or not file.is_absolute():
            raise Invalid(f"{what}: {str(file)[:200]!r} is not the path of the volume's file")
        try:
            folder = file.parent.resolve(strict=True)
        except OSError as error:
            raise NotFound(
                f"{what}: {file.parent} is not on this machine ({error.strerror}); the volume can only be staged on "
                "the host that has its pool"
            ) from error
        if not any(folder.is_relative_to(root.resolve()) for root in self._roots):
            raise Invalid(f"{what}: {folder} is in no pool of this machine")
        return folder / file.name

    def _adopt(self, attachment: Attachment, file: os.stat_result, deadline: Deadline) -> str:
        """The loop device that has the very file already, as asked; "" if there is none. Others are detached."""
        adopted = ""
        for name in self._names(attachment.volume_id):
            backing = self._backing(name)
            if backing is None:
                continue
            flags = _READ_ONLY if attachment.readonly else 0
            if not adopted and backing.is_whole(file) and backing.flags & (_READ_ONLY | _AUTOCLEAR) == flags:
                adopted = name
                continue
            self._devices.refuse_if_used(name, f"volume {attachment.volume_id} is attached in another way")
            self._detach(name, attachment.volume_id, deadline)
        return adopted

    def _attach(self, attachment: Attachment, file: Path, found: os.stat_result, deadline: Deadline) -> str:
        argv = ["losetup", "--find", "--show", "--nooverlap"]
        if attachment.readonly:
            argv.append("--read-only")
        result = self._runner.run([*argv, "--direct-io=on", "--", os.fspath(file)], deadline=deadline, ok=None)
        if result.returncode != 0:
            # Some file systems refuse direct I/O (and some kernels then refuse the whole call).
            result = self._runner.run([*argv, "--", os.fspath(file)], deadline=deadline, ok=None)
        if result.returncode != 0:
            if not (self._dev / "loop-control").exists():
                raise Unavailable(_no_loop(self._dev))
            words = result.stderr.strip()[-300:]
            raise Unavailable(
                f"volume {attachment.volume_id}: losetup failed ({words}); see that a loop device is free "
                f"(`losetup --list`; module parameter max_loop) and that the host's {self._dev} is visible, and repeat"
            )
        name = result.stdout.strip().rpartition("/")[2]
        backing = self._backing(name)
        if backing is None or not backing.is_whole(found):
            raise DataLoss(
                f"volume {attachment.volume_id}: {name or 'the loop device'} does not stand on {file}, which was "
                "replaced in this moment; nothing was changed; see who works in the pool's folder"
            )
        self._devices.wait_for_node(name, deadline)
        return name

    def _detach(self, name: str, volume_id: str, deadline: Deadline) -> None:
        self._devices.flush(name, deadline)
        path = os.fspath(self._devices.path(name))
        self._runner.run(["losetup", "--detach", path], deadline=deadline, ok=None)
        try:
            wait_until(
                lambda: name not in self._names(volume_id), deadline.within(_GONE_SECONDS), what=f"{name} to be free"
            )
        except Timeout as error:
            raise InUse(
                f"volume {volume_id}: {path} is still open somewhere and is detached only when that ends; "
                f"`fuser --verbose {path}` names who; repeat afterwards"
            ) from error

    def _set_capacity(self, name: str, deadline: Deadline) -> None:
        self._runner.run(["losetup", "--set-capacity", os.fspath(self._devices.path(name))], deadline=deadline)

    def _verified(self, name: str, volume_id: str, *, size_bytes: int) -> Device:
        device = self._devices.describe(name, generation="")
        if device is None or name not in self._names(volume_id):
            raise Unavailable(f"volume {volume_id}: {name} was detached in this moment; repeat")
        if device.size_bytes < size_bytes:
            raise DataLoss(
                f"volume {volume_id}: {name} has {device.size_bytes} bytes, the volume has {size_bytes}; nothing was "
                "changed; see whether the file is a multiple of 512 bytes and whole"
            )
        return device

    def _backing(self, name: str) -> _Backing | None:
        """What the kernel says of a loop device; None when it has no file (any more)."""
        try:
            fd = os.open(self._devices.path(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            info = _LOOP_INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size)))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise Unavailable(f"{name}: the kernel does not say what it stands on ({error.strerror})") from error
        finally:
            os.close(fd)
        return _Backing(device=info[0], inode=info[1], offset=info[3], flags=info[8])

    def _names(self, volume_id: str) -> list[str]:
        return self._attached().get(volume_id, [])

    def _attached(self) -> dict[str, list[str]]:
        """The loop devices of each volume below our roots, by the name of the file, which may be deleted by now."""
        found: dict[str, list[str]] = {}
        roots = [root.resolve() for root in self._roots]
        for entry in sorted(self._sysfs.glob("block/loop*/loop/backing_file")):
            file = Path(read_attribute(entry).removesuffix(_DELETED))
            volume_id = file.name.removesuffix(_SUFFIX)
            if (
                file.name == volume_id + _SUFFIX
                and VOLUME_ID.fullmatch(volume_id)
                and any(file.is_relative_to(root) for root in roots)
            ):
                found.setdefault(volume_id, []).append(entry.parts[-3])
        return found


@contextmanager
def _open_regular(file: Path, *, writable: bool) -> Iterator[os.stat_result]:
    """Hold the file open, so that its inode number can't become another file's; refuses links and all but files."""
    try:
        fd = os.open(file, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"{file}: the volume's file is gone; see the pool's folder") from error
    except OSError as error:
        kind = Invalid if error.errno == errno.ELOOP else Unavailable
        raise kind(f"{file}: can't open the volume's file ({error.strerror})") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Unsupported(f"{file}: not a regular file; the driver did not make this volume")
        yield found
    finally:
        os.close(fd)


def _no_loop(dev: Path) -> str:
    return (
        f"{dev}/loop-control is missing: no loop devices -> run `modprobe loop` on the host (in a container, mount the "
        "host's /dev and run it privileged)"
    )
