"""The use cases of a CNODE: stage, unstage, publish, unpublish, stats, grow. No proto here.

What is attached and mounted is read from sysfs and mountinfo every time, never remembered: a restarted service, a lost
state folder or a rebooted machine tell no lies. The one thing that is remembered is which publication's device was
formatted, so that it never is again.
"""

import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi import publish_context
from csi.connectors.base import Connector
from csi.deadline import Deadline
from csi.errors import Busy, Conflict, DataLoss, DriverError, InUse, NotFound
from csi.fs.format import DEFAULT_FS, Filesystems
from csi.fs.mounts import Mount, Mounts
from csi.fs.paths import check_target
from csi.fs.usage import Usage, block_size, filesystem_usage
from csi.locks import VolumeLocks
from csi.log import get_logger
from csi.model import TOPOLOGY_NODE, VOLUME_ID, AccessMode, Attachment, Capability, Chap, Device, NodeId
from csi.records import RecordStore
from csi.sealing import NodeKey


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
        self._records = records
        self._formatted = Formatted(records)
        self._locks = locks
        self._key = key
        self._name = name
        self._read_initiator = read_initiator
        self._roots = tuple(target_roots)
        self._max_volumes = max_volumes
        self._swept = False
        self._log = get_logger("staging")

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
        InUse when the staging path is taken or an older attachment is in use; Conflict for another filesystem or mode.
        """
        check_target(staging_path, roots=self._roots)
        attachment = self._open_context(volume_id, publish_context)
        with self._locks.hold(volume_id):
            self._remember(volume_id, "staging_paths", staging_path)  # first: what has no record is swept
            device = self._connectors[attachment.protocol].connect(attachment, deadline)
            if capability.block:
                return
            self._clear_dead_layers(staging_path, device, deadline)
            layers = self._mounts.at(staging_path)
            readonly = attachment.readonly or _reads_only(capability)
            if layers:
                _check_staged(volume_id, layers[-1], capability, readonly=readonly)
                fs_type, may_be_small = layers[-1].fs_type, True
            else:
                fs_type, may_be_small = self._see_filesystem(attachment, device, capability, deadline)
                self._mounts.ensure_directory(staging_path)
                self._mounts.mount(
                    device.path,
                    staging_path,
                    fs_type=fs_type,
                    flags=capability.mount_flags,
                    readonly=readonly,
                    deadline=deadline,
                )
            if may_be_small and not readonly:
                # A crash between the growth of the device and that of its filesystem is made good here.
                self._grow(device, fs_type, staging_path, deadline)

    def unstage(self, volume_id: str, *, staging_path: Path, deadline: Deadline) -> None:
        """NodeUnstageVolume: unmount every layer, flush, detach, leave nothing. Not staged is fine.

        Raises InUse while something else uses the device; the message names it.
        """
        check_target(staging_path, roots=self._roots)
        with self._locks.hold(volume_id):
            self._unmount(volume_id, staging_path, deadline)
            others = [
                path
                for path in self._paths(volume_id, "staging_paths")
                if path != staging_path and self._mounts.at(path)
            ]
            if others:
                self._write_paths(volume_id, "staging_paths", others)
                return
            for connector in self._connectors.values():
                connector.disconnect(volume_id, deadline)
            self._records.remove(volume_id)

    def _open_context(self, volume_id: str, context: Mapping[str, str]) -> Attachment:
        def open_sealed(sealed: str, generation: str) -> Chap:
            return self._key.open(sealed, bound_to=publish_context.binding(volume_id, str(self._node_id()), generation))

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
        if capability.fs_type and found != wanted:
            raise Conflict(f"{where}: has a {found} filesystem, {wanted} was asked for; use fs_type {found}")
        if not self._mounts_of(device) and not attachment.readonly:
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
        if all(_shows(layer, device) for layer in layers):
            return
        for layer in layers:
            if not _shows(layer, device) and _is_alive(layer):
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
        deadline: Deadline,
    ) -> None:
        """NodePublishVolume: bind the staged filesystem, or the device node, to the container's path.

        Raises InUse when the volume is not staged, or a single writer has it at another path already; Conflict when the
        path has it in another way.
        """
        check_target(staging_path, roots=self._roots)
        check_target(target_path, roots=self._roots)
        readonly = readonly or _reads_only(capability)
        with self._locks.hold(volume_id):
            device = self._staged_device(volume_id, staging_path, capability)
            source = device.path if capability.block else staging_path
            layers = self._mounts.at(target_path)
            if layers:
                _check_published(volume_id, layers[-1], target_path, device, capability, readonly=readonly)
                if not readonly or "ro" in layers[-1].options:
                    return
            elif capability.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
                self._check_single(volume_id, target_path)
            self._remember(volume_id, "target_paths", target_path)
            if capability.block:
                self._mounts.ensure_file(target_path)
            else:
                self._mounts.ensure_directory(target_path)
            self._mounts.bind(source, target_path, readonly=readonly, deadline=deadline)

    def unpublish(self, volume_id: str, *, target_path: Path, deadline: Deadline) -> None:
        """NodeUnpublishVolume: unmount every layer and remove the path. Not published is fine."""
        check_target(target_path, roots=self._roots)
        with self._locks.hold(volume_id):
            self._unmount(volume_id, target_path, deadline)
            self._mounts.remove_target(target_path)
            self._forget(volume_id, "target_paths", target_path)

    def _staged_device(self, volume_id: str, staging_path: Path, capability: Capability) -> Device:
        device = self._find(volume_id)
        if device is None:
            raise InUse(f"volume {volume_id}: not attached here; NodeStageVolume comes first")
        if not capability.block:
            layers = self._mounts.at(staging_path)
            if not layers or not _shows(layers[-1], device):
                raise InUse(f"volume {volume_id}: not mounted at {staging_path}; NodeStageVolume comes first")
        return device

    def _check_single(self, volume_id: str, target_path: Path) -> None:
        """By our own records: other mounts of the device may be mirrors of one mount, by propagation."""
        for path in self._paths(volume_id, "target_paths"):
            if path != target_path and self._mounts.at(path):
                raise InUse(
                    f"volume {volume_id}: SINGLE_NODE_SINGLE_WRITER, and at {path} already; unpublish it there first"
                )

    # -- stats, grow, info ---------------------------------------------------------------------------------------

    def stats(self, volume_id: str, *, volume_path: Path, staging_path: Path | None, deadline: Deadline) -> list[Usage]:
        """NodeGetVolumeStats. Raises NotFound when the volume is not at the path."""
        check_target(volume_path, roots=self._roots)
        with self._locks.hold(volume_id):
            device = self._at(volume_id, volume_path)
            if self._is_block(volume_path):
                size_bytes = block_size(device.path)
                return [Usage("bytes", 0, size_bytes, size_bytes)]
            return filesystem_usage(volume_path)

    def expand(
        self,
        volume_id: str,
        *,
        volume_path: Path,
        staging_path: Path | None,
        block: bool | None,
        required_bytes: int,
        deadline: Deadline,
    ) -> int:
        """NodeExpandVolume: rescan the device, grow the filesystem; returns the device's size in bytes.

        block None = seen from the path. Raises NotFound when the volume is not at the path.
        """
        check_target(volume_path, roots=self._roots)
        with self._locks.hold(volume_id):
            device = self._at(volume_id, volume_path)
            connector = self._connector_of(volume_id)
            device = connector.rescan(volume_id, size_bytes=max(required_bytes, device.size_bytes), deadline=deadline)
            if block or self._is_block(volume_path):
                return device.size_bytes
            mounts = [m for m in self._mounts_of(device) if not m.readonly]
            if not mounts:
                raise InUse(f"volume {volume_id}: mounted read-only; its filesystem grows at the next writable stage")
            self._grow(device, mounts[0].fs_type, mounts[0].mount_point, deadline)
            return device.size_bytes

    def info(self, deadline: Deadline) -> NodeInfo:
        """NodeGetInfo."""
        return NodeInfo(
            node_id=str(self._node_id()), max_volumes=self._max_volumes, topology={TOPOLOGY_NODE: self._name}
        )

    def problems(self, deadline: Deadline) -> list[str]:
        """What makes this CNODE unable to serve, a sentence each; [] = ready."""
        return [problem for connector in self._connectors.values() for problem in connector.problems(deadline)]

    def tend(self, deadline: Deadline) -> None:
        """Background work, called again and again; the first call removes what a crash or a reboot left."""
        if self._swept:
            return
        for connector in self._connectors.values():
            for volume_id in connector.left_over():
                self._sweep(connector, volume_id, deadline)
        self._swept = True

    def _sweep(self, connector: Connector, volume_id: str, deadline: Deadline) -> None:
        """Detach a volume that nobody staged and nobody uses: a dead session is retried by iscsid for ever."""
        try:
            with self._locks.hold(volume_id, background=True):
                if self._records.read(volume_id) is None:
                    connector.disconnect(volume_id, deadline)
                    self._log.info("detached what an earlier life left", volume_id=volume_id)
        except Busy:
            return  # a request for it is under way
        except DriverError as error:
            self._log.warning("left attached", volume_id=volume_id, error=str(error))

    # -- parts ---------------------------------------------------------------------------------------------------

    def _node_id(self) -> NodeId:
        return NodeId(name=self._name, public_key=self._key.public, initiator=self._read_initiator())

    def _mounts_of(self, device: Device) -> list[Mount]:
        return [layer for layer in self._mounts.all() if _shows(layer, device)]

    def _find(self, volume_id: str) -> Device | None:
        for connector in self._connectors.values():
            device = connector.find(volume_id)
            if device is not None:
                return device
        return None

    def _connector_of(self, volume_id: str) -> Connector:
        for connector in self._connectors.values():
            if connector.find(volume_id) is not None:
                return connector
        raise NotFound(f"volume {volume_id}: not attached here")

    def _at(self, volume_id: str, path: Path) -> Device:
        """The device of a volume that is staged or published at `path`, else NotFound."""
        device = self._find(volume_id)
        if device is None:
            raise NotFound(f"volume {volume_id}: not attached here")
        layers = self._mounts.at(path)
        here = _is_node_of(path, device) if self._is_block(path) else bool(layers) and _shows(layers[-1], device)
        if not here and path not in self._paths(volume_id, "staging_paths"):
            raise NotFound(f"volume {volume_id}: not at {path}")
        return device

    def _unmount(self, volume_id: str, path: Path, deadline: Deadline) -> None:
        """Unmount every layer at a path, if it is this volume's: a wrong path must not take down another mount."""
        device = self._find(volume_id)
        for layer in self._mounts.at(path):
            ours = device is not None and (_shows(layer, device) or _is_node_of(path, device))
            gone = not self._shows_another(volume_id, path) if layer.fs_type == "devtmpfs" else not _is_alive(layer)
            if not ours and gone:
                ours = True  # what it showed is gone: the rest of an attachment that died
            if not ours:
                raise InUse(f"{path}: {layer.source} is mounted there, not volume {volume_id}; nothing was unmounted")
        self._mounts.unmount_all(path, deadline)

    def _shows_another(self, volume_id: str, path: Path) -> bool:
        """Whether a device node at a path is the living disk of another volume that was published there.

        By the records too: the number of a disk that is gone may be that of another one by now.
        """
        for other in self._records.names():
            if VOLUME_ID.fullmatch(other) and other != volume_id and path in self._paths(other, "target_paths"):
                device = self._find(other)
                if device is not None and _is_node_of(path, device):
                    return True
        return False

    def _grow(self, device: Device, fs_type: str, mount_point: Path, deadline: Deadline) -> None:
        self._filesystems.grow(device.path, fs_type=fs_type, mount_point=mount_point, deadline=deadline)

    def _is_block(self, path: Path) -> bool:
        try:
            return stat.S_ISBLK(path.stat().st_mode)
        except FileNotFoundError as error:
            raise NotFound(f"{path}: does not exist") from error

    def _paths(self, volume_id: str, kind: str) -> list[Path]:
        """The paths of a volume on record; kind: "staging_paths" or "target_paths". Not all need be mounted still."""
        record = self._records.read(volume_id) or {}
        return [Path(path) for path in record.get(kind, [])]

    def _remember(self, volume_id: str, kind: str, path: Path) -> None:
        paths = self._paths(volume_id, kind)
        if path not in paths:
            self._write_paths(volume_id, kind, [*paths, path])

    def _forget(self, volume_id: str, kind: str, path: Path) -> None:
        paths = self._paths(volume_id, kind)
        if path in paths:
            self._write_paths(volume_id, kind, [other for other in paths if other != path])

    def _write_paths(self, volume_id: str, kind: str, paths: Sequence[Path]) -> None:
        record = {**(self._records.read(volume_id) or {}), kind: [str(path) for path in paths]}
        record.pop("format", None)
        self._records.write(volume_id, record)


