"""Between CSI messages and the driver's plain values. Every complaint begins with the field's name.

The order of checks in a servicer: required fields, then sizes, then meanings, so that a request with a field missing
is INVALID_ARGUMENT even if its volume does not exist either.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from csi.errors import Invalid, NotFound, OutOfRange
from csi.fs.flags import check_mount_flags
from csi.fs.format import DEFAULT_FS, FS_TYPES
from csi.model import VOLUME_ID, AccessMode, Capability, NodeId, Volume
from csi.pb import csi_pb2 as pb
from csi.takeover import PARAMETER as TAKEOVER
from csi.takeover import after_seconds

#: CSI spec, "Size Limits".
_LONGEST_STRING = 128
_LARGEST_MAP = 4096
_LONGEST_PATH = 4096
_PATH_FIELDS = frozenset({"staging_target_path", "target_path", "volume_path", "volume_publish_path"})
#: Texts that only the driver makes. One that is too long is not ours, and is answered as any other unknown one.
_OWN_TEXTS = frozenset({"volume_id", "node_id", "starting_token"})
#: Not limited: the driver does not read it, and an orchestrator may add tokens of several KiB to it.
_UNREAD_MAPS = frozenset({"volume_context"})

#: StorageClass parameters that have a meaning; those with the prefix come from Kubernetes' provisioner, with none here.
PARAMETERS = frozenset({"pool", "fs_type", TAKEOVER})
_PROVISIONER_PREFIX = "csi.storage.k8s.io/"


def require(request: Message, *names: str) -> None:
    """Raise Invalid unless all these fields are set (and not empty)."""
    for name in names:
        value = getattr(request, name)
        if not (request.HasField(name) if isinstance(value, Message) else value):
            raise Invalid(f"{name}: required")


def check_sizes(message: Message, *, prefix: str = "") -> None:
    """Raise Invalid for any string or map above CSI's size limits, at any depth."""
    for field, value in message.ListFields():
        name = f"{prefix}{field.name}"
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.name not in _UNREAD_MAPS:
                _check_total(name, (text for item in value.items() for text in item))
        elif field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                check_sizes(part, prefix=f"{name}.")
        elif field.type == FieldDescriptor.TYPE_STRING and not isinstance(value, str):
            _check_total(name, value)  # mount_flags: 4 KiB in all
        elif field.type == FieldDescriptor.TYPE_STRING and field.name not in _OWN_TEXTS:
            limit = _LONGEST_PATH if field.name in _PATH_FIELDS else _LONGEST_STRING
            if len(value.encode()) > limit:
                raise Invalid(f"{name}: {len(value.encode())} bytes; at most {limit} are allowed")


def _check_total(name: str, texts: Iterable[str]) -> None:
    total = sum(len(text.encode()) for text in texts)
    if total > _LARGEST_MAP:
        raise Invalid(f"{name}: {total} bytes in all; at most {_LARGEST_MAP} are allowed")


def check_name(name: str) -> None:
    """Raise Invalid for the control characters that CSI bans in a volume's name."""
    for character in name:
        code = ord(character)
        if code <= 0x08 or code in (0x0B, 0x0C) or 0x0E <= code <= 0x1F or 0x7F <= code <= 0x9F:
            raise Invalid(f"name: has the control character U+{code:04X}, which CSI does not allow")


def is_volume_id(text: str) -> bool:
    """Whether a text can be the id of one of our volumes. No other text ever reaches a path or a command."""
    return VOLUME_ID.fullmatch(text) is not None


def known_id(volume_id: str) -> str:
    """The volume id as it is. Raises NotFound when it can't be one of ours."""
    if not is_volume_id(volume_id):
        raise NotFound(f"volume_id {volume_id[:80]!a}: no volume of this driver has such an id")
    return volume_id


def known_node(node_id: str) -> str:
    """The node id as it is. Raises NotFound when no node of this driver can have given it."""
    try:
        NodeId.parse(node_id)
    except Invalid as error:
        raise NotFound(str(error)) from error
    return node_id


def absolute_path(request: Message, name: str) -> Path:
    """A required path field. Raises Invalid unless it is absolute and free of NUL; what lies there is not looked at."""
    text: str = getattr(request, name)
    if not text:
        raise Invalid(f"{name}: required")
    if "\0" in text:
        raise Invalid(f"{name}: has a NUL character")
    if not text.startswith("/"):
        raise Invalid(f"{name} {text!r}: must be absolute")
    return Path(text)


