"""The mount table of the kernel (`/proc/<pid>/mountinfo`, proc(5)), read and asked.

Nothing here touches a mounted filesystem: a look at the table never hangs on a dead device.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csi.errors import Unavailable

_OCTAL = re.compile(rb"\\([0-7]{3})")
_DELETED = b"//deleted"
_READS = 8


@dataclass(frozen=True)
class Mount:
    """One line of the table."""

    mount_id: int
    parent_id: int
    major_minor: str  # of the superblock; an anonymous number on btrfs
    root: str  # what part of the filesystem is mounted here
    mount_point: Path
    fs_type: str
    options: frozenset[str]  # of this mount
    super_options: frozenset[str]  # of the filesystem, shared by all its mounts
    source: str
    reachable: bool = True  # False once the folder under it was deleted

    @property
    def readonly(self) -> bool:
        """True if nothing can be written through this mount, by its own options or the filesystem's state."""
        return "ro" in self.options or bool(self.super_options & {"ro", "emergency_ro", "shutdown"})


def read_table(path: Path) -> list[Mount]:
    """All mounts in the table's order. Raises Unavailable when the table can't be read or understood.

    The kernel hands the table out a page at a time and can drop an entry between two pages while others mount and
    unmount; so it is read until two reads agree.
    """
    try:
        data = path.read_bytes()
        for _ in range(_READS):
            again = path.read_bytes()
            if again == data:
                break
            data = again
    except OSError as error:
        raise Unavailable(f"{path}: can't read the mount table ({error.strerror}); is /proc mounted?") from error
    return parse(data)


def parse(data: bytes) -> list[Mount]:
    """Parse the table's text. Raises Unavailable for a line that is not of its format."""
    return [_parse_line(line) for line in data.split(b"\n") if line]


def layers_at(mounts: Sequence[Mount], path: Path) -> list[Mount]:
    """The mounts at exactly this path, lowest first."""
    by_id = {mount.mount_id: mount for mount in mounts}
    found = [mount for mount in mounts if mount.mount_point == path and mount.reachable]
    return sorted(found, key=lambda mount: _depth(mount, by_id))


def origin_of(mounts: Sequence[Mount], path: Path) -> tuple[str, str] | None:
    """The filesystem's number and the place in it that `path` leads to now, as a bind mount of it would show them.

    Follows the table as the kernel follows the path: from the root, at each mount into the first one on the way.
    """
    ids = {mount.mount_id for mount in mounts}
    tops = [mount for mount in mounts if mount.parent_id not in ids and mount.mount_point == Path("/")]
    if not tops:
        return None
    current = tops[-1]
    for _ in mounts:  # each step goes into another mount
        below = [
            mount
            for mount in mounts
            if mount.parent_id == current.mount_id
            and mount.mount_id != current.mount_id
            and mount.reachable
            and (mount.mount_point == path or mount.mount_point in path.parents)
        ]
        if not below:
            break
        current = min(below, key=lambda mount: len(mount.mount_point.parts))
    inside = path.relative_to(current.mount_point).as_posix()
    return current.major_minor, current.root if inside == "." else f"{current.root.rstrip('/')}/{inside}"


def _depth(mount: Mount, by_id: dict[int, Mount]) -> int:
    seen = set()
    while mount.mount_id not in seen and mount.parent_id in by_id:
        seen.add(mount.mount_id)
        mount = by_id[mount.parent_id]
    return len(seen)


def _parse_line(line: bytes) -> Mount:
    try:
        fields = line.split(b" ")
        dash = fields.index(b"-", 6)
        mount_id, parent_id, number, root, point, options = fields[:6]
        fs_type, source, super_options = fields[dash + 1 : dash + 4]
        reachable = not point.endswith(_DELETED)
        return Mount(
            mount_id=int(mount_id),
            parent_id=int(parent_id),
            major_minor=number.decode("ascii"),
            root=_text(root),
            mount_point=Path(_text(point.removesuffix(_DELETED))),
            fs_type=_text(fs_type),
            options=frozenset(_text(options).split(",")),
            super_options=frozenset(_text(super_options).split(",")),
            source=_text(source),
            reachable=reachable,
        )
    except ValueError as error:
        raise Unavailable(f"mount table: can't understand the line {line[:200]!r}") from error


def _text(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 255]), field))
