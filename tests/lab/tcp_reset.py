"""Breaks TCP connections from outside, as a firewall or a failing switch does: with forged resets.

The guests' kernels cannot do it themselves (`ss -K` needs INET_DIAG_DESTROY, which Debian's UML lacks).
"""

import socket
import struct
import time
from dataclasses import dataclass

_ETH_P_ALL, _ETH_P_IP, _TCP = 3, 0x0800, 6
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
# A connection that was silent for so long after a reset is taken for dead.
_QUIET_SECONDS = 0.5

Flow = frozenset[tuple[bytes, int]]


@dataclass(frozen=True)
class Segment:
    """What matters of one TCP segment in a frame; `end` is the sequence number that follows it."""

    macs: tuple[bytes, bytes]
    source: tuple[bytes, int]
    target: tuple[bytes, int]
    flags: int
    end: int
    ack: int

    @property
    def flow(self) -> Flow:
        """The connection, the same for both directions."""
        return frozenset((self.source, self.target))


def reset_connections(interface: str, bridge: str, port: int, seconds: float) -> int:
    """Resets the connections from or to `port` that pass `interface` and were open before; returns how many.

    Call it inside the network. Connections that open meanwhile are left alone, so that a client can come back.
    `bridge` carries the resets: it knows behind which port each end is.
    """
    new: set[Flow] = set()
    last_seen: dict[Flow, float] = {}
    deadline = time.monotonic() + seconds
    raw = (socket.AF_PACKET, socket.SOCK_RAW)
    with socket.socket(*raw, socket.htons(_ETH_P_ALL)) as wire, socket.socket(*raw, 0) as out:
        wire.bind((interface, 0))
        out.bind((bridge, 0))
        wire.settimeout(0.05)
        while (now := time.monotonic()) < deadline:
            if last_seen and now - max(last_seen.values()) > _QUIET_SECONDS:
                break
            try:
                segment = parse(wire.recv(1 << 17))
            except TimeoutError:
                continue
            if segment is None or port not in (segment.source[1], segment.target[1]) or segment.flags & _RST:
                continue
            if segment.flags & _SYN:
                new.add(segment.flow)
            elif segment.flow not in new:
                last_seen[segment.flow] = now
                for frame in forge(segment):
                    out.send(frame)
    return len(last_seen)


def parse(frame: bytes) -> Segment | None:
    """The TCP segment in an Ethernet frame, None if there is none."""
    if len(frame) < 54 or struct.unpack_from("!H", frame, 12)[0] != _ETH_P_IP or frame[23] != _TCP:
        return None
    header = 14 + (frame[14] & 15) * 4
    source, target, sequence, ack, offset, flags = struct.unpack_from("!HHIIBB", frame, header)
    total = struct.unpack_from("!H", frame, 16)[0]
    length = 14 + total - header - (offset >> 4) * 4 + bool(flags & (_SYN | _FIN))
    return Segment((frame[0:6], frame[6:12]), (frame[26:30], source), (frame[30:34], target), flags,
                   (sequence + length) & 0xFFFFFFFF, ack)  # fmt: skip


def forge(seen: Segment) -> list[bytes]:
    """A reset to each end of a connection; each must name exactly the number which its receiver expects next."""
    to_target = _frame(seen.macs[0], seen.macs[1], seen.source, seen.target, seen.end, seen.ack)
    to_source = _frame(seen.macs[1], seen.macs[0], seen.target, seen.source, seen.ack, seen.end)
    return [to_target, to_source] if seen.flags & _ACK else [to_target]


def _frame(
    to_mac: bytes, from_mac: bytes, source: tuple[bytes, int], target: tuple[bytes, int], sequence: int, ack: int
) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", source[1], target[1], sequence, ack, 5 << 4, _RST | _ACK, 0, 0, 0)
    pseudo = source[0] + target[0] + struct.pack("!BBH", 0, _TCP, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", _checksum(pseudo + tcp)) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, _TCP, 0) + source[0] + target[0]
    ip = ip[:10] + struct.pack("!H", _checksum(ip)) + ip[12:]
    return to_mac + from_mac + struct.pack("!H", _ETH_P_IP) + ip + tcp


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