def volume_path(request: Message) -> Path:
    """The field volume_path of a request about a volume in use. Raises NotFound where no volume can be."""
    require(request, "volume_path")
    try:
        return absolute_path(request, "volume_path")
    except Invalid as error:
        # CSI: "volume does not exist on the specified volume_path" is NOT_FOUND; csi-sanity asks with "some/path".
        raise NotFound(f"no volume at {error}") from error


def check_capability(message: pb.VolumeCapability, *, field: str = "volume_capability") -> None:
    """Raise Invalid when a required part of a capability is missing."""
    if message.WhichOneof("access_type") is None:
        raise Invalid(f"{field}.access_type: required; set block or mount")
    if message.access_mode.mode == pb.VolumeCapability.AccessMode.UNKNOWN:
        raise Invalid(f"{field}.access_mode: required")


def capability(message: pb.VolumeCapability, *, field: str = "volume_capability") -> Capability:
    """The plain value of a capability. Raises Invalid for what is missing or what the driver can't do with it."""
    check_capability(message, field=field)
    number = message.access_mode.mode
    try:
        mode = AccessMode(pb.VolumeCapability.AccessMode.Mode.Name(number))
    except ValueError as error:
        raise Invalid(f"{field}.access_mode: {number} is not a mode that this driver knows") from error
    if message.HasField("block"):
        return Capability(access_mode=mode, block=True)
    mount = message.mount
    if mount.fs_type and mount.fs_type not in FS_TYPES:
        raise Invalid(f"{field}.mount.fs_type {mount.fs_type!r}: supported are {', '.join(FS_TYPES)}")
    if mount.volume_mount_group:
        raise Invalid(f"{field}.mount.volume_mount_group: not supported (no VOLUME_MOUNT_GROUP capability)")
    try:
        check_mount_flags(mount.fs_type or DEFAULT_FS, list(mount.mount_flags))
    except Invalid as error:
        raise Invalid(f"{field}.mount.mount_flags: {error}") from error
    return Capability(access_mode=mode, fs_type=mount.fs_type, mount_flags=tuple(mount.mount_flags))


def capabilities(messages: Sequence[pb.VolumeCapability]) -> list[Capability]:
    """The plain values of the field volume_capabilities."""
    return [capability(message, field=f"volume_capabilities[{at}]") for at, message in enumerate(messages)]


def sizes(capacity: pb.CapacityRange) -> tuple[int, int]:
    """required_bytes and limit_bytes; 0 means none. Raises OutOfRange for negative or contradicting ones."""
    for name in ("required_bytes", "limit_bytes"):
        if getattr(capacity, name) < 0:
            raise OutOfRange(f"capacity_range.{name}: {getattr(capacity, name)} is negative")
    if capacity.limit_bytes and capacity.limit_bytes < capacity.required_bytes:
        raise OutOfRange(
            f"capacity_range.limit_bytes: {capacity.limit_bytes} is less than required_bytes {capacity.required_bytes}"
        )
    return capacity.required_bytes, capacity.limit_bytes


def parameters(fields: Mapping[str, str]) -> dict[str, str]:
    """The parameters that mean something. Raises Invalid for an unknown one: a typing error must not pass silently."""
    for key in sorted(fields):
        if key not in PARAMETERS and not key.startswith(_PROVISIONER_PREFIX):
            known = ", ".join(sorted(PARAMETERS))
            raise Invalid(f"parameters: {key[:80]!a} is unknown; this driver knows: {known}")
    if fields.get("fs_type", DEFAULT_FS) not in FS_TYPES:
        raise Invalid(f"parameters.fs_type: {fields['fs_type'][:80]!a} is none of {', '.join(FS_TYPES)}")
    after_seconds(fields)
    return {key: value for key, value in fields.items() if key in PARAMETERS}


def _kept(parameters: Mapping[str, str]) -> dict[str, str]:
    return {key: parameters[key] for key in ("fs_type", TAKEOVER) if key in parameters}


def requisite(message: pb.TopologyRequirement) -> list[dict[str, str]]:
    """The segments of which one must reach the volume, preferred ones first; [] is anywhere."""
    wanted = [dict(topology.segments) for topology in message.requisite]
    first = [segments for topology in message.preferred if (segments := dict(topology.segments)) in wanted]
    return [*first, *(segments for segments in wanted if segments not in first)]


def volume_message(volume: Volume, topology: Mapping[str, str]) -> pb.Volume:
    """The CSI form of a volume. Its context is for clients: which claim, which pool, which filesystem."""
    return pb.Volume(
        volume_id=volume.volume_id,
        capacity_bytes=volume.size_bytes,
        volume_context={"name": volume.name, "pool": volume.pool, **_kept(volume.parameters)},
        accessible_topology=[pb.Topology(segments=topology)] if topology else [],
    )
