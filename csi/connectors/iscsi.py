"""Attaching a volume over iSCSI with open-iscsi: login, the right disk and no other, and a clean way out.

A target name holds the volume's id and the generation of its publication, and is never used twice: a session of an
older generation can only be a left-over, and never finds its target again.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from csi.connectors.block_device import BlockDevices
from csi.connectors.devices import MOUNT_TABLES, Devices
from csi.connectors.identity import Identity
from csi.connectors.initiator import INITIATOR_FILE, ISCSID_SOCKET, Initiator
from csi.connectors.iscsiadm import Iscsiadm
from csi.connectors.login import Login
from csi.connectors.logout import Logout
from csi.connectors.node_records import DATABASE_FOLDERS, NodeRecords, node_settings
from csi.connectors.sessions import Session, Sessions, split_target
from csi.deadline import Deadline, wait_until
from csi.errors import DataLoss, DriverError, InUse, Invalid, NotFound, Timeout, Unavailable
from csi.locks import ResourceLock
from csi.log import get_logger
from csi.model import Attachment, Complaint, Device, scsi_id_of
from csi.run import Boundary, Runner, no_boundary

_RECOVERY_SECONDS = 10.0  # for a lost session of the same generation to come back by itself


class IscsiConnector:
    """The Connector of protocol "iscsi"; see connectors/base.py."""

    def __init__(
        self,
        runner: Runner,
        *,
        sysfs: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        mount_tables: Sequence[Path] = MOUNT_TABLES,
        database_folders: Sequence[Path] = DATABASE_FOLDERS,
        initiator_file: Path = INITIATOR_FILE,
        iscsid_socket: str = ISCSID_SOCKET,
        program: Sequence[str] = ("iscsiadm",),
        replacement_seconds: int = 120,
        login_seconds: int = 5,
        login_tries: int = 3,
        digests: bool = False,
        block: BlockDevices | None = None,
        boundary: Boundary = no_boundary,
    ) -> None:
        """program: how to start iscsiadm; where iscsid is the host's, its iscsiadm must be the host's too.

        replacement_seconds: how long I/O waits for a lost session before it fails.
        login_seconds, login_tries: how long one try of iscsid lasts at most, and how many it makes for one call.
        digests: demand CRC32C of headers and data of every session, else as iscsid.conf has it.
        """
        limit = login_seconds * (login_tries + 1) + 20.0  # iscsid gives up before that
        settings = node_settings(replacement_seconds=replacement_seconds, login_seconds=login_seconds, digests=digests)
        iscsiadm = Iscsiadm(runner, program=program, limit_seconds=limit)
        self._records = NodeRecords(iscsiadm, settings=settings, folders=database_folders, boundary=boundary)
        self._initiator = Initiator(
            iscsiadm, runner, sysfs=sysfs, initiator_file=initiator_file, iscsid_socket=iscsid_socket
        )
        self._devices = Devices(runner, sysfs=sysfs, dev=dev, mount_tables=mount_tables, block=block)
        self._sessions = Sessions(sysfs)
        self._identity = Identity(self._devices, sysfs=sysfs)
        self._logout = Logout(iscsiadm=iscsiadm, records=self._records, devices=self._devices)
        self._login = Login(
            iscsiadm=iscsiadm,
            records=self._records,
            sessions=self._sessions,
            devices=self._devices,
            sysfs=sysfs,
            login_seconds=login_seconds,
            login_tries=login_tries,
        )
        self._locks = _VolumeLocks()
        self._log = get_logger("iscsi")

    @property
    def protocol(self) -> str:
        """See Connector.protocol."""
        return "iscsi"

    def connect(self, attachment: Attachment, deadline: Deadline) -> Device:
        """See Connector.connect."""
        _check(attachment)
        with self._locks.hold(attachment.volume_id, deadline):
            self._end_older(attachment, deadline)
            session, is_new = self._ensure_session(attachment, deadline)
            try:
                name = self._login.wait_for_disk(session, attachment, deadline)
                self._identity.verify(session, name, attachment, deadline, is_new=is_new)
                return self._describe(name, session)
            except (DataLoss, Unavailable, Timeout):
                self._logout.undo(session, deadline)
                raise

    def find(self, volume_id: str) -> Device | None:
        """See Connector.find. A living session comes before a dead one."""
        sessions = self._sessions.of_volume(volume_id)
        for session in sorted(sessions, key=lambda session: not session.logged_in):
            for name in session.disks():
                if device := self._devices.describe(name, generation=session.generation):
                    return device
        return None

    def disconnect(self, volume_id: str, deadline: Deadline) -> None:
        """See Connector.disconnect. Removes the sessions and records of all generations."""
        with self._locks.hold(volume_id, deadline):
            self._disconnect(volume_id, deadline)

    def rescan(self, volume_id: str, *, size_bytes: int, deadline: Deadline) -> Device:
        """See Connector.rescan. Raises NotFound when the volume is not attached, Timeout while it is still smaller."""
        with self._locks.hold(volume_id, deadline):
            session, name = self._attached(volume_id)

            def grown() -> bool:
                self._identity.refresh(name, deadline)
                return self._devices.size_bytes(name) >= size_bytes

            try:
                wait_until(grown, deadline, what="the new size", first=0.1, most=2.0)
            except Timeout as error:
                raise Timeout(
                    f"volume {volume_id}: {name} has {self._devices.size_bytes(name)} bytes, not yet {size_bytes} "
                    "bytes; see that the target on the SNODE has the new size, and repeat"
                ) from error
            self._identity.verify_name(name, volume_id, scsi_id_of(volume_id))
            return self._describe(name, session)

    def problems(self, deadline: Deadline) -> list[str]:
        """See Connector.problems."""
        return self._initiator.problems(deadline)

    def complaints(self, volume_id: str) -> list[Complaint]:
        """See Connector.complaints."""
        sessions = self._sessions.of_volume(volume_id)
        if any(session.logged_in for session in sessions):
            return []
        return [self._complaint(session) for session in sessions[-1:]]

    def left_over(self) -> list[str]:
        """See Connector.left_over."""
        self._records.remove_leftovers()
        targets = {session.target for session in self._sessions.ours()} | set(self._records.targets())
        return sorted({parts[0] for target in targets if (parts := split_target(target))})

    def _complaint(self, session: Session) -> Complaint:
        """About the latest session of a volume, which is lost."""
        what = f"volume {session.volume_id}: the session to {session.target} is lost"
        check = "see that tgtd runs on the SNODE and that the network lets this node through"
        if any(self._devices.attribute(name, "device/state").endswith("offline") for name in session.disks()):
            return Complaint(
                "SessionGivenUp",
                f"{what} since more than node.replacement_timeout, and I/O fails; {check}, then unstage the volume and "
                "stage it again",
            )
        return Complaint("SessionLost", f"{what}, and I/O waits until iscsid gets it back; {check}")

    def _disconnect(self, volume_id: str, deadline: Deadline) -> None:
        sessions = self._sessions.of_volume(volume_id)
        for session in sessions:
            self._logout.refuse_if_used(session)
        for session in sessions:
            self._logout.end(session, deadline)
        self._records.remove_volume(volume_id)
        for session in self._sessions.of_volume(volume_id):
            raise Unavailable(f"volume {volume_id}: a session to {session.target} appeared meanwhile; repeat")

    def _end_older(self, attachment: Attachment, deadline: Deadline) -> None:
        """End the sessions of older generations; an older one in use must not be mistaken for the new attachment."""
        targets = {path.target for path in attachment.paths}
        older = [s for s in self._sessions.of_volume(attachment.volume_id) if s.target not in targets]
        for session in older:
            try:
                self._logout.refuse_if_used(session)
            except InUse as error:
                raise InUse(
                    "an older attachment of the volume, no longer valid, must be unpublished and unstaged first: "
                    f"{error}"
                ) from error
        for session in older:
            self._log.info("ending a session of an older generation", target=session.target)
            self._logout.end(session, deadline)
        self._records.remove_volume(attachment.volume_id, keep=targets)

    def _ensure_session(self, attachment: Attachment, deadline: Deadline) -> tuple[Session, bool]:
        """The session, and whether it was made now."""
        targets = {path.target for path in attachment.paths}
        session = self._sessions.find(attachment.volume_id, targets)
        if session is not None:
            if session.logged_in or _recovers(session, deadline):
                return session, False
            try:
                self._logout.refuse_if_used(session)
            except InUse as error:
                raise Unavailable(f"{error}; its session is lost, and iscsid tries to get it back") from error
            self._logout.end(session, deadline)
        try:
            return self._login.login(attachment, deadline)
        except DriverError:
            # Nothing is attached, so neither the secret nor half a session may stay. A repetition makes them anew.
            session = self._sessions.find(attachment.volume_id, targets)
            if session is None:
                self._records.remove_volume(attachment.volume_id)
            elif not session.logged_in:
                self._logout.undo(session, deadline)
            raise

    def _attached(self, volume_id: str) -> tuple[Session, str]:
        for session in self._sessions.of_volume(volume_id):
            for name in session.disks():
                return session, name
        raise NotFound(f"volume {volume_id}: not attached to this node over iSCSI; stage it first")

    def _describe(self, name: str, session: Session) -> Device:
        device = self._devices.describe(name, generation=session.generation)
        if device is None:
            raise Unavailable(f"volume {session.volume_id}: {name} vanished while it was attached; repeat")
        return device


def _recovers(session: Session, deadline: Deadline) -> bool:
    """True if a lost session comes back within a short time; its target may just have been restarted."""
    seconds = min(_RECOVERY_SECONDS, deadline.remaining() / 2)  # the rest is for a new login
    try:
        return wait_until(lambda: session.logged_in, deadline.within(seconds), what="the session")
    except Timeout:
        return False


def _check(attachment: Attachment) -> None:
    what = f"publish_context.paths of volume {attachment.volume_id}"
    if not attachment.paths or not attachment.scsi_id:
        raise Invalid(f"{what}: no path or no identity in it")
    for path in attachment.paths:
        parts = split_target(path.target)
        if parts is None or parts[0] != attachment.volume_id:
            raise Invalid(f"{what}: {path.target[:230]!r} is not a target of this volume")
        if not 0 < path.lun < 256:
            raise Invalid(f"{what}: LUN {path.lun} is not between 1 and 255")


class _VolumeLocks:
    """A short waiting lock for each volume in use, so that sweep and a request never work on one target at once."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[ResourceLock, int]] = {}

    @contextmanager
    def hold(self, volume_id: str, deadline: Deadline) -> Iterator[None]:
        """Hold the lock, at most until the deadline."""
        with self._guard:
            lock, users = self._locks.get(volume_id, (ResourceLock(f"target of volume {volume_id}"), 0))
            self._locks[volume_id] = (lock, users + 1)
        try:
            with lock.hold(deadline):
                yield
        finally:
            with self._guard:
                lock, users = self._locks.pop(volume_id)
                if users > 1:
                    self._locks[volume_id] = (lock, users - 1)
