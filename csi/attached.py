"""What of a volume is on this node now: its device, and the mounts and raw binds of it. Read afresh at each call.

Nothing here asks a mounted filesystem, since one that is dead answers with errors, or never; but `complaints` does when
the device is well.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from csi.connectors.base import Connector
from csi.deadline import Deadline
from csi.errors import InUse, NotFound
from csi.fs.mounts import Mount, Mounts
from csi.model import Complaint, Device
from csi.stage_records import Asked, StageRecords

_SYSFS_BLOCK = Path("/sys/dev/block")


class Attached:
    """Questions about the volumes of all connectors, and taking down what is mounted of one."""

    def __init__(self, connectors: Sequence[Connector], *, mounts: Mounts, records: StageRecords) -> None:
        self._connectors = tuple(connectors)
        self._mounts = mounts
        self._records = records
        self._asked: set[Path] = set()

    def find(self, volume_id: str) -> Device | None:
        """The device of a volume, or None when it is not attached."""
        for connector in self._connectors:
            device = connector.find(volume_id)
            if device is not None:
                return device
        return None

    def check_generation(self, volume_id: str, publish_context: Mapping[str, str]) -> None:
        """Raise InUse when the volume is attached by another publication than the one that the context tells of.

        Nomad does not stage anew where something is still mounted at its staging path: what an earlier attachment left
        there, which the SNODE has ended, would be shown to a container.
        """
        device, generation = self.find(volume_id), publish_context.get("generation", "")
        if device is not None and generation and device.generation not in ("", generation):
            raise InUse(
                f"volume {volume_id}: staged here by an earlier publication, which the SNODE has ended; unstage it, "
                "and stage it with its new publish_context"
            )

    def connector_of(self, volume_id: str) -> Connector:
        """The connector that has the volume. Raises NotFound."""
        for connector in self._connectors:
            if connector.find(volume_id) is not None:
                return connector
        raise NotFound(f"volume {volume_id}: not attached here")

    def mounts_of(self, device: Device) -> list[Mount]:
        """Every mount of the filesystem on a device."""
        return [layer for layer in self._mounts.all() if shows(layer, device)]

    def binds_of(self, device: Device) -> list[Mount]:
        """Every place where a device is published raw."""
        return self._mounts.of_node(device.path)

    def unmount(self, volume_id: str, path: Path, deadline: Deadline) -> None:
        """Unmount every layer at a path, if it is this volume's: a wrong path must not take down another mount.

        What shows a device that is gone is the rest of an attachment that died, and goes too.
        Raises InUse when something else is mounted there.
        """
        device = self.find(volume_id)
        for layer in self._mounts.at(path):
            ours = device is not None and (shows(layer, device) or shows_node(layer, path, device))
            if ours or self._is_dead(volume_id, path, layer):
                continue
            raise InUse(f"{path}: {layer.source} is mounted there, not volume {volume_id}; nothing was unmounted")
        self._mounts.unmount_all(path, deadline)

    def complaints(self, volume_id: str) -> list[Complaint]:
        """What keeps a volume from being used here; [] = nothing. Raises NotFound when it is not on this node."""
        device, record = self.find(volume_id), self._records.read(volume_id)
        if device is None:
            if record is None:
                raise NotFound(f"volume {volume_id}: neither attached here nor staged on record")
            return [Complaint("DeviceGone", f"volume {volume_id}: staged here, but its device is gone; stage it again")]
        found = [complaint for connector in self._connectors for complaint in connector.complaints(volume_id)]
        if not found and record is not None:
            found = [
                Complaint(
                    "FilesystemStopped",
                    f"volume {volume_id}: the filesystem at {path} stopped writing after an error of its device; see "
                    "the kernel's log, then unstage the volume and stage it again",
                )
                for path, asked in record.staged.items()
                if self._has_stopped(path, device, asked)
            ]
        return found

    def is_alive(self, layer: Mount) -> bool:
        """Whether the device of a mount is still there. Number 0:* has none (tmpfs, overlay): alive while mounted."""
        if layer.fs_type == "btrfs":
            return Path(layer.source).exists()
        return layer.major_minor.startswith("0:") or (_SYSFS_BLOCK / layer.major_minor).exists()

    def is_readonly(self, device: Device) -> bool:
        """Whether the device itself takes no writes."""
        try:
            return (_SYSFS_BLOCK / device.major_minor / "ro").read_text(encoding="ascii").strip() == "1"
        except OSError:
            return False  # gone: what comes next finds that out by itself

    def _has_stopped(self, path: Path, device: Device, asked: Asked) -> bool:
        """Whether the filesystem staged at a path gave up: ext4 goes read-only, XFS answers all with an error."""
        layers = self._mounts.at(path)
        if not layers or not shows(layers[-1], device):
            return False
        if layers[-1].readonly and not asked.readonly:
            return True
        if path in self._asked:
            return False  # a filesystem that hangs keeps the one that asked it, and no others
        self._asked.add(path)
        try:
            path.stat()
        except OSError:
            return True
        finally:
            self._asked.discard(path)
        return False

    def _is_dead(self, volume_id: str, path: Path, layer: Mount) -> bool:
        """Whether a mount that is not of this volume's device shows nobody's any more."""
        if layer.fs_type != "devtmpfs":
            return not self.is_alive(layer)
        # A device node. By the records too: the number of a disk that is gone may be that of another one by now.
        for other in self._records.volume_ids():
            record = self._records.read(other) if other != volume_id else None
            device = self.find(other) if record is not None and path in record.targets else None
            if device is not None and shows_node(layer, path, device):
                return False
        return True


def shows(layer: Mount, device: Device) -> bool:
    """Whether a mount is of this device. btrfs mounts have a device number of their own: there the source tells."""
    if layer.fs_type == "btrfs":
        return is_node_of(Path(layer.source), device)
    return layer.major_minor == device.major_minor


def shows_node(layer: Mount, path: Path, device: Device) -> bool:
    """Whether the mount at a path is a bind of this device's node. The root of a filesystem is no node."""
    return layer.root != "/" and is_node_of(path, device)


def is_node_of(path: Path, device: Device) -> bool:
    """Whether a path is the device node of this device."""
    try:
        status = path.stat()
    except OSError:
        return False  # gone, or a dead device: not this one
    return (
        stat.S_ISBLK(status.st_mode) and f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" == device.major_minor
    )
