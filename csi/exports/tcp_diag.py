"""How long a TCP peer has been silent: from the kernel's account of each connection, which `ss -ti` shows too.

tgtd shows a session for as long as its connection stands, and a connection to a machine that lost its power stands
until somebody gives it up. The kernel knows when the last segment came in. Both ends of an iSCSI session ping each
other every few seconds, so a peer that lives is never silent for long.
"""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator

from csi.errors import Unavailable

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_INFO = 2  # the attribute with struct tcp_info, and its number in the request
_INET_DIAG_REQ_BYTECODE = 1
# ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING: one that is being given up still tells its silence.
_STATES = sum(1 << state for state in (1, 4, 5, 8, 9, 11))

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")
_ID_OFFSET, _ATTRIBUTES_OFFSET = 4, 72  # in struct inet_diag_msg
_SOURCE, _PEER = _ID_OFFSET + 4, _ID_OFFSET + 20
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_LAST_DATA_AND_ACK = struct.Struct("=II")  # tcpi_last_data_recv, tcpi_last_ack_recv: milliseconds
_LAST_OFFSET = 52
# INET_DIAG_BC_S_GE, _S_LE: each is (code, step if yes, step if no) and an operand whose last field is the port.
_OPERATION = struct.Struct("=BBHBBH")
_GE, _LE = 2, 3

_SECONDS = 5.0


def silent_seconds(port: int) -> dict[str, float]:
    """By address of the peer: seconds since its last segment, data or bare ACK, on any connection to a local port.

    Of connections that were established, in this network namespace. Addresses are as `ipaddress` writes them, IPv4 ones
    as such even where the socket is IPv6. Raises Unavailable when the kernel does not tell.
    """
    found: dict[str, float] = {}
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in _dump(family, port):
                address = _address(family, message[_PEER : _PEER + 16])
                seconds = _silence(message)
                if seconds is not None:
                    found[address] = min(seconds, found.get(address, seconds))
    except OSError as error:
        raise Unavailable(
            f"the kernel does not show TCP connections ({error.strerror or error}); load its modules (modprobe "
            "tcp_diag), and give a container the host's network"
        ) from error
    return found


def plain_address(text: str) -> str:
    """An address as `silent_seconds` has it; "" when it is none."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0].strip("[]"))
    except ValueError:
        return ""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _address(family: int, packed: bytes) -> str:
    return plain_address(socket.inet_ntop(family, packed if family == socket.AF_INET6 else packed[:4]))


def _silence(message: bytes) -> float | None:
    for kind, value in _attributes(message[_ATTRIBUTES_OFFSET:]):
        if kind == _INET_DIAG_INFO and len(value) >= _LAST_OFFSET + _LAST_DATA_AND_ACK.size:
            return float(min(_LAST_DATA_AND_ACK.unpack_from(value, _LAST_OFFSET))) / 1000
    return None


def _dump(family: int, port: int) -> Iterator[bytes]:
    """Each struct inet_diag_msg, with its attributes, of the connections to a local port."""
    code = _port_is(port)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), _STATES)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(code), _INET_DIAG_REQ_BYTECODE) + code
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    with contextlib.closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)) as netlink:
        netlink.settimeout(_SECONDS)
        netlink.send(header + body)
        while True:
            data = netlink.recv(1 << 18)
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                message, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    raise OSError(-_ERROR.unpack_from(message)[0], "netlink refuses the request")
                yield message


def _port_is(port: int) -> bytes:
    """The kernel's filter: port <= local port <= port. A `no` steps past the end, which rejects."""
    first = _OPERATION.pack(_GE, 8, 20, 0, 0, port)
    return first + _OPERATION.pack(_LE, 8, 12, 0, 0, port)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
