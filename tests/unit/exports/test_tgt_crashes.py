"""kill -9 of the driver, and of tgtd, at every step; then the same request again, or the background's reconcile."""

import itertools
import os
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest

from csi.errors import DriverError, Unavailable
from csi.exports.tgt import TgtExport
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_show import parse_accounts, parse_names, parse_system_state
from csi.model import MIB, Publication, scsi_id_of
from tests.fakes.crash import Crash, CrashAt
from tests.unit.exports.conftest import OTHER_NODE, Make, build_export, soon
from tests.unit.exports.daemons import Daemon, FakeDaemon, LoginFailed


@dataclass
class Case:
    """A request with the state that it meets and the state that it must leave."""

    daemon: Daemon
    make: Make

    #: The publications that have a record when the request comes.
    records: tuple[Publication, ...] = ()

    def prepare(self) -> None: ...

    def act(self, export: TgtExport) -> None: ...

    def wanted(self) -> list[Publication]:
        """The records once the request has returned, and before."""
        return list(self.records)

    def clean(self) -> None:
        build_export(self.daemon).reconcile(list, soon())
        for publication in self.records:
            publication.device.unlink()
        assert_exactly(self.daemon, [])


class Ensure(Case):
    def prepare(self) -> None:
        self.records = (self.make(),)

    def act(self, export: TgtExport) -> None:
        export.ensure(self.records[0], soon())


class EnsureOverWrongTarget(Ensure):
    def prepare(self) -> None:
        super().prepare()
        [publication] = self.records
        build_export(self.daemon).ensure(publication, soon())
        TgtClient(self.daemon.socket).update_lun(publication.tid, 1, {"scsi_id": "6" + "1" * 31}, soon())


class Remove(Case):
    def prepare(self) -> None:
        self.records = (self.make(),)
        build_export(self.daemon).ensure(self.records[0], soon())
        self.daemon.login(self.records[0])

    def act(self, export: TgtExport) -> None:
        export.remove(self.records[0], soon())

    def wanted(self) -> list[Publication]:
        return []  # revoked before the export hears of it


class Grow(Case):
    def prepare(self) -> None:
        publication = self.make()
        build_export(self.daemon).ensure(publication, soon())
        self.daemon.login(publication)
        os.truncate(publication.device, 96 * MIB)
        self.records = (replace(publication, size_bytes=96 * MIB),)

    def act(self, export: TgtExport) -> None:
        export.grow(self.records[0], soon())


class Restore(Case):
    def prepare(self) -> None:
        self.records = (self.make(node=OTHER_NODE), self.make(readonly=True))

    def act(self, export: TgtExport) -> None:
        export.reconcile(lambda: list(self.records), soon())


class RemoveStray(Case):
    def prepare(self) -> None:
        stray, kept = self.make(), self.make()
        for publication in (stray, kept):
            build_export(self.daemon).ensure(publication, soon())
        self.daemon.login(stray)
        self.records = (kept,)

    def act(self, export: TgtExport) -> None:
        export.reconcile(lambda: list(self.records), soon())


CASES = [Ensure, EnsureOverWrongTarget, Remove, Grow, Restore, RemoveStray]


def assert_exactly(daemon: Daemon, wanted: list[Publication]) -> None:
    """tgtd holds these publications and nothing else, and lets in whom it should."""
    client = TgtClient(daemon.socket)
    assert parse_system_state(client.show_system(soon())) == "ready"
    assert parse_names(client.show_names(soon())) == {p.tid: p.target for p in wanted}
    accounts = {user for p in wanted for user in (p.chap.user, p.chap.mutual_user)}
    assert set(parse_accounts(client.show_accounts(soon()))) == accounts
    for publication in wanted:
        session = daemon.login(publication)
        assert session.naa() == scsi_id_of(publication.volume_id)
        assert session.size_bytes() == publication.size_bytes
        assert session.write_protected() == publication.readonly
        for changes in ({"initiator": "iqn.2001-04.com.example:x"}, {"secret": "another-secret-1"}):
            with pytest.raises(LoginFailed):
                daemon.login(publication, **changes)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("then", ["again", "reconcile"])
def test_killed_at_every_step(daemon: Daemon, make: Make, kind: type[Case], then: str) -> None:
    point = 0
    while True:
        point += 1
        case = kind(daemon, make)
        case.prepare()
        crash = CrashAt(point)
        with suppress(Crash):
            case.act(build_export(daemon, boundary=crash))
        export = build_export(daemon)
        if then == "reconcile":
            export.reconcile(case.wanted, soon())
        if then == "again":
            case.act(export)
        if kind in (Ensure, EnsureOverWrongTarget) and then == "again":
            export.reconcile(case.wanted, soon())  # nothing to do, but for accounts of an unlucky first try
        assert_exactly(daemon, case.wanted())
        case.clean()
        if len(crash.names) < point:
            break
    assert point > 6, "the boundary was not called"


class RestartAt:
    """A boundary that restarts tgtd, with nothing, at the `step`-th call."""

    def __init__(self, daemon: FakeDaemon, step: int) -> None:
        self._daemon = daemon
        self._step = step
        self.count = 0

    def __call__(self, name: str) -> None:
        self.count += 1
        if self.count == self._step:
            self._daemon.fake.restart()


@pytest.mark.parametrize("kind", CASES)
def test_a_restart_of_tgtd_at_any_step_is_no_defect(fake_daemon: FakeDaemon, make: Make, kind: type[Case]) -> None:
    for point in itertools.count(1):
        case = kind(fake_daemon, make)
        case.prepare()
        restart = RestartAt(fake_daemon, point)
        try:
            case.act(build_export(fake_daemon, boundary=restart))
        except DriverError as error:
            assert isinstance(error, Unavailable), f"step {point}: {error!r}"
        case.act(build_export(fake_daemon))
        build_export(fake_daemon).reconcile(case.wanted, soon())
        assert_exactly(fake_daemon, case.wanted())
        case.clean()
        if restart.count < point:
            break


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(
    ("how", "after"),
    [("refuse", False), ("cut", False), ("cut", True), ("half", True), ("die", False), ("die", True)],
)
def test_each_request_fails_once(fake_daemon: FakeDaemon, make: Make, kind: type[Case], how: str, after: bool) -> None:
    point = 0
    fired = True
    while fired:
        point += 1
        case = kind(fake_daemon, make)
        case.prepare()
        before = fake_daemon.fake.count()
        fake_daemon.fake.fail("*", nth=point, after=after, how=how)
        export = build_export(fake_daemon)
        with suppress(DriverError):
            case.act(export)
        fired = fake_daemon.fake.count() - before >= point
        fake_daemon.fake.forgive()
        case.act(export)
        export.reconcile(case.wanted, soon())
        assert_exactly(fake_daemon, case.wanted())
        case.clean()
    assert point > 6


@pytest.mark.parametrize("kind", CASES)
def test_the_count_of_requests_is_known(fake_daemon: FakeDaemon, make: Make, kind: type[Case]) -> None:
    """Each request holds up the I/O of all volumes for a moment: a new one is a decision."""
    case = kind(fake_daemon, make)
    case.prepare()
    before = fake_daemon.fake.count()
    case.act(build_export(fake_daemon))
    most: dict[type[Case], int] = {
        Ensure: 18,
        EnsureOverWrongTarget: 30,
        Remove: 17,
        Grow: 12,
        Restore: 45,
        RemoveStray: 21,
    }
    assert fake_daemon.fake.count() - before <= most[kind]
