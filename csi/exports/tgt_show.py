"""Reading tgtd's `show` texts.

They are made for people: sections by indentation, no escapes. One part comes from initiators (the alias of a session),
so an alias with line breaks may add lines of any look below its session. Therefore the first value of a field counts,
lines that nobody asked for are skipped, a target that can't be read does not spoil the others, and what exists at all
is read by `parse_names` from a list in which no word is an initiator's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from csi.errors import CommandFailed

_HEADER = re.compile(r"^Target (\d+): (.*)$", re.MULTILINE)
_NAME_LINE = re.compile(r"^ {8}Target (\d+): (.*)$", re.MULTILINE)
_DRIVER_LINE = re.compile(r"^ {4}(\w+): (\w+)$", re.MULTILINE)
_STATE_LINE = re.compile(r"^System:\n(?: {4}.*\n)*? {4}State: (\w+)$", re.MULTILINE)
_SIZE = re.compile(r"(\d+) MB, Block size: (\d+)")
_OUTGOING = " (outgoing)"


@dataclass(frozen=True)
class Lun:
    """A logical unit as tgtd shows it. LUN 0 is tgtd's own controller."""

    number: int
    type: str
    scsi_id: str
    scsi_sn: str
    size_mb: int  # as `shown_mb` computes it from the bytes
    online: bool
    readonly: bool
    removable: bool
    thin: bool
    store: str  # "rdwr", "aio", …
    path: str  # "" when no device is open
    flags: str  # "direct", "sync:direct", …


@dataclass(frozen=True)
class Nexus:
    """A session: an initiator's bond to a target. It vanishes when its last command has ended."""

    sid: int
    initiator: str


@dataclass(frozen=True)
class Target:
    """A target as tgtd shows it."""

    tid: int
    name: str
    driver: str
    state: str  # "ready" or "offline"
    nexuses: tuple[Nexus, ...]
    luns: tuple[Lun, ...]
    incoming: tuple[str, ...]  # accounts that initiators must prove
    outgoing: tuple[str, ...]  # the account with which the target proves itself
    acl: tuple[str, ...]  # initiator names and addresses
    problem: str = ""  # not empty: it could not be read, and all but number, name and sessions is void

    def lun(self, number: int) -> Lun | None:
        """The LUN of this number."""
        return next((lun for lun in self.luns if lun.number == number), None)


@dataclass(frozen=True)
class Connection:
    """A connection of a session."""

    sid: int
    cid: int
    initiator: str
    address: str = ""  # of the initiator's end, as tgtd writes it


@dataclass(frozen=True)
class _Node:
    """A line with the more indented lines below it."""

    text: str
    children: list["_Node"] = field(default_factory=list)

    def child(self, text: str) -> "_Node | None":
        return next((node for node in self.children if node.text == text), None)

    def value(self, key: str) -> str | None:
        """What follows `key: ` in the first child that has it."""
        prefix = f"{key}:"
        for node in self.children:
            if node.text.startswith(prefix):
                return node.text[len(prefix) :].strip()
        return None


class _Unreadable(Exception):
    """A part of a target that decisions are made upon is not there; the message is what tgtd shows instead."""