class Formatted:
    """The publications whose device this node has formatted, so that it never does so twice.

    It has to outlive the stage: the same publication may be staged again after an unstage. One bounded record for all,
    since the node is never told that a publication has ended. Once a filesystem was there for some seconds the SNODE
    knows as well, so an entry that falls out at the far end is not missed.
    """

    _RECORD = "formatted"
    _MOST = 1000

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self._lock = threading.Lock()

    def __contains__(self, generation: str) -> bool:
        return generation in self._generations()

    def add(self, generation: str) -> None:
        """Remember, durably."""
        with self._lock:
            kept = [*self._generations(), generation][-self._MOST :]
            self._records.write(self._RECORD, {"generations": kept})

    def _generations(self) -> list[str]:
        record = self._records.read(self._RECORD) or {"generations": []}
        return list(record["generations"])


def _reads_only(capability: Capability) -> bool:
    return capability.access_mode.reader_only or "ro" in capability.mount_flags


def _check_staged(volume_id: str, layer: Mount, capability: Capability, *, readonly: bool) -> None:
    """Raise Conflict unless the mount that stands is what a repeated NodeStageVolume asks for."""
    if capability.fs_type and layer.fs_type != capability.fs_type:
        raise Conflict(
            f"volume {volume_id}: staged with {layer.fs_type}, {capability.fs_type} was asked for; unstage it first"
        )
    if layer.readonly != readonly:
        how = "read-only (errors of the device make it so: see the kernel log)" if not readonly else "writable"
        raise Conflict(f"volume {volume_id}: staged {how} at {layer.mount_point}; unstage it first")


