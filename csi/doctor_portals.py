"""What `snode doctor` says of the addresses at which nodes are to reach tgtd."""

import socket
from collections.abc import Iterable, Iterator

from csi.doctor_host import ERROR, OK, WARNING, Finding
from csi.model import parse_portal

_SECONDS = 2.0


def portal_findings(portals: Iterable[str]) -> Iterator[Finding]:
    """Whether each portal is an address of this machine, and somebody listens there."""
    for portal in portals:
        address, port = parse_portal(portal)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        if not _is_ours(address, family):
            # It may be right all the same: an address that is translated, or that moves between machines.
            text = f"{portal}: this machine has no such address"
            repair = "set controller.portals to the address (`ip -brief address`) by which nodes reach this machine"
            yield Finding(WARNING, "portal", text, repair)
        elif problem := _refusal(address, port, family):
            repair = "start tgtd with this address, or with all: deploy/systemd/snode-tgtd.service does"
            yield Finding(ERROR, "portal", f"{portal}: nobody listens there ({problem})", repair)
        else:
            yield Finding(OK, "portal", f"{portal} is an address of this machine, and somebody listens there")


def _is_ours(address: str, family: socket.AddressFamily) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _refusal(address: str, port: int, family: socket.AddressFamily) -> str:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_SECONDS)
        try:
            probe.connect((address, port))
        except OSError as error:
            return error.strerror or str(error)
        return ""
