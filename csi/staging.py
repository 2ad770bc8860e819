"""The use cases of a CNODE: stage, unstage, publish, unpublish, stats, grow. No proto here.

What is attached and mounted is read from sysfs and mountinfo every time, never remembered: a restarted service, a lost
state folder or a rebooted machine tell no lies. What was asked for is remembered (stage_records.py), and which
publication's device was formatted, so that it never is again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csi import publish_context, stage_rules
from csi.attached import Attached, shows, shows_node
from csi.connectors.base import Connector
from csi.deadline import Deadline
from csi.errors import Conflict, DataLoss, DriverError, InUse, NotFound, Unavailable
from csi.fs.format import DEFAULT_FS, Filesystems
from csi.fs.mounts import Mounts
from csi.fs.usage import Usage, block_size, filesystem_usage
from csi.locks import VolumeLocks
from csi.model import TOPOLOGY_NODE, Attachment, Capability, Chap, Complaint, Device, NodeId
from csi.records import RecordStore
from csi.sealing import NodeKey
from csi.stage_records import Asked, Formatted, StageRecord, StageRecords
from csi.sweep import Sweep
from csi.targets import Targets


@dataclass(frozen=True)
class NodeInfo:
    """What NodeGetInfo answers. max_volumes 0 = the CO decides."""

    node_id: str
    max_volumes: int
    topology: dict[str, str]


class Staging:
    """The volumes on one CNODE."""

    def __init__(
        self,
        connectors: Sequence[Connector],
        *,
        filesystems: Filesystems,
        mounts: Mounts,
        records: RecordStore,
        locks: VolumeLocks,
        key: NodeKey,
        name: str,
        read_initiator: Callable[[], str],
        target_roots: Sequence[Path],
        max_volumes: int = 0,
    ) -> None:
        """read_initiator: the machine's iSCSI initiator name, "" when it has none."""
        self._connectors = {connector.protocol: connector for connector in connectors}
        self._filesystems = filesystems
        self._mounts = mounts
        self._records = StageRecords(records)
        self._attached = Attached(connectors, mounts=mounts, records=self._records)
        self._targets = Targets(self._attached, mounts=mounts, records=self._records, roots=target_roots)
        self._formatted = Formatted(records)
        self._locks = locks
        self._key = key
        self._name = name
        self._read_initiator = read_initiator
        self._roots = tuple(target_roots)
        self._max_volumes = max_volumes
        self._sweep = Sweep(connectors, records=self._records, locks=locks)

    # -- stage, unstage ------------------------------------------------------------------------------------------

    def stage(
        self,
        volume_id: str,
        *,
        staging_path: Path,
        capability: Capability,
        publish_context: Mapping[str, str],
        deadline: Deadline,
    ) -> None:
        """NodeStageVolume: attach, verify, format if permitted and blank, check, mount, grow.

        Raises DataLoss when there is no filesystem and no permission to make one, or another thing than a filesystem;
        InUse when the staging path is taken or an older attachment is in use; Conflict for another filesystem, flags or
        mode; Invalid when the volume was published for the other access type.
        """
        self._check_path(staging_path, "staging_target_path")
        attachment = self._open_context(volume_id, publish_context)
        stage_rules.check_access_type(attachment, capability)
        asked = Asked(capability, readonly=attachment.readonly or stage_rules.reads_only(capability))
        with self._locks.hold(volume_id):
            before = self._records.read(volume_id)
            record = before or StageRecord(complete=self._attached.find(volume_id) is None)
            if staging_path not in record.staged:
                record = record.with_staged(staging_path, asked)
                self._records.write(volume_id, record)  # first: what has no record is swept
            try:
                device = self._connectors[attachment.protocol].connect(attachment, deadline)
                if capability.block:
                    self._stage_block(attachment, device, record, staging_path, asked)
                else:
                    self._stage_mount(attachment, device, record, staging_path, asked, deadline)
            except DriverError:
                if before is None and self._attached.find(volume_id) is None:
                    self._records.try_remove(volume_id)  # refused, and there is nothing to unstage
                raise

    def _stage_block(
        self, attachment: Attachment, device: Device, record: StageRecord, staging_path: Path, asked: Asked
    ) -> None:
        volume_id = attachment.volume_id
        for layer in self._attached.mounts_of(device):
            raise Conflict(
                f"volume {volume_id}: mounted as a filesystem at {layer.mount_point}; unstage it there before it is "
                "staged as block"
            )
        self._formatted.add(attachment.generation)  # from now on there may be data without any signature
        self._remember_staged(volume_id, record, staging_path, asked)

    def _stage_mount(
        self,
        attachment: Attachment,
        device: Device,
        record: StageRecord,
        staging_path: Path,
        asked: Asked,
        deadline: Deadline,
    ) -> None:
        volume_id, capability = attachment.volume_id, asked.capability
        for bind in self._attached.binds_of(device):
            raise InUse(f"volume {volume_id}: published raw at {bind.mount_point}; unpublish it there first")
        self._clear_dead_layers(staging_path, device, deadline)
        layers = self._mounts.at(staging_path)
        if layers and staging_path in record.targets:
            raise Conflict(
                f"volume {volume_id}: published at {staging_path}; stage it elsewhere, or unpublish it first"
            )
        if layers:
            stage_rules.check_staged(volume_id, layers[-1], record.staged.get(staging_path), asked)
            fs_type, may_be_small = layers[-1].fs_type, True
        else:
            fs_type, may_be_small = self._see_filesystem(attachment, device, capability, deadline)
            with stage_rules.naming("staging_target_path"):
                self._mounts.ensure_directory(staging_path)
            self._remember_staged(volume_id, record, staging_path, asked)
            self._mounts.mount(
                device.path,
                staging_path,
                fs_type=fs_type,
                flags=capability.mount_flags,
                readonly=asked.readonly,
                deadline=deadline,
            )
        if may_be_small and not asked.readonly:
            # A crash between the growth of the device and that of its filesystem is made good here.
            self._grow(device, fs_type, staging_path, deadline)

    def _remember_staged(self, volume_id: str, record: StageRecord, staging_path: Path, asked: Asked) -> None:
        """Replace what an earlier request had asked for that came to nothing."""
        if record.staged.get(staging_path) != asked:
            self._records.write(volume_id, record.with_staged(staging_path, asked))

    def unstage(self, volume_id: str, *, staging_path: Path, deadline: Deadline) -> None:
        """NodeUnstageVolume: unmount every layer, flush, detach, leave nothing. Not staged is fine.

        Raises InUse while something else uses the device; the message names it.
        """
        self._check_path(staging_path, "staging_target_path")
        with self._locks.hold(volume_id):
            self._attached.unmount(volume_id, staging_path, deadline)
            record = self._records.read(volume_id) or StageRecord()
            others = {
                path: asked for path, asked in record.staged.items() if path != staging_path and self._mounts.at(path)
            }
            if others:
                self._records.try_write(volume_id, replace(record, staged=others))
                return
            for connector in self._connectors.values():
                connector.disconnect(volume_id, deadline)
            self._records.try_remove(volume_id)

    def _open_context(self, volume_id: str, context: Mapping[str, str]) -> Attachment:
        def open_sealed(sealed: str) -> Chap:
            return self._key.open(sealed, bound_to=publish_context.binding(volume_id, str(self._node_id()), context))

        return publish_context.decode(volume_id, context, open_sealed=open_sealed)

    def _see_filesystem(
        self, attachment: Attachment, device: Device, capability: Capability, deadline: Deadline
    ) -> tuple[str, bool]:
        """The filesystem on the device, made if it is new and that is permitted; checked unless it is in use.

        Also whether it may be smaller than the device.
        """
        wanted = capability.fs_type or DEFAULT_FS
        look = self._filesystems.look(device.path, deadline)
        found = look.signature
        where = f"volume {attachment.volume_id} on {device.path}"
        if found.startswith("?"):
            raise DataLoss(f"{where}: holds {found[1:]}, not a filesystem of this driver; nothing was changed")
        if not found:
            self._check_permission(attachment, where)
            self._filesystems.make(look, fs_type=wanted, deadline=deadline)
            self._formatted.add(attachment.generation)
            return wanted, False
        if attachment.may_format:
            self._formatted.add(attachment.generation)  # a kill may have come between its making and this
        if capability.fs_type and found != wanted:
            raise Conflict(f"{where}: has a {found} filesystem, {wanted} was asked for; use fs_type {found}")
        if not self._attached.mounts_of(device) and not attachment.readonly:
            self._filesystems.check(device.path, fs_type=found, deadline=deadline)
            self._filesystems.grow_before_mount(look, deadline)
        return found, not look.fills_device

    def _check_permission(self, attachment: Attachment, where: str) -> None:
        formatted = attachment.generation in self._formatted
        if attachment.may_format and not formatted and not attachment.readonly:
            return
        why = (
            "it was formatted before" if formatted else
            "it is attached read-only and was never written" if attachment.readonly else
            "the SNODE says that it has held data"
        )  # fmt: skip
        raise DataLoss(
            f"{where}: no filesystem is found, and none is made, since {why}. Look at the device by hand (blkid, fsck "
            "with a backup superblock); if its data is truly not needed, delete the volume and make a new one"
        )

    def _clear_dead_layers(self, path: Path, device: Device, deadline: Deadline) -> None:
        """Remove what an earlier life left mounted here: devices that are gone, or volumes that are not this one.

        A mount of a living foreign device is not ours to remove.
        """
        layers = self._mounts.at(path)
        if all(shows(layer, device) for layer in layers):
            return
        for layer in layers:
            if not shows(layer, device) and self._attached.is_alive(layer):
                raise InUse(f"{path}: {layer.source} is mounted there, not this volume; unmount it first")
        self._mounts.unmount_all(path, deadline)

    # -- publish, unpublish --------------------------------------------------------------------------------------

    def publish(
        self,
        volume_id: str,
        *,
        staging_path: Path,
        target_path: Path,
        capability: Capability,
        readonly: bool,
        publish_context: Mapping[str, str],
        deadline: Deadline,
    ) -> None:
        """NodePublishVolume; see Targets.publish. publish_context: may be empty, then it is not compared."""
        self._check_path(staging_path, "staging_target_path")
        self._check_path(target_path, "target_path")
        stage_rules.check_apart(staging_path, target_path)
        asked = Asked(capability, readonly=readonly or stage_rules.reads_only(capability))
        with self._locks.hold(volume_id):
            self._attached.check_generation(volume_id, publish_context)
            self._targets.publish(
                volume_id, asked, staging_path=staging_path, target_path=target_path, deadline=deadline
            )

    def unpublish(self, volume_id: str, *, target_path: Path, deadline: Deadline) -> None:
        """NodeUnpublishVolume; see Targets.unpublish."""
        self._check_path(target_path, "target_path")
        with self._locks.hold(volume_id):
            self._targets.unpublish(volume_id, target_path, deadline)

    # -- stats, grow, info ---------------------------------------------------------------------------------------

    def stats(self, volume_id: str, *, volume_path: Path, deadline: Deadline) -> list[Usage]:
        """NodeGetVolumeStats. Raises NotFound when the volume is not at the path."""
        self._check_path(volume_path, "volume_path")
        with self._locks.hold(volume_id):
            device, is_block = self._at(volume_id, volume_path)
            if is_block:
                size_bytes = block_size(device.path)
                return [Usage("bytes", 0, size_bytes, size_bytes)]
            return filesystem_usage(volume_path)

    def complaints(self, volume_id: str) -> list[Complaint]:
        """NodeGetVolumeHealth; see Attached.complaints. Takes no lock: it is asked when other requests hang."""
        return self._attached.complaints(volume_id)

    def expand(
        self, volume_id: str, *, volume_path: Path, block: bool | None, required_bytes: int, deadline: Deadline
    ) -> int:
        """NodeExpandVolume: rescan the device, grow the filesystem; returns the device's size in bytes.

        block None = seen from the path. Raises NotFound when the volume is not at the path.
        """
        self._check_path(volume_path, "volume_path")
        with self._locks.hold(volume_id):
            device, is_block = self._at(volume_id, volume_path)
            connector = self._attached.connector_of(volume_id)
            device = connector.rescan(volume_id, size_bytes=max(required_bytes, device.size_bytes), deadline=deadline)
            if block or is_block:
                return device.size_bytes
            mounts = [m for m in self._attached.mounts_of(device) if not m.readonly]
            if not mounts:
                raise InUse(f"volume {volume_id}: mounted read-only; its filesystem grows at the next writable stage")
            self._grow(device, mounts[0].fs_type, mounts[0].mount_point, deadline)
            return device.size_bytes

    def info(self, deadline: Deadline) -> NodeInfo:
        """NodeGetInfo. Raises Unavailable when CSI can't carry this node's id."""
        node_id = self._node_id()
        if node_id.problem():
            raise Unavailable(node_id.problem())
        return NodeInfo(node_id=str(node_id), max_volumes=self._max_volumes, topology={TOPOLOGY_NODE: self._name})

    def problems(self, deadline: Deadline) -> list[str]:
        """What makes this CNODE unable to serve, each as `what is wrong -> the repair`; [] = ready."""
        found = [problem for connector in self._connectors.values() for problem in connector.problems(deadline)]
        too_long = self._node_id().problem()
        return [*found, too_long] if too_long else found

    def tend(self, deadline: Deadline) -> None:
        """Background work, called again and again: removes what a crash or a reboot left."""
        self._sweep.turn(deadline)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _check_path(self, path: Path, field: str) -> None:
        stage_rules.check_path(path, field, roots=self._roots)

    def _node_id(self) -> NodeId:
        return NodeId(name=self._name, public_key=self._key.public, initiator=self._read_initiator())

    def _at(self, volume_id: str, path: Path) -> tuple[Device, bool]:
        """The device of a volume that is staged or published at `path`, and whether as block; else NotFound.

        A volume that is staged as block shows nowhere: there the record has to do.
        """
        device = self._attached.find(volume_id)
        if device is None:
            raise NotFound(f"volume {volume_id}: not attached here")
        layers = self._mounts.at(path)
        if layers and shows(layers[-1], device):
            return device, False
        if layers and shows_node(layers[-1], path, device):
            return device, True
        record = self._records.read(volume_id) or StageRecord()
        staged = record.staged.get(path)
        if layers or staged is None or not staged.capability.block:
            raise NotFound(f"volume {volume_id}: not at {path}")
        return device, True

    def _grow(self, device: Device, fs_type: str, mount_point: Path, deadline: Deadline) -> None:
        self._filesystems.grow(device.path, fs_type=fs_type, mount_point=mount_point, deadline=deadline)