def _check_published(
    volume_id: str, layer: Mount, path: Path, device: Device, capability: Capability, *, readonly: bool
) -> None:
    """Raise Conflict unless the bind mount that stands is this volume, not narrower than asked for."""
    same = _is_node_of(path, device) if capability.block else _shows(layer, device)
    if not same:
        raise InUse(f"{path}: {layer.source} is mounted there, not volume {volume_id}; unpublish it first")
    if "ro" in layer.options and not readonly:
        raise Conflict(
            f"volume {volume_id}: published read-only at {path}; unpublish it before it is published writable"
        )


def _is_node_of(path: Path, device: Device) -> bool:
    """Whether a path is the device node of this device."""
    try:
        status = path.stat()
    except OSError:
        return False  # gone, or a dead device: not this one
    return (
        stat.S_ISBLK(status.st_mode) and f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" == device.major_minor
    )


def _shows(layer: Mount, device: Device) -> bool:
    """Whether a mount is of this device. btrfs mounts have a device number of their own: there the source tells."""
    if layer.fs_type == "btrfs":
        return _is_node_of(Path(layer.source), device)
    return layer.major_minor == device.major_minor


def _is_alive(layer: Mount) -> bool:
    """Whether the device of a mount is still there. Number 0:* has none (tmpfs, overlay): alive while mounted."""
    if layer.fs_type == "btrfs":
        return Path(layer.source).exists()
    return layer.major_minor.startswith("0:") or Path(f"/sys/dev/block/{layer.major_minor}").exists()
