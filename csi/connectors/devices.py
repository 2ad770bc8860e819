"""The disks that the kernel shows in sysfs: size, identity, who uses them; and how one is flushed and removed."""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csi.connectors.block_device import BlockDevices, KernelBlockDevices
from csi.deadline import Deadline, wait_until
from csi.errors import InUse, Timeout, Unavailable
from csi.model import Device
from csi.residents import helper
from csi.run import Runner

_WRITE = helper(__file__, "attribute_helper.py")
_FLUSH = helper(__file__, "flush_helper.py")
_SECTOR_BYTES = 512
_NODE_SECONDS = 10.0
#: Our own mounts and those of the host's first process, when it can be seen: a pod's namespace may hide some.
MOUNT_TABLES = (Path("/proc/self/mountinfo"), Path("/proc/1/mountinfo"))


class Devices:
    """Reads sysfs afresh at each call; a disk is called by its kernel name, such as `sda` or `loop3`."""

    def __init__(
        self,
        runner: Runner,
        *,
        sysfs: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        mount_tables: Sequence[Path] = MOUNT_TABLES,
        block: BlockDevices | None = None,
    ) -> None:
        self._runner = runner
        self._sysfs = sysfs
        self._dev = dev
        self._mount_tables = tuple(mount_tables)
        self._block = block or KernelBlockDevices()

    def path(self, name: str) -> Path:
        """The device node of a disk; `wait_for_node` says whether it is there."""
        return self._dev / name

    def attribute(self, name: str, attribute: str) -> str:
        """The text of a sysfs file of a disk, stripped; "" when it (or the disk) is not there."""
        return read_attribute(self._sysfs / "block" / name / attribute)

    def size_bytes(self, name: str) -> int:
        """The size the kernel knows; 0 when the disk is gone."""
        return int(self.attribute(name, "size") or 0) * _SECTOR_BYTES

    def describe(self, name: str, *, generation: str) -> Device | None:
        """The disk as a Device, or None when it is gone."""
        major_minor = self.attribute(name, "dev")
        if not major_minor:
            return None
        return Device(
            path=self.path(name), major_minor=major_minor, size_bytes=self.size_bytes(name), generation=generation
        )

    def names(self, name: str) -> frozenset[str]:
        """What the disk says it is, now; see BlockDevices.names."""
        return self._block.names(self.path(name))

    def wait_for_node(self, name: str, deadline: Deadline) -> None:
        """Wait until the device node exists and is this disk's; raises Unavailable when it does not come."""
        path = self.path(name)
        try:
            wait_until(lambda: self.has_node(name), deadline.within(_NODE_SECONDS), what=f"the device node {path}")
        except Timeout as error:
            number = self.attribute(name, "dev") or "gone"
            raise Unavailable(
                f"{path}: no device node of the disk {name} ({number}); the driver must see the host's /dev (in a "
                "container, mount it), then repeat"
            ) from error

    def has_node(self, name: str) -> bool:
        """True if the device node is there and is this disk's."""
        try:
            found = self.path(name).stat()
        except FileNotFoundError:
            return False
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        return stat.S_ISBLK(found.st_mode) and number == self.attribute(name, "dev")

    def users(self, name: str) -> list[str]:
        """Who uses the disk or a partition of it, in words: mounts, holders (device mapper, RAID); [] = nobody."""
        folder = self._sysfs / "block" / name
        parts = {name: self.attribute(name, "dev")}
        parts |= {p.parent.name: read_attribute(p.parent / "dev") for p in folder.glob("*/partition")}
        found = []
        for part in parts:
            holders = folder / "holders" if part == name else folder / part / "holders"
            found += [f"held by {self._holder(path.name)}" for path in sorted(holders.glob("*"))]
        for mount in self._mounts():
            if mount.shows(parts, self._dev) and (words := f"mounted on {mount.point}") not in found:
                found.append(words)
        if not found and self._block.held(self.path(name)):
            found.append("opened exclusively by another process or mounted in another mount namespace")
        return found

    def refuse_if_used(self, name: str, what: str) -> None:
        """Raise InUse if somebody uses the disk; `what` starts the message."""
        users = self.users(name)
        if users:
            raise InUse(f"{what}: {self.path(name)} is in use ({'; '.join(users[:4])}); end that and repeat")

    def flush(self, name: str, deadline: Deadline) -> None:
        """Write the kernel's dirty pages of the device itself down to the disk."""
        self._runner.run([*_FLUSH, os.fspath(self.path(name))], deadline=deadline)

    def write(self, path: Path, text: str, deadline: Deadline) -> int:
        """Write a line into a sysfs file; returns the exit code (0 = taken)."""
        return self._runner.run([*_WRITE, os.fspath(path)], deadline=deadline, input=text + "\n", ok=None).returncode

    def multipath_map(self, name: str) -> str:
        """The multipath map that has taken the disk, or ""."""
        for holder in (self._sysfs / "block" / name / "holders").glob("dm-*"):
            if self.attribute(holder.name, "dm/uuid").startswith("mpath-"):
                return self._holder(holder.name)
        return ""

    def _holder(self, name: str) -> str:
        label = self.attribute(name, "dm/name")
        return f"{name} ({label})" if label else name

    def _mounts(self) -> list["_Mount"]:
        found = []
        for table in self._mount_tables:
            try:
                text = table.read_text(errors="surrogateescape")
            except (FileNotFoundError, PermissionError):
                continue  # no such process, or one that we may not look at: the other table and the open test remain
            found += [mount for line in text.splitlines() if (mount := _parse_mount(line))]
        return found


@dataclass(frozen=True)
class _Mount:
    major_minor: str
    root: str
    point: str
    fs_type: str
    source: str

    def shows(self, parts: dict[str, str], dev: Path) -> bool:
        """True if this mount is of one of `parts` (name -> major:minor).

        Beside the plain case: btrfs has device numbers of its own, so its source is compared; and a raw block volume
        is published as a bind mount of its device node.
        """
        if self.major_minor in parts.values():
            return True
        if self.fs_type in ("devtmpfs", "tmpfs"):
            return any(self.root == f"/{part}" or self.root.endswith(f"/dev/{part}") for part in parts)
        return any(self.source == os.fspath(dev / part) for part in parts)


def _parse_mount(line: str) -> _Mount | None:
    """A line of mountinfo (proc_pid_mountinfo(5)), or None when it is not one."""
    left, separator, right = line.partition(" - ")
    fields, rest = left.split(" "), right.split(" ")
    if not separator or len(fields) < 6 or len(rest) < 2:
        return None
    return _Mount(fields[2], _unescape(fields[3]), _unescape(fields[4]), rest[0], _unescape(rest[1]))


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def read_attribute(path: Path) -> str:
    """The text of a sysfs file, stripped; "" when it is gone or its object is on the way out."""
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""