def shown_mb(size_bytes: int) -> int:
    """The number that tgtd shows as size in MB for a device of `size_bytes`: a rounding of its own.

    Two sizes that differ by 1 MiB or more never give the same number.
    """
    sectors = size_bytes // 512
    return (sectors - (sectors // 625 - 974)) // 1950


def parse_targets(text: str) -> Mapping[tuple[int, str], Target]:
    """All targets by number and name. Raises CommandFailed when it is no list of targets at all."""
    headers = list(_HEADER.finditer(text))
    if text.strip() and (not headers or headers[0].start() != 0):
        raise CommandFailed(f"tgtd's list of targets begins with {text[:60]!r}: is this version of tgtd supported?")
    targets: dict[tuple[int, str], Target] = {}
    for index, header in enumerate(headers):
        end = headers[index + 1].start() if index + 1 < len(headers) else len(text)
        target = _parse_target(text[header.start() : end])
        targets.setdefault((target.tid, target.name), target)
    return targets


def parse_names(text: str) -> Mapping[int, str]:
    """Number and name of all targets, from the list of drivers."""
    return {int(tid): name for tid, name in _NAME_LINE.findall(text)}


def parse_drivers(text: str) -> Mapping[str, str]:
    """The state of each driver ("ready", "error", …), from the list of drivers."""
    return {name: state for name, state in _DRIVER_LINE.findall(text) if name != "Target"}


def parse_connections(text: str) -> tuple[Connection, ...]:
    """The connections of one target."""
    found: list[Connection] = []
    for session in _tree(text).children:
        sid = _number(session.text, "Session")
        if sid is None:
            continue
        for node in session.children:
            cid = _number(node.text, "Connection")
            if cid is not None:
                found.append(Connection(sid, cid, node.value("Initiator") or "", node.value("IP Address") or ""))
    return tuple(found)


def parse_accounts(text: str) -> tuple[str, ...]:
    """All account names."""
    section = _tree(text).child("Account list:")
    return tuple(node.text for node in section.children) if section else ()


def parse_system_state(text: str) -> str:
    """The state, "ready" or "offline". Raises CommandFailed when the text does not say."""
    match = _STATE_LINE.search(text)
    if match is None:
        raise CommandFailed("tgtd does not show its State: is this version of tgtd supported?")
    return match[1]


# Most targets look the same in one look as in the one before: an idle look costs a comparison, not a parse.
@lru_cache(maxsize=2048)
def _parse_target(text: str) -> Target:
    root = _tree(text).children[0]
    header = _HEADER.match(root.text)
    assert header is not None
    sessions = root.child("I_T nexus information:")
    only_sessions = Target(
        tid=int(header[1]),
        name=header[2],
        driver="",
        state="",
        nexuses=tuple(_nexuses(sessions)) if sessions else (),
        luns=(),
        incoming=(),
        outgoing=(),
        acl=(),
    )
    try:
        return _with_sections(only_sessions, root)
    except _Unreadable as error:
        return replace(only_sessions, problem=f"tgtd shows {error}: is this version of tgtd supported?")


def _with_sections(target: Target, root: _Node) -> Target:
    _section(root, "I_T nexus information:")
    system = _section(root, "System information:")
    accounts = [node.text for node in _section(root, "Account information:").children]
    return replace(
        target,
        driver=_value(system, "Driver"),
        state=_value(system, "State"),
        luns=tuple(_luns(_section(root, "LUN information:"))),
        incoming=tuple(text for text in accounts if not text.endswith(_OUTGOING)),
        outgoing=tuple(text.removesuffix(_OUTGOING) for text in accounts if text.endswith(_OUTGOING)),
        acl=tuple(node.text for node in _section(root, "ACL information:").children),
    )


def _nexuses(section: _Node) -> list[Nexus]:
    found = []
    for node in section.children:
        sid = _number(node.text, "I_T nexus")
        if sid is not None:
            # "Initiator: NAME alias: ALIAS": the name has no blank, the alias may have anything
            found.append(Nexus(sid, (node.value("Initiator") or "").split(" ", 1)[0]))
    return found


def _luns(section: _Node) -> list[Lun]:
    found = []
    for node in section.children:
        number = _number(node.text, "LUN")
        if number is None:
            continue
        size = _SIZE.fullmatch(_value(node, "Size"))
        if size is None:
            raise _Unreadable(f"the size of LUN {number} in an unknown form")
        path = _value(node, "Backing store path")
        found.append(
            Lun(
                number=number,
                type=_value(node, "Type"),
                scsi_id=_value(node, "SCSI ID"),
                scsi_sn=_value(node, "SCSI SN"),
                size_mb=int(size[1]),
                online=_value(node, "Online") == "Yes",
                readonly=_value(node, "Readonly") == "Yes",
                removable=_value(node, "Removable media") == "Yes",
                thin=_value(node, "Thin-provisioning") == "Yes",
                store=_value(node, "Backing store type"),
                path="" if path == "None" else path,
                flags=node.value("Backing store flags") or "",
            )
        )
    return found


def _tree(text: str) -> _Node:
    """The lines as a tree by their indentation."""
    root = _Node("")
    stack: list[tuple[int, _Node]] = [(-1, root)]
    for line in text.split("\n"):
        stripped = line.strip(" ")
        if not stripped:
            continue
        depth = len(line) - len(line.lstrip(" "))
        while stack[-1][0] >= depth:
            stack.pop()
        node = _Node(stripped)
        stack[-1][1].children.append(node)
        stack.append((depth, node))
    return root


def _section(root: _Node, title: str) -> _Node:
    node = root.child(title)
    if node is None:
        raise _Unreadable(f"no {title!r}")
    return node


def _value(node: _Node, key: str) -> str:
    value = node.value(key)
    if value is None:
        raise _Unreadable(f"no {key!r}")
    return value


def _number(text: str, key: str) -> int | None:
    prefix = f"{key}: "
    rest = text[len(prefix) :]
    return int(rest) if text.startswith(prefix) and rest.isascii() and rest.isdigit() else None
