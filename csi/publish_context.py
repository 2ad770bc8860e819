"""publish_context: what the controller tells the node through the CO, as CSI's map of strings.

A versioned list of paths (target, portal, LUN) with the identity of the device, so that many portals, multipath and
volumes that move need no new format. The CHAP pair is sealed to the node; everything else is public, but none of it can
be changed: the seal holds for exactly this context.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from csi.errors import Invalid
from csi.model import Attachment, Capability, Chap, IscsiPath, Publication, scsi_id_of
from csi.sealing import seal

FORMAT = "1"
#: What the volume was published as: a raw device holds data without any signature, so it is never taken for a new one.
BLOCK, MOUNT = "block", "mount"
_SEALED = "sealed"


def binding(volume_id: str, node_id: str, context: Mapping[str, str]) -> str:
    """What a sealed secret is bound to: one publication on one node, told in exactly this context."""
    rest = {key: value for key, value in context.items() if key != _SEALED}
    return f"{volume_id} {node_id} {json.dumps(rest, sort_keys=True)}"


def encode(
    publication: Publication, *, protocol: str, paths: tuple[IscsiPath, ...], may_format: bool
) -> dict[str, str]:
    """The context for a published volume."""
    context = {
        "format": FORMAT,
        "protocol": protocol,
        "generation": publication.nonce,
        "size_bytes": str(publication.size_bytes),
        "readonly": str(publication.readonly).lower(),
        "may_format": str(may_format).lower(),
        "access_type": access_type(publication.capability),
    }
    if protocol == "loop":
        return context | {"file": str(publication.device)}
    context |= {
        "scsi_id": scsi_id_of(publication.volume_id),
        "paths": json.dumps([{"target": p.target, "portal": p.portal, "lun": p.lun} for p in paths]),
    }
    bound_to = binding(publication.volume_id, publication.node_id, context)
    return context | {_SEALED: seal(publication.chap, public_key=publication.node.public_key, bound_to=bound_to)}


def access_type(capability: Capability) -> str:
    """CSI's access type of a capability, as the context has it."""
    return BLOCK if capability.block else MOUNT


def decode(volume_id: str, context: Mapping[str, str], *, open_sealed: Callable[[str], Chap]) -> Attachment:
    """The attachment that a context describes. open_sealed opens the CHAP pair, bound to this context (`binding`).

    Raises Invalid naming the key that is missing or malformed.
    """
    if context.get("format") != FORMAT:
        raise Invalid(
            f"publish_context.format: {context.get('format', '')!r}, this release reads {FORMAT!r}; the volume must be "
            "published by a controller of this driver"
        )
    protocol = _get(context, "protocol")
    generation = _get(context, "generation")
    if protocol not in ("iscsi", "loop"):
        raise Invalid(f"publish_context.protocol: {protocol!r} is not known to this release")
    common = Attachment(
        volume_id=volume_id,
        protocol=protocol,
        generation=generation,
        size_bytes=_number(context, "size_bytes"),
        readonly=_flag(context, "readonly"),
        may_format=_flag(context, "may_format"),
        block=_access_type(context) == BLOCK,
    )
    if protocol == "loop":
        return _replace(common, file=Path(_get(context, "file")))
    return _replace(
        common,
        scsi_id=_get(context, "scsi_id"),
        paths=_paths(_get(context, "paths")),
        chap=open_sealed(_get(context, _SEALED)),
    )


def _replace(attachment: Attachment, **changes: object) -> Attachment:
    return Attachment(**{**attachment.__dict__, **changes})


def _get(context: Mapping[str, str], key: str) -> str:
    value = context.get(key, "")
    if not value:
        raise Invalid(f"publish_context.{key}: missing; pass the context of ControllerPublishVolume on as it is")
    return value


def _number(context: Mapping[str, str], key: str) -> int:
    text = _get(context, key)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Invalid(f"publish_context.{key}: {text[:40]!r} is not a number of bytes")
    return int(text)


def _flag(context: Mapping[str, str], key: str) -> bool:
    text = _get(context, key)
    if text not in ("true", "false"):
        raise Invalid(f"publish_context.{key}: {text[:40]!r} is neither true nor false")
    return text == "true"


def _access_type(context: Mapping[str, str]) -> str:
    text = _get(context, "access_type")
    if text not in (BLOCK, MOUNT):
        raise Invalid(f"publish_context.access_type: {text[:40]!r} is neither {BLOCK} nor {MOUNT}")
    return text


def _paths(text: str) -> tuple[IscsiPath, ...]:
    try:
        paths = tuple(IscsiPath(str(p["target"]), str(p["portal"]), int(p["lun"])) for p in json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise Invalid("publish_context.paths: not a list of target, portal and lun") from error
    if not paths:
        raise Invalid("publish_context.paths: empty; the controller offered no portal")
    return paths
