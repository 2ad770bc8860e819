"""From a session in any state to none: nothing in use, nothing unwritten, nothing left."""

from pathlib import Path

from csi.connectors.devices import Devices
from csi.connectors.iscsiadm import Iscsiadm, error_of
from csi.connectors.node_records import NodeRecords
from csi.connectors.sessions import Session, disk_of
from csi.deadline import Deadline, wait_until
from csi.errors import CommandFailed, InUse, Timeout, Unavailable
from csi.log import get_logger

_GONE_SECONDS = 15.0


class Logout:
    """Ends sessions. iscsiadm logs out under a mounted file system without a word, so the looking is ours."""

    def __init__(self, *, iscsiadm: Iscsiadm, records: NodeRecords, devices: Devices) -> None:
        self._iscsiadm = iscsiadm
        self._records = records
        self._devices = devices
        self._log = get_logger("iscsi")

    def refuse_if_used(self, session: Session) -> None:
        """Raise InUse if a disk of the session is mounted or held."""
        for name in session.disks():
            self._devices.refuse_if_used(name, f"volume {session.volume_id}, generation {session.generation}")

    def end(self, session: Session, deadline: Deadline) -> None:
        """Flush and remove the disks of an unused session, then log out; verified in sysfs. Dead sessions as well."""
        for unit in session.units():
            name = disk_of(unit)
            if name:
                self._settle(name, session, deadline)
                self._flush(name, session, deadline)
            self._devices.write(unit / "delete", "1", deadline)
            self._wait_gone(unit, session, deadline)
        if not session.exists:
            return
        code = self._iscsiadm.logout(session.number, deadline)
        # 2, 21 and 22 mean that it was gone already, or that iscsid is not there to ask: sysfs knows which.
        seconds = _GONE_SECONDS if code == 0 else 1.0
        try:
            wait_until(lambda: not session.exists, deadline.within(seconds), what="the session to end")
        except Timeout as error:
            what = f"volume {session.volume_id}, logout from {session.target}"
            if code in (0, 2, 21, 22):
                raise Unavailable(
                    f"{what}: session {session.number} is still there; see that iscsid runs and repeat"
                ) from error
            raise error_of(code, what) from error

    def undo(self, session: Session, deadline: Deadline) -> None:
        """End a session that did not lead to a verified disk, unless it is in use or there is no time left."""
        try:
            self.refuse_if_used(session)
            self.end(session, deadline)
            self._records.remove(session.target)
        except (InUse, Unavailable, Timeout, CommandFailed) as error:
            self._log.warning("session stays until the request is repeated", target=session.target, reason=str(error))

    def _settle(self, name: str, session: Session, deadline: Deadline) -> None:
        """Wait while the kernel holds all I/O back, until the session is back or given up.

        A flush begun now would hang uninterruptibly for as long.
        """
        try:
            wait_until(lambda: self._devices.attribute(name, "device/state") != "blocked", deadline, what="the disk")
        except Timeout as error:
            raise Timeout(
                f"volume {session.volume_id}: the session to {session.target} is lost and the kernel still waits for "
                f"it (replacement_timeout); {name} can be removed after that; repeat later"
            ) from error

    def _flush(self, name: str, session: Session, deadline: Deadline) -> None:
        """Flush a living disk. Without its device node it is left to the kernel, which does so at the removal."""
        if self._devices.attribute(name, "device/state") == "running" and self._devices.has_node(name):
            try:
                self._devices.flush(name, deadline)
                return
            except CommandFailed:
                if session.logged_in:
                    raise
        self._log.warning("the disk is dead or has no device node, not flushed", disk=name, target=session.target)

    def _wait_gone(self, unit: Path, session: Session, deadline: Deadline) -> None:
        try:
            wait_until(lambda: not unit.exists(), deadline.within(_GONE_SECONDS), what="the disk to go")
        except Timeout as error:
            raise Unavailable(
                f"volume {session.volume_id}: SCSI device {unit.name} does not go away; see the kernel's log"
            ) from error
