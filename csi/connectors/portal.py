"""Where an iSCSI target is reached: an address and a port."""

import socket
from dataclasses import dataclass

from csi.deadline import Deadline
from csi.errors import Unavailable
from csi.model import parse_portal

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Portal:
    """A portal with a numeric address, in the forms that iscsiadm wants."""

    address: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Portal":
        """See parse_portal."""
        return cls(*parse_portal(text))

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
