"""Endpoints: where the driver listens, as CSI writes them. Imports nothing heavy, so that settings can be checked."""

import re
from dataclasses import dataclass
from pathlib import Path

from csi.errors import Invalid

#: sockaddr_un has room for 108 bytes with the closing NUL.
_LONGEST_SOCKET_PATH = 107
_PATH = re.compile(r"/[^\0%?#]+")
_TCP = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")


@dataclass(frozen=True)
class Endpoint:
    """A unix socket (`socket` is set) or a TCP address (`address` is set, "host:port")."""

    socket: Path | None = None
    address: str = ""

    @property
    def target(self) -> str:
        """What grpc calls it, for servers and for clients."""
        return f"unix:{self.socket}" if self.socket else self.address

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else f"tcp://{self.address}"


@dataclass(frozen=True)
class TlsFiles:
    """The three PEM files of one end of a mutual TLS connection."""

    ca: Path
    cert: Path
    key: Path


def parse_endpoint(text: str) -> Endpoint:
    """`unix:///path/x.sock`, `unix:/path/x.sock` or `tcp://address:port`. Raises Invalid for anything else."""
    scheme, separator, rest = text.partition(":")
    if scheme == "unix" and separator:
        path = rest[2:] if rest.startswith("//") else rest
        if not _PATH.fullmatch(path) or path.endswith("/") or ".." in Path(path).parts:
            raise Invalid(f"endpoint {text!r}: a unix endpoint is unix:// and an absolute path, without % ? # or ..")
        if len(path.encode()) > _LONGEST_SOCKET_PATH:
            raise Invalid(f"endpoint {text!r}: the path of a unix socket has at most {_LONGEST_SOCKET_PATH} bytes")
        return Endpoint(socket=Path(path))
    found = _TCP.fullmatch(rest[2:]) if scheme == "tcp" and rest.startswith("//") else None
    if not found or not 0 < int(found.group(2)) <= 65535:
        raise Invalid(f"endpoint {text!r}: write unix:///path/to/csi.sock or tcp://address:port")
    return Endpoint(address=rest[2:])
