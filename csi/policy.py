"""The rules of the use cases: what may be asked for, and what counts as the same. Pure functions."""

from collections.abc import Mapping, Sequence

from csi.backends.base import Backend
from csi.errors import Conflict, InUse, OutOfRange
from csi.model import DEFAULT_SIZE_BYTES, TOPOLOGY_NODE, AccessMode, Capability, NodeId, Publication, Volume

#: Largest size the arithmetic of the tools is sure of: 8 EiB less one extent.
_LARGEST_BYTES = (1 << 63) - (4 << 20)


def reaches(local_to: str, topology: Mapping[str, str]) -> bool:
    """Whether a pool (local to one node, or "" = to none) can be reached from a topology."""
    return not local_to or topology.get(TOPOLOGY_NODE, local_to) == local_to


def size(backend: Backend, required_bytes: int, limit_bytes: int) -> int:
    """The size to make: rounded up by the backend, within the limit; required_bytes 0 = any, so the usual one."""
    if required_bytes > _LARGEST_BYTES:
        raise OutOfRange(f"capacity_range.required_bytes: {required_bytes} is more than any pool can hold")
    if limit_bytes and limit_bytes < required_bytes:
        raise OutOfRange(f"capacity_range: limit_bytes {limit_bytes} is less than required_bytes {required_bytes}")
    size_bytes = backend.round_size(required_bytes or DEFAULT_SIZE_BYTES)
    if not required_bytes and 0 < limit_bytes < size_bytes:
        unit_bytes = backend.round_size(1)
        size_bytes = max(1, limit_bytes // unit_bytes) * unit_bytes
    if limit_bytes and size_bytes > limit_bytes:
        raise OutOfRange(
            f"capacity_range: pool {backend.pool} makes {size_bytes} bytes of {required_bytes} (its unit), "
            f"which is above limit_bytes {limit_bytes}"
        )
    return size_bytes


def check_same(volume: Volume, pool: str, parameters: Mapping[str, str], required_bytes: int, limit_bytes: int) -> None:
    """Raise Conflict unless the existing volume answers the request (CSI: CreateVolume, ALREADY_EXISTS)."""
    differences = []
    if volume.pool != pool:
        differences.append(f"pool {volume.pool}, asked {pool}")
    if dict(volume.parameters) != dict(parameters):
        differences.append(f"parameters {dict(volume.parameters)}, asked {dict(parameters)}")
    if volume.size_bytes < required_bytes or (limit_bytes and volume.size_bytes > limit_bytes):
        differences.append(f"{volume.size_bytes} bytes, asked {required_bytes} to {limit_bytes or 'any'}")
    if differences:
        raise Conflict(f"volume {volume.name!r} exists with {'; '.join(differences)}; choose another name")


def unsupported(capabilities: Sequence[Capability]) -> str:
    """Why a set of capabilities can't be served, or ""."""
    for capability in capabilities:
        mode = capability.access_mode
        if mode is AccessMode.MULTI_NODE_SINGLE_WRITER:
            return f"access mode {mode.value} is not supported; use SINGLE_NODE_WRITER or MULTI_NODE_READER_ONLY"
        if mode is AccessMode.MULTI_NODE_MULTI_WRITER and not capability.block:
            return (
                f"access mode {mode.value} is served for raw block volumes only: a filesystem written by two nodes "
                "is destroyed"
            )
    return ""


def same_publication(other: Publication, node: NodeId, capability: Capability, *, readonly: bool) -> Publication:
    """The standing publication of a node if it is what is asked for, else Conflict."""
    where = f"volume {other.volume_id}: published to node {node.name}"
    if other.node != node:
        raise InUse(f"{where} under another key or initiator name; unpublish it first (the node was set up anew)")
    theirs = other.capability
    if (other.readonly, theirs.access_mode, theirs.block) != (readonly, capability.access_mode, capability.block):
        raise Conflict(
            f"{where} as {theirs.access_mode.value}, readonly={other.readonly}, block={theirs.block}; unpublish it "
            "before it is published in another way"
        )
    return other


def can_share(other: Publication, capability: Capability) -> bool:
    """Whether a volume may be published to one more node beside this publication."""
    theirs, mode = other.capability, capability.access_mode
    return mode.multi_node and theirs.access_mode == mode and theirs.block == capability.block
