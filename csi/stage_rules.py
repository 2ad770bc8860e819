"""When a request about a volume that is staged or published already may go on.

Functions of what is known; only check_path looks itself. CSI, NodePublishVolume, the table of the second call;
docs/decisions/008-second-publish.md has what deviates from it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from csi.errors import Conflict, InUse, Invalid
from csi.fs.mounts import Mount
from csi.fs.paths import check_target
from csi.model import AccessMode, Attachment, Capability
from csi.publish_context import BLOCK, MOUNT, access_type
from csi.stage_records import Asked


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Let a complaint about a path begin with the request's field."""
    try:
        yield
    except Invalid as error:
        raise Invalid(f"{field} {str(error).removeprefix('path ')}") from error


def check_path(path: Path, field: str, *, roots: Sequence[Path]) -> None:
    """Raise Invalid unless volumes may be mounted at the path; see csi.fs.paths.check_target."""
    with naming(field):
        check_target(path, roots=roots)


def reads_only(capability: Capability) -> bool:
    """Whether a capability alone says that nothing is to be written."""
    return capability.access_mode.reader_only or "ro" in capability.mount_flags


def check_access_type(attachment: Attachment, capability: Capability) -> None:
    """Raise Invalid unless the volume was published for this access type.

    Raw data have no signature: as a filesystem, a volume that holds some would look new.
    """
    if attachment.block != capability.block:
        published = BLOCK if attachment.block else MOUNT
        raise Invalid(
            f"volume_capability.access_type: {access_type(capability)} was asked for, but volume "
            f"{attachment.volume_id} was published as {published} (publish_context.access_type); publish it anew"
        )


def check_staged(volume_id: str, layer: Mount, before: Asked | None, asked: Asked) -> None:
    """Raise Conflict unless the mount that stands is what a repeated NodeStageVolume asks for.

    before: what is on record for the path.
    """
    fs_type = asked.capability.fs_type
    if fs_type and layer.fs_type != fs_type:
        raise Conflict(f"volume {volume_id}: staged with {layer.fs_type}, {fs_type} was asked for; unstage it first")
    if layer.readonly != asked.readonly:
        how = "read-only (errors of the device make it so: see the kernel log)" if not asked.readonly else "writable"
        raise Conflict(f"volume {volume_id}: staged {how} at {layer.mount_point}; unstage it first")
    if before is not None and not before.same_mount(asked):
        raise Conflict(f"volume {volume_id}: staged as {before}, not as {asked}; unstage it first")


def check_published(volume_id: str, layer: Mount, before: Asked | None, asked: Asked) -> None:
    """Raise Conflict unless the bind mount that stands at the target is what a repeated NodePublishVolume asks for.

    before: what is on record for the target. Only with it is a writable mount the first half of a read-only one, and
    not a writer who must not lose his access.
    """
    where = f"volume {volume_id}: published at {layer.mount_point}"
    if before is not None and not before.fits(asked):
        raise Conflict(f"{where} as {before}, not as {asked}; unpublish it first")
    narrow = "ro" in layer.options
    if narrow and not asked.readonly:
        raise Conflict(f"{where} read-only; unpublish it before it is published writable")
    if asked.readonly and not narrow and before is None:
        raise Conflict(f"{where} writable; unpublish it before it is published read-only")


def check_beside(volume_id: str, others: Mapping[Path, Asked], asked: Asked) -> None:
    """Raise InUse unless the volume may be at one more target beside those where it is already."""
    for path, other in others.items():
        if _single(asked):
            raise _taken(volume_id, path)
        if not other.same_capability(asked):
            raise InUse(
                f"volume {volume_id}: published at {path} as {other}, so not here as {asked}; unpublish it there first"
            )


def check_unrecorded(volume_id: str, others: Iterable[Path], asked: Asked) -> None:
    """The same where the records were lost, and the mount table alone tells of other places."""
    for path in others:
        if _single(asked):
            raise _taken(volume_id, path)


def check_apart(staging_path: Path, target_path: Path) -> None:
    """Raise Invalid when one of the two paths would lie in the other."""
    if target_path == staging_path or staging_path in target_path.parents or target_path in staging_path.parents:
        raise Invalid(f"target_path {str(target_path)!r}: must not be, hold or lie in staging_target_path")


def _single(asked: Asked) -> bool:
    return asked.capability.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER


def _taken(volume_id: str, path: Path) -> InUse:
    mode = AccessMode.SINGLE_NODE_SINGLE_WRITER.value
    return InUse(f"volume {volume_id}: {mode}, and at {path} already; unpublish it there first")
