"""From a publish context to a session that is logged in and shows the volume's disk."""

import itertools
from pathlib import Path

from csi.connectors.devices import Devices
from csi.connectors.iscsiadm import EXISTS, EXIT_CODES, REFUSED, Iscsiadm, error_of
from csi.connectors.node_records import NodeRecords
from csi.connectors.portal import Portal
from csi.connectors.sessions import Session, Sessions
from csi.deadline import Deadline, wait_until
from csi.errors import DriverError, Invalid, Timeout, Unavailable
from csi.model import Attachment, IscsiPath

_PATIENCE_SECONDS = 20.0  # for logins that may yet succeed; then the caller repeats, and holds no worker meanwhile
_REFUSALS = 5  # logins that are refused, before that is believed
_SESSION_SECONDS = 10.0
_DISK_SECONDS = 30.0
_CLEANUP_SECONDS = 3.0  # kept back from the waits, for undoing what was begun


class Login:
    """Makes sessions and finds their disks. Decides by sysfs, not by what iscsiadm says."""

    def __init__(
        self,
        *,
        iscsiadm: Iscsiadm,
        records: NodeRecords,
        sessions: Sessions,
        devices: Devices,
        sysfs: Path,
        login_seconds: int,
        login_tries: int,
    ) -> None:
        """login_seconds: how long one try of iscsid lasts at most. login_tries: how many it makes for one call."""
        self._iscsiadm = iscsiadm
        self._records = records
        self._sessions = sessions
        self._devices = devices
        self._sysfs = sysfs
        self._login_seconds = login_seconds
        self._login_tries = login_tries

    def login(self, attachment: Attachment, deadline: Deadline) -> tuple[Session, bool]:
        """Try the paths in turn until one works, patience ends, or an answer says that trying is no use.

        Also whether the session is new, so that nothing of it was read before.
        """
        # Time is kept back, so that the caller hears the reason and not only that its time was over.
        spare = max(deadline.remaining() / 2, deadline.remaining() - _CLEANUP_SECONDS)
        patience = deadline.within(min(_PATIENCE_SECONDS, spare))
        refusals, pause = 0, 0.1
        for number, path in enumerate(itertools.cycle(attachment.paths)):
            left, others = patience.remaining(), max(0, len(attachment.paths) - number - 1)
            code, failure = self._try(path, attachment, patience.within(left / (1 + others)), deadline)
            if failure is None:
                return self._wait_for_session(attachment.volume_id, path.target, deadline), code == 0
            refusals += code == REFUSED
            again = EXIT_CODES[code].retry if code in EXIT_CODES else False
            if code == REFUSED:
                again = refusals < _REFUSALS
            # Another one may take as long as this one.
            late = not others and patience.remaining() < pause + (left - patience.remaining())
            if not again or late:
                raise failure
            deadline.sleep(pause)
            deadline.check(f"log in for volume {attachment.volume_id}")
            pause = min(4.0, pause * 2)
        raise Invalid(f"publish_context.paths of volume {attachment.volume_id}: no path in it")

    def wait_for_disk(self, session: Session, attachment: Attachment, deadline: Deadline) -> str:
        """The name of the disk at exactly our LUN. Scans, and scans again later and later, until it is there."""
        lun = attachment.paths[0].lun
        limit = deadline.within(min(_DISK_SECONDS, max(0.0, deadline.remaining() - _CLEANUP_SECONDS)))
        pause = 0.5
        while not (name := session.disk(lun)):
            self._scan(session, lun, deadline)
            try:
                name = wait_until(lambda: session.disk(lun), limit.within(pause), what="the disk", most=0.1)
                break
            except Timeout as error:
                if limit.remaining() <= 0 or not session.exists:
                    raise Unavailable(
                        f"volume {attachment.volume_id}: session to {session.target} stands, but LUN {lun} shows no "
                        "disk; see that the target has it (snode doctor on the SNODE), then repeat"
                    ) from error
                pause = min(8.0, pause * 2)
        self._devices.wait_for_node(name, deadline)
        return name

    def _try(
        self, path: IscsiPath, attachment: Attachment, patience: Deadline, deadline: Deadline
    ) -> tuple[int, DriverError | None]:
        """One login by one path: the exit code and the error to raise if it stays so; None when logged in."""
        portal = Portal.parse(path.portal)
        try:
            portal.try_connect(patience)
        except Unavailable as error:
            return 4, error
        code = self._login_once(path.target, portal, attachment, patience, deadline)
        if code in (0, EXISTS):
            return code, None
        return code, error_of(code, f"volume {attachment.volume_id}, login to {path.target} at {portal}")

    def _login_once(
        self, target: str, portal: Portal, attachment: Attachment, patience: Deadline, deadline: Deadline
    ) -> int:
        # iscsid can't be stopped once it tries: it must give up by itself in time.
        tries = max(1, min(self._login_tries, int(patience.remaining() // self._login_seconds)))
        self._records.write(target, portal, chap=attachment.chap, login_tries=tries, deadline=deadline)
        return self._iscsiadm.login(target, portal, deadline)

    def _wait_for_session(self, volume_id: str, target: str, deadline: Deadline) -> Session:
        def look() -> Session | None:
            session = self._sessions.find(volume_id, {target})
            return session if session and session.logged_in else None

        try:
            return wait_until(look, deadline.within(_SESSION_SECONDS), what="the session")
        except Timeout as error:
            raise Unavailable(
                f"volume {volume_id}: iscsiadm reports a session to {target}, the kernel shows none that is logged in; "
                "see iscsid's log, and repeat"
            ) from error

    def _scan(self, session: Session, lun: int, deadline: Deadline) -> None:
        unit = session.unit(lun)
        if unit is not None and not session.disk(lun):
            kind = (unit / "type").read_text().strip() if (unit / "type").exists() else ""
            if kind != "0":
                # No disk answers (the target had no such LUN yet). The kernel keeps that, and no scan looks again.
                self._devices.write(unit / "delete", "1", deadline)
        self._devices.write(session.scan_file(self._sysfs), session.scan_line(lun), deadline)
