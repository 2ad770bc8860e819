"""The options of `docker volume create -o …`."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from csi.errors import Invalid

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGTP]?)(?:i?B)?", re.IGNORECASE)
_KNOWN = ("size", "pool", "fs", "takeover")


@dataclass(frozen=True)
class Options:
    """What a user asks of a volume. The driver says what is wrong with a pool, a filesystem or a time."""

    size_bytes: int = 0  # 0 = the driver's default
    pool: str = ""
    fs_type: str = ""
    takeover: str = ""  # how long its node must be silent before another one may take it, such as 15s; "" = never

    @property
    def parameters(self) -> dict[str, str]:
        """Those of CreateVolume."""
        fields = {"pool": self.pool, "fs_type": self.fs_type, "takeover": self.takeover}
        return {key: value for key, value in fields.items() if value}

    @property
    def given(self) -> bool:
        """Whether anything was asked for; without, a volume that is there will do whatever it is."""
        return self != Options()

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> "Options":
        """From Docker's map. Raises Invalid, with the nearest known option for an unknown one."""
        for key in options:
            if key not in _KNOWN:
                near = difflib.get_close_matches(key, _KNOWN, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_KNOWN)}"
                raise Invalid(f"option {key[:60]!a} is unknown; {hint}")
        return cls(
            size_bytes=size_bytes(options["size"]) if "size" in options else 0,
            pool=options.get("pool", ""),
            fs_type=options.get("fs", ""),
            takeover=options.get("takeover", ""),
        )


def size_bytes(text: str) -> int:
    """Bytes of a size such as 1G, 500M, 1.5T, 10GiB; units are powers of 1024, as LVM's are. Raises Invalid."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise Invalid(f"option size: {text[:60]!a} is no size; write 1G, 500M or 1.5T (powers of 1024)")
    unit = 1024 ** "KMGTP".find(match[2].upper()) * 1024 if match[2] else 1
    size = int(float(match[1]) * unit)
    if not 0 < size < 1 << 63:
        raise Invalid(f"option size: {text[:60]!a} is not between 1 byte and 8 EiB")
    return size
