"""The wire of tgtd's management socket: one request and one reply for each connection.

tgtadm is not used: it ends with the same code for every refusal, with 0 when tgtd dies in the middle of a call, and it
takes secrets in its arguments. Here a refusal has its number, and the end of the stream before the whole reply is an
error.
"""

import enum
import os
import socket
import struct
from pathlib import Path

from csi.deadline import Deadline, wait_until
from csi.errors import CommandFailed, Invalid, NoSpace, Timeout, Unavailable

#: struct tgtadm_req: mode, op, driver, length, tid, sid, lun, cid, host, device type, account direction, pack, force.
REQUEST = struct.Struct("=II64sIiQQIIIIII")
#: struct tgtadm_rsp: error number, length of the reply with this header.
REPLY = struct.Struct("=II")
#: tgtd drops a request whose text is longer.
MAX_TEXT = 8192

_DRIVER = b"iscsi"
ALL_TARGETS = -1
_MAX_REPLY = 256 << 20
_CALL_SECONDS = 30.0
_PEER = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Mode(enum.IntEnum):
    """What a request is about (enum tgtadm_mode)."""

    SYSTEM = 0
    TARGET = 1
    DEVICE = 2
    PORTAL = 3
    DRIVER = 4
    SESSION = 5
    CONNECTION = 6
    ACCOUNT = 7


class Op(enum.IntEnum):
    """What a request does (enum tgtadm_op)."""

    NEW = 0
    DELETE = 1
    SHOW = 2
    BIND = 3
    UNBIND = 4
    UPDATE = 5


class Code(enum.IntEnum):
    """tgtd's error numbers (enum tgtadm_errno)."""

    SUCCESS = 0
    UNKNOWN = 1
    NO_MEMORY = 2
    NO_DRIVER = 3
    NO_TARGET = 4
    NO_LUN = 5
    NO_SESSION = 6
    NO_CONNECTION = 7
    NO_BINDING = 8
    TARGET_EXISTS = 9  # the number or the name
    LUN_EXISTS = 10
    BINDING_EXISTS = 11
    ACL_EXISTS = 12
    NO_ACL = 13
    USER_EXISTS = 14  # the account exists, or is bound already
    NO_USER = 15
    TOO_MANY_USERS = 16
    INVALID_REQUEST = 17
    OUTGOING_EXISTS = 18
    TARGET_ACTIVE = 19
    LUN_ACTIVE = 20


class Refused(CommandFailed):
    """tgtd answered with an error number, in `code` (a Code where the number is known)."""

    def __init__(self, code: int, what: str) -> None:
        name = Code(code).name if code in set(Code) else "an unknown number"
        super().__init__(f"tgtd refused to {what}: {name} ({code}); see tgtd's log (journalctl -u tgt)")
        self.code = code


class Vanished(Unavailable, Refused):
    """What the request is about was there a moment ago: tgtd was restarted meanwhile, or somebody removed it."""


#: The refusals that mean so.
GONE = frozenset({Code.NO_TARGET, Code.NO_LUN, Code.NO_SESSION, Code.NO_CONNECTION, Code.NO_ACL, Code.NO_USER})


class Wire:
    """Asks the tgtd behind one socket. Thread-safe: it keeps no connection and no state."""

    def __init__(self, path: Path, *, call_seconds: float = 30.0) -> None:
        """path: tgtd's management socket. call_seconds: the longest wait for one reply."""
        self._path = path
        self._call_seconds = call_seconds

    def ask(
        self,
        mode: Mode,
        op: Op,
        what: str,
        deadline: Deadline,
        *,
        tid: int = ALL_TARGETS,
        sid: int = 0,
        lun: int = 0,
        cid: int = 0,
        direction: int = 0,
        text: str = "",
    ) -> str:
        """Send a request and return the text of the reply. what: names it in errors; never holds a secret.

        Raises Refused (with tgtd's number; Vanished is one), NoSpace when tgtd is out of memory, Unavailable when it
        does not answer or goes away in the middle, Timeout when the deadline comes before the reply. After an
        Unavailable or a Timeout the request may have taken effect: read back.
        """
        data = text.encode() + b"\0" if text else b""
        if len(data) > MAX_TEXT:
            raise Invalid(f"request to {what}: {len(data)} bytes, tgtd takes {MAX_TEXT}")
        header = REQUEST.pack(mode, op, _DRIVER, REQUEST.size + len(data), tid, sid, lun, cid, 0, 0, direction, 0, 0)
        deadline.check(f"ask tgtd to {what}")
        limit = deadline.within(self._call_seconds)
        with self._connect(limit) as connection:
            try:
                self._check_peer(connection)
                connection.settimeout(max(limit.remaining(), 0.001))
                connection.sendall(header + data)
                code, length = REPLY.unpack(_receive(connection, REPLY.size, limit))
                if code == Code.SUCCESS:
                    return _receive_text(connection, length, limit)
            except TimeoutError as error:
                raise Timeout(
                    f"tgtd did not answer in time when asked to {what} -> see that it does not hang, repeat"
                ) from error
            except (OSError, EOFError) as error:
                raise Unavailable(
                    f"tgtd went away when asked to {what} ({error}) -> see whether it runs (systemctl status tgt), "
                    "repeat"
                ) from error
        if code in (Code.NO_MEMORY, Code.TOO_MANY_USERS):
            raise NoSpace(f"tgtd has no room to {what}; give it more memory or publish less")
        if code == Code.NO_DRIVER:
            raise Unavailable("tgtd runs without its iscsi driver -> see journalctl -u tgt (is its port taken?)")
        raise Vanished(code, what) if code in GONE else Refused(code, what)

    def _connect(self, limit: Deadline) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(max(limit.remaining(), 0.001))
            # A full queue is refused at once, not waited for; a busy tgtd empties it in the next moment.
            wait_until(lambda: _try_connect(connection, os.fspath(self._path)), limit, what="tgtd to take a request")
            return connection
        except OSError as error:
            connection.close()
            raise Unavailable(
                f"tgtd does not answer on {self._path} ({error.strerror}) -> start it (systemctl start tgt), or set "
                "controller.tgt_socket to its socket"
            ) from error
        except BaseException:
            connection.close()
            raise

    def _check_peer(self, connection: socket.socket) -> None:
        # Secrets go over this socket: only root, or we ourselves in tests, may be on the other end.
        uid = _uid_of(connection)
        if uid not in (0, os.geteuid()):
            raise Unavailable(f"{self._path} is served by user {uid}, not by root: not tgtd -> stop that program")


def _try_connect(connection: socket.socket, path: str) -> bool:
    try:
        connection.connect(path)
    except BlockingIOError:
        return False
    return True


def _uid_of(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(raw)[1])


def _receive_text(connection: socket.socket, length: int, limit: Deadline) -> str:
    if not REPLY.size <= length <= _MAX_REPLY:
        raise EOFError(f"a reply of {length} bytes makes no sense")
    return _receive(connection, length - REPLY.size, limit).decode(errors="replace").rstrip("\0")


def _receive(connection: socket.socket, size: int, limit: Deadline) -> bytes:
    """Exactly `size` bytes. The deadline holds for all of them together, not for each piece."""
    data = bytearray()
    while len(data) < size:
        connection.settimeout(max(limit.remaining(), 0.001))
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError(f"connection closed after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)
