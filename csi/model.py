"""Plain values that all parts share. No proto, no I/O.

Sizes are bytes. Ids and names follow the grammars here, and nothing else reaches a command line or a path.
"""

import base64
import enum
import hashlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from csi.errors import Invalid

MIB = 1 << 20
GIB = 1 << 30

#: Size of a volume when the request names none (CSI: "plugin MAY choose").
DEFAULT_SIZE_BYTES = GIB

VOLUME_ID = re.compile(r"v-[0-9a-z]{26}")
POOL_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
#: RFC 3720 names, restricted to what tgtd accepts as a target name and an ACL.
ISCSI_NAME = re.compile(r"(iqn\.[0-9]{4}-[0-9]{2}\.[a-z0-9:.-]+|eui\.[0-9a-f]{16}|naa\.[0-9a-f]{16,32})")

_PORTAL = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<four>[0-9.]+)):(?P<port>[0-9]{1,5})", re.ASCII)
#: CSI's limit for a node_id.
_NODE_ID_BYTES = 192

#: Prefix of every target that this driver owns; anything else in tgtd is somebody else's.
TARGET_PREFIX = "iqn.2026-11.io.snode"

#: The topology key whose value is a node's name; pools that only one host can reach are tied to it.
TOPOLOGY_NODE = "topology.csi.snode.io/node"

_BASE32 = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "abcdefghijkmnpqrstuvwxyz23456789")


def volume_id_of(name: str) -> str:
    """The id of the volume with this CSI name: 130 bits of its SHA-256, in 26 lower-case letters and digits.

    Derived, so that a repeated CreateVolume finds its volume and no database is needed; it never names a SNODE, so
    that a volume may move.
    """
    digest = hashlib.sha256(b"snode-volume-1:" + name.encode()).digest()
    return "v-" + base64.b32encode(digest).decode().translate(_BASE32)[:26]


def scsi_id_of(volume_id: str) -> str:
    """The SCSI identity (NAA type 6, 32 hex digits) of a volume: what a CNODE finds in sysfs as `naa.…`."""
    return "6" + hashlib.sha256(b"snode-scsi-1:" + volume_id.encode()).hexdigest()[:31]


def parse_portal(text: str) -> tuple[str, int]:
    """Address and port of `192.0.2.10:3260` or `[2001:db8::10]:3260`, the address as iSCSI tools write it.

    Numeric, because records and sessions are found by the address. Raises Invalid.
    """
    match = _PORTAL.fullmatch(text)
    try:
        if not match or not 0 < int(match["port"]) < 65536:
            raise ValueError
        family = socket.AF_INET6 if match["six"] else socket.AF_INET
        return socket.inet_ntop(family, socket.inet_pton(family, match["six"] or match["four"])), int(match["port"])
    except (ValueError, OSError) as error:
        raise Invalid(
            f"portal {text[:200]!r} is not ADDRESS:PORT, such as 192.0.2.10:3260 or [2001:db8::10]:3260"
        ) from error


class AccessMode(enum.Enum):
    """CSI's access modes, by their names in the specification."""

    SINGLE_NODE_WRITER = "SINGLE_NODE_WRITER"
    SINGLE_NODE_READER_ONLY = "SINGLE_NODE_READER_ONLY"
    SINGLE_NODE_SINGLE_WRITER = "SINGLE_NODE_SINGLE_WRITER"
    SINGLE_NODE_MULTI_WRITER = "SINGLE_NODE_MULTI_WRITER"
    MULTI_NODE_READER_ONLY = "MULTI_NODE_READER_ONLY"
    MULTI_NODE_SINGLE_WRITER = "MULTI_NODE_SINGLE_WRITER"
    MULTI_NODE_MULTI_WRITER = "MULTI_NODE_MULTI_WRITER"

    @property
    def multi_node(self) -> bool:
        """True if several nodes may hold the volume at once."""
        return self.value.startswith("MULTI_NODE")

    @property
    def reader_only(self) -> bool:
        """True if no node may write."""
        return self.value.endswith("READER_ONLY")


