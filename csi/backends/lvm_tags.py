"""What the driver writes on a logical volume, in LVM tags, with the command that creates it.

snode.format=1            version of this scheme
snode.pool=fast           the pool
snode.name=…              the CSI name, base64 of UTF-8: LVM allows only A-Za-z0-9_.+-/=!:&# in a tag
snode.parameters=…        the parameters, base64 of compact JSON; absent when there are none
snode.made=…              random; ties the volume to the note of its creation
snode.blank               never held data; removed for good once the volume was used
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from csi.errors import Invalid

FORMAT = 1
BLANK = "snode.blank"
#: LVM takes tags of about this length; each byte also costs metadata area, which can't be enlarged later.
LONGEST_TAG = 1024

_FORMAT = "snode.format="
_POOL = "snode.pool="
_NAME = "snode.name="
_PARAMETERS = "snode.parameters="
_MADE = "snode.made="


@dataclass(frozen=True)
class Label:
    """The tags of one logical volume, understood."""

    format: int
    pool: str
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    blank: bool = False
    damage: str = ""  # what could not be understood


def made(nonce: str) -> str:
    """The tag of the creation with this nonce."""
    return f"{_MADE}{nonce}"


def encode(*, pool: str, name: str, parameters: Mapping[str, str], nonce: str) -> list[str]:
    """The tags of a new volume. Raises Invalid when the parameters are too long for one tag."""
    tags = [f"{_FORMAT}{FORMAT}", f"{_POOL}{pool}", f"{_NAME}{_pack(name)}", made(nonce), BLANK]
    if parameters:
        text = json.dumps(dict(parameters), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        tags.append(f"{_PARAMETERS}{_pack(text)}")
    for tag in tags:
        if len(tag) > LONGEST_TAG:
            raise Invalid(
                f"{tag.partition('=')[0].removeprefix('snode.')}: {len(tag)} characters as an LVM tag, at most "
                f"{LONGEST_TAG} fit; shorten them"
            )
    return tags


def decode(tags: Sequence[str]) -> Label | None:
    """The label, or None when the volume is not ours."""
    values = {key + "=": value for key, _, value in (tag.partition("=") for tag in tags)}
    if _FORMAT not in values or _POOL not in values:
        return None
    damage = ""
    name = ""
    parameters: dict[str, str] = {}
    try:
        version = int(values[_FORMAT])
    except ValueError:
        return None
    try:
        name = _unpack(values.get(_NAME, ""))
        parameters = json.loads(_unpack(values[_PARAMETERS])) if _PARAMETERS in values else {}
        if not isinstance(parameters, dict):
            raise ValueError("parameters are not a mapping")
    except ValueError as error:  # binascii.Error, UnicodeDecodeError and JSONDecodeError are ValueErrors
        damage = f"its LVM tags are damaged ({error})"
        parameters = {}
    return Label(
        format=version,
        pool=values[_POOL],
        name=name,
        parameters={str(key): str(value) for key, value in parameters.items()},
        blank=BLANK in tags,
        damage=damage,
    )


def _pack(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _unpack(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except binascii.Error as error:
        raise ValueError(str(error)) from error
