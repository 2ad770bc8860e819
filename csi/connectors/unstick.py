"""Freeing sessions that iscsid can't get back by itself.

While a SNODE restores its targets, tgtd drops new connections. A connection that is dropped between its making and its
login leaves a mark on the kernel's side, and until iscsid asks the kernel to stop the connection every later one is
refused; iscsid (2.1.8 at least) does not ask (open-iscsi, issue 387). The session would be lost although its target is
back, and in the end its filesystem too. So we ask.
"""

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from csi.connectors.devices import read_attribute
from csi.connectors.sessions import Session, Sessions
from csi.deadline import Deadline
from csi.errors import Unavailable
from csi.log import get_logger
from csi.run import Boundary, no_boundary, step

#: Asks the kernel to stop the connection of a session (by number) for recovery. Raises Unavailable.
Stop = Callable[[int], None]

_NETLINK_ISCSI = 8
_STOP_CONNECTION = 18  # ISCSI_UEVENT_STOP_CONN
_FOR_RECOVERY = 3  # STOP_CONN_RECOVER
_SECONDS = 5.0
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
#: struct iscsi_uevent: type, interface error, transport, then of msg_stop_conn: session, connection, handle, flag.
_EVENT = struct.Struct("=IIQ IIQI")
_EVENT_BYTES = 256  # at least the kernel's struct, whose union is longer in newer releases


class Unstick:
    """Looks again and again; a session that is found unconnected twice running is freed."""

    def __init__(
        self, *, sysfs: Path = Path("/sys"), stop: Stop | None = None, boundary: Boundary = no_boundary
    ) -> None:
        self._boundary = boundary
        self._sessions = Sessions(sysfs)
        self._stop = stop or KernelStop(sysfs)
        self._failed: frozenset[int] = frozenset()
        self._told: frozenset[int] = frozenset()
        self._trouble = ""
        self._log = get_logger("iscsi")

    def turn(self, deadline: Deadline) -> None:
        """One look; background work, never long.

        Without a bound connection there is nothing to stop but the mark, so it hurts no login under way, but for one
        that begins in this very moment: that one is repeated by iscsid.
        """
        del deadline
        lost = [session for session in self._sessions.ours() if not session.logged_in]
        failed = {session.number: session for session in lost if _is_failed(session)}
        for number in self._failed.intersection(failed):
            self._free(failed[number])
        self._failed = frozenset(failed)
        self._told &= {session.number for session in lost}

    def _free(self, session: Session) -> None:
        try:
            with step(self._boundary, "stop-connection"):
                # Asked again: while others were freed iscsid may have got this one back, and would not learn of a stop.
                if session.logged_in or not _is_failed(session):
                    return
                self._stop(session.number)
        except Unavailable as error:
            if str(error) != self._trouble:  # once, not every round
                self._log.warning("can't free a lost session", target=session.target, error=str(error))
            self._trouble = str(error)
            return
        self._trouble = ""
        if session.number not in self._told:
            self._log.info("session is lost; iscsid may try again without hindrance", target=session.target)
        self._told |= {session.number}


def _is_failed(session: Session) -> bool:
    """Whether the kernel has no connection for the session, nor one that is being logged in."""
    name = f"connection{session.number}:0"
    return read_attribute(session.folder / name / "iscsi_connection" / name / "state") == "failed"


class KernelStop:
    """The Stop of production: what iscsid itself sends in other cases."""

    def __init__(self, sysfs: Path) -> None:
        self._handle = sysfs / "class" / "iscsi_transport" / "tcp" / "handle"

    def __call__(self, number: int) -> None:
        """See Stop."""
        handle = read_attribute(self._handle)
        if not handle:
            raise Unavailable(f"{self._handle} is not there; load the kernel module iscsi_tcp, mount the host's /sys")
        event = _EVENT.pack(_STOP_CONNECTION, 0, int(handle), number, 0, 0, _FOR_RECOVERY)
        length = _HEADER.size + _EVENT_BYTES
        message = _HEADER.pack(length, _STOP_CONNECTION, 1, 0, os.getpid()) + event.ljust(_EVENT_BYTES, b"\0")
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ISCSI) as link:
                link.settimeout(_SECONDS)
                link.bind((0, 0))
                link.send(message)
                link.recv(4096)  # the kernel has done it, or knows no such session any more
        except OSError as error:
            raise Unavailable(
                f"the kernel does not stop the lost connection of session {number} ({error.strerror or error}); if the "
                "session does not come back, restart iscsid; a container needs the host's network"
            ) from error
