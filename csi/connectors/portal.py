"""Where an iSCSI target is reached: an address and a port."""

import ipaddress
import re
import socket
from dataclasses import dataclass

from csi.deadline import Deadline
from csi.errors import Invalid, Unavailable

_PORTAL = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<name>[A-Za-z0-9.-]{1,253}))(?::(?P<port>[0-9]{1,5}))?", re.ASCII
)
_DEFAULT_PORT = 3260
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Portal:
    """A portal with a numeric address, in the forms that iscsiadm wants."""

    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    @property
    def argument(self) -> str:
        """The value of --portal; 1 is the portal group that tgtd always uses."""
        return f"{self},1"

    @property
    def folder(self) -> str:
        """The name of the portal's folder below a target in the node database."""
        return f"{self.address},{self.port},1"

    def try_connect(self, deadline: Deadline) -> None:
        """See that something listens there; raises Unavailable at once instead of after iscsid's long timeouts."""
        deadline.check(f"connect to portal {self}")
        try:
            limit = max(0.1, min(_CONNECT_SECONDS, deadline.remaining()))
            socket.create_connection((self.address, self.port), timeout=limit).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise Unavailable(
                f"portal {self} does not answer ({reason}); check that tgtd runs on the SNODE and that the network and "
                "its firewall let this node through"
            ) from error


def resolve(text: str) -> Portal:
    """The portal that `text` names: `1.2.3.4:3260`, `[fe80::1]:3260` or `host.name:3260`; the port may be left out.

    A name is resolved here, because records and sessions are found by the address. Raises Invalid or Unavailable.
    """
    match = _PORTAL.fullmatch(text)
    port = int(match["port"] or _DEFAULT_PORT) if match else 0
    if not match or not 0 < port < 65536:
        raise Invalid(f"portal {text[:200]!r}: not of the form ADDRESS:PORT or [IPv6]:PORT")
    host = match["six"] or match["name"]
    try:
        return Portal(str(ipaddress.ip_address(host)), port)
    except ValueError:
        if match["six"]:
            raise Invalid(f"portal {text[:200]!r}: the address in brackets is not IPv6") from None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"portal {text}: can't resolve the name ({error}); mend DNS or use an address") from error
    return Portal(str(found[0][4][0]), port)
