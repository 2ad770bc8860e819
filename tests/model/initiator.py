"""The iSCSI initiator of a node, joined to the fake tgtd: a session lives as long as its nexus does in there.

A lost session is tried again whenever anything happens, as iscsid does, with the credentials of its login; it comes
back only where exactly its target lets it in.
"""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from csi.model import Chap
from tests.fakes import iscsi
from tests.fakes.iscsi import OK, FakeIscsi
from tests.fakes.runner import Reply
from tests.fakes.tgt import FakeLun, FakeSession, FakeTgtd, LoginRefused

_LUN = 1


@dataclass
class _Login:
    """What a session was made with, and its other end."""

    target: str
    chap: Chap
    nexus: FakeSession
    path: Path | None = None  # the backing file, as last seen


class Initiator(FakeIscsi):
    """One node's. `connected`: False while the node is cut off from the network."""

    def __init__(
        self, root: Path, *, name: str, major: int, tgtd: FakeTgtd, portal: str, mounted: Callable[[], Collection[str]]
    ) -> None:
        """major: of its disks' numbers, which no device of this machine may have. mounted: numbers that are in use."""
        super().__init__(root)
        self.close()  # tgtd's portal is elsewhere
        self.portal = portal
        self.name = name
        self.initiator_file.write_text(f"InitiatorName={name}\n")
        self.connected = True
        self._major = major
        self._tgtd = tgtd
        self._mounted = mounted
        self._logins: dict[int, _Login] = {}

    def look(self) -> None:
        """Let the kernel and iscsid see what became of the sessions."""
        self.targets = {
            target.name: iscsi.FakeTarget(
                iscsi.FakeLun(lun.scsi_id.removeprefix("naa."), lun.size_bytes, lun.readonly) if lun else None, None
            )
            for target in self._tgtd.targets.values()
            for lun in (target.luns.get(_LUN),)
        }
        for number, session in self.sessions.items():
            login = self._logins[number]
            if not self.alive(number):
                login.nexus = self._enter(login.target, login.chap) or login.nexus
            alive = self.alive(number)
            lun = self._lun(login)
            if alive and lun is not None and lun.path:
                login.path = Path(lun.path)
            states = ("LOGGED_IN", "running") if alive else ("FAILED", "transport-offline")
            _write(session.folder / "iscsi_session" / session.folder.name / "state", states[0])
            for disk in session.disks:
                _write(disk.unit / "state", states[1])

    def alive(self, number: int) -> bool:
        """Whether commands of a session reach its disk."""
        login = self._logins[number]
        target = self._tgtd.by_name(login.target)
        return (
            self.connected
            and target is not None
            and target.state == "ready"
            and any(nexus is login.nexus and nexus.connected for nexus in target.sessions)
        )

    def backing(self, number: int) -> Path | None:
        """The file on the SNODE that a session leads to, or led to."""
        return self._logins[number].path

    def lun(self, number: int) -> FakeLun | None:
        """The living LUN of a session."""
        return self._lun(self._logins[number]) if self.alive(number) else None

    def nexus(self, number: int) -> FakeSession:
        """The other end of a session."""
        return self._logins[number].nexus

    def number_of_disk(self, major_minor: str) -> int | None:
        """The session that has the disk with this number."""
        for number, session in self.sessions.items():
            for disk in session.disks:
                if (disk.unit / "block" / disk.name / "dev").read_text().strip() == major_minor:
                    return number
        return None

    def reboot(self) -> None:
        """All sessions are gone, without a word to their targets; the node database stays."""
        for number in list(self.sessions):
            self._forget(number)

    def place_of(self, number: int) -> tuple[str, int, int]:
        """The lowest place that no disk and no mount has, as the kernel does it."""
        names = {disk.name for session in self.sessions.values() for disk in session.disks}
        mounted = self._mounted()
        index = next(i for i in range(1000) if f"sd{i}" not in names and f"{self._major}:{16 * i}" not in mounted)
        return f"sd{index}", self._major, 16 * index

    # BlockDevices

    def names(self, path: Path) -> frozenset[str]:
        _, session = self._find(path.name)
        if not self.alive(session.number):
            from csi.errors import Unavailable

            raise Unavailable(f"{path}: dead")
        return super().names(path)

    # programs

    def _login(self, target: str, portal: str) -> Reply:
        record = self._record(target, portal)
        if not record.is_file():
            return 21, "", "iscsiadm: No records found"
        if any(session.target == target for session in self.sessions.values()):
            return 15, "", "iscsiadm: default: 1 session requested, but 1 already present."
        settings = dict(line.partition(" = ")[::2] for line in record.read_text().splitlines())
        assert settings["node.startup"] == settings["node.session.scan"] == "manual"
        keys = ("username", "password", "username_in", "password_in")
        user, secret, mutual_user, mutual_secret = (settings.get(f"node.session.auth.{key}", "") for key in keys)
        chap = Chap(user=user, secret=secret, mutual_user=mutual_user, mutual_secret=mutual_secret)
        if not self.connected:
            return 4, "", "iscsiadm: encountered connection failure"
        nexus = self._enter(target, chap)
        if nexus is None:
            found = self._tgtd.by_name(target)
            code = 24 if found is not None and self.name in found.names and found.state == "ready" else 19
            return code, "", f"iscsiadm: initiator reported error ({code})"
        self._logins[self._next] = _Login(target, chap, nexus)
        self.make_session(target)
        self.look()
        return OK

    def _end_session(self, number: int) -> Reply:
        if number in self.sessions and self.connected:
            login = self._logins[number]
            self._drop(login.target, login.nexus)
        reply = super()._end_session(number)
        self._logins.pop(number, None)
        return reply

    def _write(self, argv: list[str], input: str | None) -> Reply:  # type: ignore[override]
        path = Path(argv[4])
        if path.name == "rescan" and path.exists():
            _, session = self._find(path.parent.parent.name)
            if not self.alive(session.number):
                return 1, "", f"{path}: Input/output error"
        return super()._write(argv, input)

    def _flush(self, argv: list[str], input: str | None) -> Reply:  # type: ignore[override]
        _, session = self._find(Path(argv[4]).name)
        if not self.alive(session.number):
            return 1, "", f"{argv[4]}: Input/output error"
        return super()._flush(argv, input)

    # the kernel

    def scan(self, session: iscsi._FakeSession) -> None:
        if self.alive(session.number):
            super().scan(session)
            self.look()

    def _enter(self, target: str, chap: Chap) -> FakeSession | None:
        """Log in to tgtd; None when it does not let us in, or is not the one that knows our secret."""
        if not self.connected:
            return None
        try:
            nexus = self._tgtd.login(target, self.name, user=chap.user, secret=chap.secret)
        except LoginRefused:
            return None
        found = self._tgtd.by_name(target)
        assert found is not None
        if found.outgoing != chap.mutual_user or self._tgtd.accounts.get(chap.mutual_user) != chap.mutual_secret:
            self._drop(target, nexus)
            return None
        for older in list(found.sessions):  # session reinstatement (RFC 7143, 6.3.5)
            if older is not nexus and older.initiator == self.name:
                self._drop(target, older)
        return nexus

    def _drop(self, target: str, nexus: FakeSession) -> None:
        nexus.connected = False
        found = self._tgtd.by_name(target)
        if found is not None and not nexus.in_flight:
            found.sessions = [session for session in found.sessions if session is not nexus]

    def _lun(self, login: _Login) -> FakeLun | None:
        target = self._tgtd.by_name(login.target)
        return target.luns.get(_LUN) if target is not None else None

    def _forget(self, number: int) -> None:
        session = self.sessions.pop(number)
        for disk in list(session.disks):
            self._remove(session, disk)
        (self.sysfs / "class" / "iscsi_session" / f"session{number}").unlink()
        shutil.rmtree(session.folder.parent)
        shutil.rmtree(self.sysfs / "class" / "scsi_host" / f"host{number}")
        del self._logins[number]


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text + "\n":
        path.write_text(text + "\n")
