"""Showing a staged volume to containers, and taking it away: the bind mounts at target paths."""

from collections.abc import Sequence
from pathlib import Path

from csi import stage_rules
from csi.attached import Attached, shows, shows_node
from csi.deadline import Deadline
from csi.errors import InUse
from csi.fs.mounts import Mounts
from csi.model import Device
from csi.stage_records import Asked, StageRecord, StageRecords


class Targets:
    """The targets of all volumes. Callers hold the volume's lock, and have checked the paths."""

    def __init__(self, attached: Attached, *, mounts: Mounts, records: StageRecords, roots: Sequence[Path]) -> None:
        """roots: the folders in which targets lie; none given means that they may lie anywhere."""
        self._attached = attached
        self._mounts = mounts
        self._records = records
        self._roots = tuple(roots)

    def publish(
        self, volume_id: str, asked: Asked, *, staging_path: Path, target_path: Path, deadline: Deadline
    ) -> None:
        """Bind the staged filesystem, or the device node, to the container's path.

        Raises InUse when the volume is not staged, or at another path already in a way that allows no second one, or
        when a raw device should be read-only and is not; Conflict when the path has it in another way.
        """
        block = asked.capability.block
        record = self._records.read(volume_id) or StageRecord()
        device = self._staged_device(volume_id, staging_path, record, asked)
        layers = self._mounts.at(target_path)
        if layers:
            top = layers[-1]
            if not (shows_node(top, target_path, device) if block else shows(top, device)):
                raise InUse(f"{target_path}: {top.source} is mounted there, not volume {volume_id}; unpublish it first")
            stage_rules.check_published(volume_id, top, record.targets.get(target_path), asked)
        else:
            self._check_beside(volume_id, device, record, staging_path, target_path, asked)
        if record.targets.get(target_path) != asked:
            self._records.write(volume_id, record.with_target(target_path, asked))
        if not layers or asked.readonly != ("ro" in layers[-1].options):
            self._bind(device.path if block else staging_path, target_path, asked, deadline)

    def unpublish(self, volume_id: str, target_path: Path, deadline: Deadline) -> None:
        """Unmount every layer and remove the path. Not published is fine."""
        self._attached.unmount(volume_id, target_path, deadline)
        self._mounts.remove_target(target_path)
        record = self._records.read(volume_id)
        if record is None:
            if self._attached.find(volume_id) is not None:
                # The record was lost. The CO knows the volume, and unstages it: it is none to be swept.
                self._records.try_write(volume_id, StageRecord())
        elif target_path in record.targets or not record.complete:
            self._records.try_write(volume_id, record.without_target(target_path))

    def _bind(self, source: Path, target_path: Path, asked: Asked, deadline: Deadline) -> None:
        with stage_rules.naming("target_path"):
            if asked.capability.block:
                self._mounts.ensure_file(target_path)
            else:
                self._mounts.ensure_directory(target_path)
        self._mounts.bind(source, target_path, readonly=asked.readonly, deadline=deadline)

    def _staged_device(self, volume_id: str, staging_path: Path, record: StageRecord, asked: Asked) -> Device:
        """The device, if it is staged at the path for this access type."""
        device = self._attached.find(volume_id)
        if device is None:
            raise InUse(f"volume {volume_id}: not attached here; NodeStageVolume comes first")
        if asked.capability.block:
            staged = record.staged.get(staging_path)
            mounted = [str(layer.mount_point) for layer in self._attached.mounts_of(device)]
            if mounted or (staged is not None and not staged.capability.block):
                at = mounted[0] if mounted else str(staging_path)
                raise InUse(f"volume {volume_id}: staged as a filesystem at {at}, so not to be published as block")
            if asked.readonly and not self._attached.is_readonly(device):
                raise InUse(
                    f"volume {volume_id}: a raw device takes writes through a read-only mount too; publish it "
                    "read-only with ControllerPublishVolume (readonly)"
                )
            return device
        layers = self._mounts.at(staging_path)
        if not layers or not shows(layers[-1], device):
            raise InUse(f"volume {volume_id}: not mounted at {staging_path}; NodeStageVolume comes first")
        return device

    def _check_beside(
        self, volume_id: str, device: Device, record: StageRecord, staging_path: Path, target_path: Path, asked: Asked
    ) -> None:
        """By our own records: other mounts of the device may be mirrors of one mount, by propagation."""
        others = {path: other for path, other in record.targets.items() if path != target_path}
        stage_rules.check_beside(
            volume_id, {path: other for path, other in others.items() if self._mounts.at(path)}, asked
        )
        if record.complete:
            return
        known = {staging_path, target_path, *record.staged}
        layers = self._attached.binds_of(device) if asked.capability.block else self._attached.mounts_of(device)
        places = [layer.mount_point for layer in layers if layer.reachable and layer.mount_point not in known]
        below = [p for p in places if not self._roots or any(root in p.parents for root in self._roots)]
        stage_rules.check_unrecorded(volume_id, below, asked)