@dataclass(frozen=True)
class Capability:
    """How a volume is to be used: as a block device or a filesystem, by whom."""

    access_mode: AccessMode
    block: bool = False
    fs_type: str = ""  # "" = the driver's default, ext4
    mount_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeId:
    """What a CNODE tells of itself, packed into CSI's node_id (at most 192 bytes).

    Text form `1;NAME;KEY;IQN`: format, node name, X25519 public key (base64url without padding; empty on a node that
    only attaches local files), iSCSI initiator name (may be empty likewise).
    """

    name: str
    public_key: str = ""
    initiator: str = ""

    def __str__(self) -> str:
        return f"1;{self.name};{self.public_key};{self.initiator}"

    def problem(self) -> str:
        """What is wrong with its length, with the repair; "" when CSI can carry it."""
        length = len(str(self))
        if length <= _NODE_ID_BYTES:
            return ""
        return (
            f"the node id of {self.name} has {length} bytes, CSI allows {_NODE_ID_BYTES} -> shorten node.name "
            f"({len(self.name)} bytes) or the initiator name ({len(self.initiator)} bytes) by "
            f"{length - _NODE_ID_BYTES} bytes"
        )

    @classmethod
    def parse(cls, text: str) -> "NodeId":
        """Raises Invalid when the text is not a node id of this driver."""
        fields = text.split(";")
        if len(text) > _NODE_ID_BYTES or len(fields) != 4 or fields[0] != "1" or not NODE_NAME.fullmatch(fields[1]):
            raise Invalid(f"node_id {text[:200]!r}: not an id that this driver's NodeGetInfo returned")
        _, name, key, initiator = fields
        if key and not re.fullmatch(r"[A-Za-z0-9_-]{43}", key):
            raise Invalid(f"node_id of node {name}: the key part is malformed")
        if initiator and not (len(initiator) <= 223 and ISCSI_NAME.fullmatch(initiator)):
            raise Invalid(f"node_id of node {name}: {initiator!r} is not an iSCSI initiator name")
        return cls(name=name, public_key=key, initiator=initiator)


@dataclass(frozen=True)
class Volume:
    """A volume as its backend reads it back."""

    volume_id: str
    name: str  # the CSI name, any Unicode
    pool: str
    size_bytes: int
    device: Path  # LV device node or sparse file, on the SNODE
    blank: bool = False  # never held data: a filesystem may be made on it
    parameters: Mapping[str, str] = field(default_factory=dict)  # the StorageClass parameters it was created with
    health: str = "ok"  # "ok", or a sentence that says what is wrong


@dataclass(frozen=True)
class Chap:
    """One CHAP pair: `user`/`secret` prove the node to the target, `mutual_…` the target to the node."""

    user: str
    secret: str = field(repr=False)
    mutual_user: str
    mutual_secret: str = field(repr=False)


@dataclass(frozen=True)
class Publication:
    """One volume granted to one node: the record that outlives tgtd and the controller."""

    volume_id: str
    pool: str
    node_id: str  # the text form of NodeId
    protocol: str  # of the export that offers it: "iscsi" or "loop"
    nonce: str  # 16 hex digits, new for each publication: makes the target name unrepeatable
    tid: int  # tgtd's target number, random, never reused
    device: Path
    size_bytes: int
    readonly: bool
    capability: Capability
    chap: Chap
    revoked: bool = False  # being fenced: nothing may restore its target any more

    @property
    def node(self) -> NodeId:
        """The node that it is granted to."""
        return NodeId.parse(self.node_id)

    @property
    def target(self) -> str:
        """The iSCSI target name."""
        return f"{TARGET_PREFIX}:{self.volume_id}:{self.nonce}"


@dataclass(frozen=True)
class IscsiPath:
    """One way to a published volume over iSCSI."""

    target: str
    portal: str  # "address:port", IPv6 in brackets
    lun: int


@dataclass(frozen=True)
class Attachment:
    """What a node needs to attach a volume: the opened form of publish_context."""

    volume_id: str
    protocol: str  # "iscsi" or "loop"
    generation: str  # the publication's nonce
    size_bytes: int
    readonly: bool
    may_format: bool
    block: bool = False  # published as a raw device
    scsi_id: str = ""  # iscsi
    paths: tuple[IscsiPath, ...] = ()  # iscsi
    chap: Chap | None = None  # iscsi
    file: Path | None = None  # loop


@dataclass(frozen=True)
class Device:
    """An attached volume on a node."""

    path: Path  # /dev/sdX or /dev/loopN
    major_minor: str  # "8:16", as /proc/self/mountinfo writes it
    size_bytes: int
    generation: str  # of the publication that it was attached by; "" for loop


@dataclass(frozen=True)
class Complaint:
    """What keeps a volume from being read or written on a node."""

    reason: str  # one word in CamelCase for programs; fixed once released, since alerts are written against it
    message: str  # a sentence with the repair


@dataclass(frozen=True)
class Capacity:
    """What a pool can still give, in bytes."""

    available_bytes: int
    maximum_volume_bytes: int
    minimum_volume_bytes: int
