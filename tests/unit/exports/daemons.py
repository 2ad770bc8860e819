"""The two tgtd of the tests behind one face: the fake, and the real one of this machine, private, on a free port.

The same scenarios run on both, so that the fake can't drift from what it stands for.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Protocol

from csi.deadline import Deadline
from csi.errors import DriverError
from csi.exports.tgt_client import TgtClient
from csi.model import Publication
from tests.fakes.tgt import FakeSession, FakeTgtd, LoginRefused
from tests.unit.exports.initiator import CommandError, ConnectionGone, LoginFailed, Session


class AnySession(Protocol):
    """A session with LUN 1 of a target."""

    def alive(self) -> bool: ...
    def size_bytes(self) -> int: ...
    def vendor(self) -> str: ...
    def serial(self) -> str: ...
    def naa(self) -> str: ...
    def write_protected(self) -> bool: ...
    def close(self) -> None: ...


class Daemon(Protocol):
    """A tgtd under test."""

    socket: Path
    portal: str

    def login(self, publication: Publication, **changes: str) -> AnySession:
        """Log in as the publication's node, but for the changes. Raises LoginFailed."""
        ...

    def restart(self) -> None:
        """kill -9 and start again: all state is lost."""
        ...

    def stop(self) -> None:
        """kill -9."""
        ...


def credentials(publication: Publication, changes: dict[str, str]) -> dict[str, str]:
    """Arguments of a login."""
    chap = publication.chap
    return {
        "initiator": publication.node.initiator,
        "user": chap.user,
        "secret": chap.secret,
        "mutual_user": chap.mutual_user,
        "mutual_secret": chap.mutual_secret,
        **changes,
    }


class _FakeSession:
    def __init__(self, fake: FakeTgtd, name: str, session: FakeSession) -> None:
        self._fake, self._name, self._session = fake, name, session

    def alive(self) -> bool:
        target = self._fake.by_name(self._name)
        return target is not None and self._session in target.sessions and self._session.connected

    def size_bytes(self) -> int:
        return self._fake.by_name(self._name).luns[1].size_bytes  # type: ignore[union-attr]

    def vendor(self) -> str:
        return self._fake.by_name(self._name).luns[1].vendor  # type: ignore[union-attr]

    def serial(self) -> str:
        return self._fake.by_name(self._name).luns[1].scsi_sn  # type: ignore[union-attr]

    def naa(self) -> str:
        return self._fake.by_name(self._name).luns[1].scsi_id  # type: ignore[union-attr]

    def write_protected(self) -> bool:
        return self._fake.by_name(self._name).luns[1].readonly  # type: ignore[union-attr]

    def close(self) -> None:
        target = self._fake.by_name(self._name)
        if target is not None and self._session in target.sessions:
            target.sessions.remove(self._session)


class FakeDaemon:
    """The fake."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "socket.0"
        self.portal = "127.0.0.1:3260"
        self.fake = FakeTgtd(self.socket)
        self.fake.start()

    def login(self, publication: Publication, **changes: str) -> AnySession:
        fields = credentials(publication, changes)
        try:
            session = self.fake.login(
                publication.target,
                fields["initiator"],
                user=fields["user"],
                secret=fields["secret"],
                alias=fields.get("alias", "none"),
            )
        except LoginRefused as error:
            raise LoginFailed(str(error)) from error
        return _FakeSession(self.fake, publication.target, session)

    def restart(self) -> None:
        self.fake.restart()

    def stop(self) -> None:
        self.fake.stop()


class RealDaemon:
    """tgtd of the package tgt, with a management socket and a port of its own."""

    def __init__(self, folder: Path) -> None:
        assert shutil.which("tgtd"), "tgtd is missing: install the package tgt"
        assert os.geteuid() == 0, "tgtd needs root: run these tests as root"
        self._folder = folder
        self._number = "7"
        self.socket = folder / f"s.{self._number}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.portal = f"127.0.0.1:{probe.getsockname()[1]}"
        self._sessions: list[Session] = []
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["tgtd", "-f", "--iscsi", f"portal={self.portal}", "-C", self._number, "-t", "2"],
                env={"PATH": os.environ["PATH"], "TGT_IPC_SOCKET": str(self._folder / "s")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        client, end = TgtClient(self.socket), time.monotonic() + 10
        while True:
            with contextlib.suppress(DriverError):
                if "iscsi: ready" in client.show_names(Deadline.after(1)):
                    return
            assert self.process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end, (self._folder / "log").read_text()
            time.sleep(0.02)

    def login(self, publication: Publication, **changes: str) -> AnySession:
        fields = credentials(publication, changes)
        session = Session(self.portal, publication.target, fields.pop("initiator"), **fields)  # type: ignore[arg-type]
        self._sessions.append(session)
        return session

    def restart(self) -> None:
        self._kill()
        self.start()

    def stop(self) -> None:
        for session in self._sessions:
            session.close()
        self._kill()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()


__all__ = ["AnySession", "CommandError", "ConnectionGone", "Daemon", "FakeDaemon", "LoginFailed", "RealDaemon"]
