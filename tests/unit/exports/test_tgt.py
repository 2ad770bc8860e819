"""The export in detail, on the fake tgtd."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import structlog

from csi.errors import CommandFailed, DriverError, Invalid, NoSpace, Timeout, Unavailable
from csi.exports.base import Export
from csi.exports.none import NoExport
from csi.exports.tgt import TgtExport
from csi.model import MIB, IscsiPath, NodeId, Publication
from csi.run import SubprocessRunner
from tests.fakes.runner import FakeRunner
from tests.unit.exports.conftest import NODE, OTHER_NODE, Make, build_export, soon, tgtd_version
from tests.unit.exports.daemons import FakeDaemon, LoginFailed


@pytest.fixture
def export(fake_daemon: FakeDaemon) -> TgtExport:
    return build_export(fake_daemon)


def wanted(*publications: Publication) -> Callable[[], list[Publication]]:
    return lambda: list(publications)


def test_both_are_exports(export: TgtExport) -> None:
    exports: list[Export] = [export, NoExport()]
    assert [each.protocol for each in exports] == ["iscsi", "loop"]


def test_no_export(make: Make) -> None:
    export, publication = NoExport(), make()
    assert export.ensure(publication, soon()) == ()
    export.grow(publication, soon())
    export.remove(publication, soon())
    export.reconcile(list, soon())
    assert export.problems(soon()) == []


def test_paths_through_every_portal(fake_daemon: FakeDaemon, make: Make) -> None:
    portals = ["192.0.2.1:3260", "[2001:db8::1]:3261", "192.0.2.2:3260"]
    publication = make()
    paths = build_export(fake_daemon, portals=portals).ensure(publication, soon())
    assert paths == tuple(IscsiPath(target=publication.target, portal=portal, lun=1) for portal in portals)


@pytest.mark.parametrize(
    "portal", ["", "192.0.2.1", "192.0.2.1:", ":3260", "192.0.2.1:0", "192.0.2.1:65536", "a b:1", "::1:3260"]
)
def test_bad_portals(fake_daemon: FakeDaemon, portal: str) -> None:
    with pytest.raises(Invalid, match="is not ADDRESS:PORT"):
        build_export(fake_daemon, portals=[portal])


# -- ensure ------------------------------------------------------------------------------------------------------------


def test_rule_comes_last_and_account_before_it(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    export.ensure(make(), soon())
    changes = [name for name in fake_daemon.fake.calls if not name.endswith("-show")]
    assert changes == [
        "target-new",
        *["account-new"] * 2,
        *["account-bind"] * 2,
        "device-new",
        "device-update",
        *["target-update"] * 4,
        "target-bind",
    ]
    assert fake_daemon.fake.calls[-2:] == ["target-bind", "target-show"]
    assert fake_daemon.fake.calls[-3] == "target-show"  # read back before anybody may come in


def test_a_node_may_demand_checksums(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publication = make()
    export.ensure(publication, soon())
    target = fake_daemon.fake.by_name(publication.target)
    assert target is not None
    assert target.login_keys == {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}


def test_a_step_without_effect_is_found_before_the_rule(
    fake_daemon: FakeDaemon, export: TgtExport, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_daemon.fake, "_update_lun", lambda request: "")
    publication = make()
    with pytest.raises(CommandFailed, match="accepted every step but shows SCSI id"):
        export.ensure(publication, soon())
    target = fake_daemon.fake.by_name(publication.target)
    assert target is not None and target.names == []


def test_adopting_asks_once(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publication = make()
    export.ensure(publication, soon())
    before = fake_daemon.fake.count()
    export.ensure(publication, soon())
    assert fake_daemon.fake.calls[before:] == ["target-show"]


def test_publish_starts_no_process(fake_daemon: FakeDaemon, make: Make) -> None:
    runner = tgtd_version()
    export, publication = build_export(fake_daemon, runner=runner), make()
    export.ensure(publication, soon())
    export.grow(publication, soon())
    export.reconcile(wanted(publication), soon())
    export.remove(publication, soon())
    assert runner.calls == []


def test_limit_of_exports(fake_daemon: FakeDaemon, make: Make) -> None:
    export = build_export(fake_daemon, max_exports=2)
    first, second, third = make(), make(), make()
    export.ensure(first, soon())
    export.ensure(second, soon())
    with pytest.raises(NoSpace, match=r"2 targets already, controller\.max_exports is 2"):
        export.ensure(third, soon())
    export.ensure(second, soon())  # what is there stays
    fake_daemon.fake.by_name(first.target).luns[1].scsi_id = "wrong"  # type: ignore[union-attr]
    export.ensure(first, soon())  # made anew in its own place
    export.remove(first, soon())
    export.ensure(third, soon())


def test_device_missing_short_or_no_device(export: TgtExport, fake_daemon: FakeDaemon, make: Make) -> None:
    missing, short, folder = make(), make(), make()
    missing.device.unlink()
    short = replace(short, size_bytes=short.size_bytes + 1)
    folder.device.unlink()
    folder.device.mkdir()
    for publication, message in (
        (missing, "can't be opened"),
        (short, "has 67108864 bytes, its record says 67108865"),
        (folder, "its record says"),
    ):
        with pytest.raises(Unavailable, match=f"volume {publication.volume_id}: .*{message}"):
            export.ensure(publication, soon())
    assert fake_daemon.fake.targets == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"tid": 0},
        {"tid": 1 << 31},
        {"nonce": "a,b"},
        {"nonce": "x" * 250},
        {"volume_id": "v-,thin_provisioning=1"},
    ],
)
def test_bad_publications(export: TgtExport, fake_daemon: FakeDaemon, make: Make, fields: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        export.ensure(make(**fields), soon())
    assert fake_daemon.fake.targets == {}


def test_bad_device_path(export: TgtExport, fake_daemon: FakeDaemon, make: Make) -> None:
    publication = make()
    device = publication.device.with_name("a,bstype=aio")
    shutil.copy(publication.device, device)
    with pytest.raises(Invalid, match="device path"):
        export.ensure(replace(publication, device=device), soon())
    assert fake_daemon.fake.count() == 0


@pytest.mark.parametrize("field", ["user", "secret", "mutual_user", "mutual_secret"])
def test_bad_chap(export: TgtExport, fake_daemon: FakeDaemon, make: Make, field: str) -> None:
    publication = make()
    bad = replace(publication, chap=replace(publication.chap, **{field: "sentinel,word"}))
    with pytest.raises(Invalid) as caught:
        export.ensure(bad, soon())
    assert "secret" not in field or "sentinel" not in str(caught.value)
    assert fake_daemon.fake.count() == 0


def test_node_without_an_initiator_name(export: TgtExport, make: Make) -> None:
    with pytest.raises(Invalid, match="node node-a: has no iSCSI initiator name"):
        export.ensure(make(node=NodeId(name="node-a")), soon())


def test_no_tgtd(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    fake_daemon.stop()
    publication = make()
    for call in (export.ensure, export.remove, export.grow):
        with pytest.raises(Unavailable, match=r"tgtd does not answer on .* -> start it"):
            call(publication, soon())
    with pytest.raises(Unavailable, match="tgtd does not answer"):
        export.reconcile(list, soon())


def test_secrets_stay_out_of_logs_and_errors(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publication = make()
    texts = [repr(publication)]
    with structlog.testing.capture_logs() as events:
        for how in ("refuse", "cut", "half"):
            for nth in range(1, 16):
                fake_daemon.fake.fail("*", nth=nth, how=how)
                try:
                    export.ensure(publication, soon())
                except DriverError as error:
                    texts.append(f"{error!r} {error.__cause__!r} {error.__context__!r}")
        export.remove(publication, soon())
    text = " ".join(texts) + repr(events)
    assert publication.chap.secret not in text
    assert publication.chap.mutual_secret not in text


# -- remove ------------------------------------------------------------------------------------------------------------


def test_remove_waits_for_commands_in_flight(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publication = make()
    export.ensure(publication, soon())
    fake_daemon.fake.add_session(publication.target, NODE.initiator, in_flight=True)
    with pytest.raises(Timeout, match=f"target {publication.target}: not removed in time: commands"):
        export.remove(publication, soon(1.0))
    target = fake_daemon.fake.by_name(publication.target)
    assert target is not None and target.names == []  # shut already
    assert not target.sessions[0].connected
    with pytest.raises(LoginFailed):
        fake_daemon.login(publication)
    timer = threading.Timer(0.1, fake_daemon.fake.drain, [publication.target])
    timer.start()
    export.remove(publication, soon())
    timer.join()
    assert fake_daemon.fake.targets == {}
    assert fake_daemon.fake.accounts == {}


@pytest.mark.parametrize("after", ["device-delete", "target-delete"])
def test_remove_closes_a_session_that_comes_late(
    fake_daemon: FakeDaemon, export: TgtExport, make: Make, after: str
) -> None:
    """tgtd refuses the step because of it, and the fence begins anew."""
    publication, fake = make(), fake_daemon.fake
    export.ensure(publication, soon())
    original = fake._due
    late: list[str] = []

    def due(name: str) -> object:
        if name == after and not late:
            late.append(name)
            fake.add_session(publication.target, NODE.initiator, in_flight=after == "device-delete").connected = True
            threading.Timer(0.05, fake.drain, [publication.target]).start()
        return original(name)

    fake._due = due  # type: ignore[assignment]
    export.remove(publication, soon())
    assert late == [after]
    assert fake.targets == {}


def test_remove_takes_away_every_rule_and_lun(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publication = make()
    export.ensure(publication, soon())
    target = fake_daemon.fake.by_name(publication.target)
    assert target is not None
    target.addresses += ["ALL", "192.0.2.0/24", "[2001:db8::1]"]
    target.names.append(OTHER_NODE.initiator)
    export.remove(publication, soon())
    assert fake_daemon.fake.targets == {}


def test_remove_of_one_does_not_hold_up_the_others(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    stuck, other = make(), make()
    export.ensure(stuck, soon())
    fake_daemon.fake.add_session(stuck.target, NODE.initiator, in_flight=True)
    removing = threading.Thread(target=export.remove, args=(stuck, soon()))
    removing.start()
    try:
        while fake_daemon.fake.by_name(stuck.target).names:  # type: ignore[union-attr]
            assert removing.is_alive()
            time.sleep(0.005)
        export.ensure(other, soon(2))
        # Even with a record that still says so, what is being removed is not restored.
        export.reconcile(wanted(stuck, other), soon(2))
        assert fake_daemon.fake.by_name(stuck.target).names == []  # type: ignore[union-attr]
        export.remove(other, soon(2))
    finally:
        fake_daemon.fake.drain(stuck.target)
        removing.join()
    assert fake_daemon.fake.targets == {}


def test_account_that_another_target_uses_is_not_deleted(
    fake_daemon: FakeDaemon, export: TgtExport, make: Make
) -> None:
    first, second = make(), make(node=OTHER_NODE)
    for publication in (first, second):
        export.ensure(publication, soon())
    export.remove(replace(first, chap=second.chap), soon())
    assert second.chap.user in fake_daemon.fake.accounts
    assert fake_daemon.login(second).alive()


# -- grow --------------------------------------------------------------------------------------------------------------


def test_grow_waits_for_commands_in_flight(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publication = make()
    export.ensure(publication, soon())
    fake_daemon.fake.add_session(publication.target, NODE.initiator, in_flight=True)
    with publication.device.open("r+b") as file:
        file.truncate(128 * MIB)
    grown = replace(publication, size_bytes=128 * MIB)
    with pytest.raises(Timeout):
        export.grow(grown, soon(1.0))
    target = fake_daemon.fake.by_name(publication.target)
    assert target is not None and target.state == "ready"  # the node goes on with the old size
    assert target.luns[1].size_bytes == 64 * MIB
    fake_daemon.fake.drain(publication.target)
    export.grow(grown, soon())
    assert target.luns[1].size_bytes == 128 * MIB


def test_a_device_that_can_not_be_opened_again_keeps_the_target_offline(
    fake_daemon: FakeDaemon, export: TgtExport, make: Make
) -> None:
    publication = make()
    export.ensure(publication, soon())
    with publication.device.open("r+b") as file:
        file.truncate(128 * MIB)
    grown = replace(publication, size_bytes=128 * MIB)
    fake_daemon.fake.fail("device-update", after=True, how="refuse", code=17)
    fake_daemon.fake.by_name(publication.target).luns[1].path = ""  # type: ignore[union-attr]
    with pytest.raises(CommandFailed):
        export.grow(grown, soon())
    target = fake_daemon.fake.by_name(publication.target)
    assert target is not None and target.state == "offline"
    export.reconcile(wanted(grown), soon())
    assert (target.state, target.luns[1].size_bytes) == ("ready", 128 * MIB)


def test_grow_of_what_is_absent_makes_it(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publication = make()
    export.grow(publication, soon())
    assert fake_daemon.login(publication).alive()


def test_device_larger_than_the_record_is_adopted(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    """The volume grew, the record did not yet."""
    publication = make()
    with publication.device.open("r+b") as file:
        file.truncate(128 * MIB)
    export.ensure(publication, soon())
    session = fake_daemon.login(publication)
    export.ensure(publication, soon())
    export.reconcile(wanted(publication), soon())
    assert session.alive()


# -- reconcile ---------------------------------------------------------------------------------------------------------


def test_idle_reconcile_is_one_request(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publications = [make() for _ in range(3)]
    for publication in publications:
        export.ensure(publication, soon())
    export.reconcile(wanted(*publications), soon())
    before = fake_daemon.fake.count()
    export.reconcile(wanted(*publications), soon())
    assert fake_daemon.fake.calls[before:] == ["target-show"]


def test_restore_shuts_the_door_until_all_is_there(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publications = [make() for _ in range(3)]
    states: list[str] = []
    original = fake_daemon.fake._due

    def due(name: str) -> object:
        if name in ("target-new", "target-bind"):
            states.append(fake_daemon.fake.state)
        return original(name)

    fake_daemon.fake._due = due  # type: ignore[assignment]
    export.reconcile(wanted(*publications), soon())
    assert states == ["offline"] * 6
    assert fake_daemon.fake.state == "ready"


def test_a_publish_under_way_does_not_shut_the_door(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    publications = [make() for _ in range(3)]
    for publication in publications[:2]:
        export.ensure(publication, soon())
    export.reconcile(wanted(*publications), soon())
    assert fake_daemon.fake.count("system-update") == 0
    assert fake_daemon.login(publications[2]).alive()


def test_many_publishes_under_way_are_not_taken_for_a_restart(
    fake_daemon: FakeDaemon, export: TgtExport, make: Make
) -> None:
    publications = [make() for _ in range(6)]
    export.ensure(publications[0], soon())
    export.reconcile(wanted(publications[0]), soon())
    export.reconcile(wanted(*publications), soon())
    assert fake_daemon.fake.count("system-update") == 0
    # With all of them lost it is one.
    fake_daemon.fake.targets.clear()
    export.reconcile(wanted(*publications), soon())
    assert fake_daemon.fake.count("system-update") == 2
    assert all(fake_daemon.login(publication).alive() for publication in publications)


def test_one_that_can_not_be_restored_does_not_cost_the_others(
    fake_daemon: FakeDaemon, export: TgtExport, make: Make
) -> None:
    publications = [make() for _ in range(4)]
    publications[1].device.unlink()
    publications[2] = replace(publications[2], nonce="A,b")
    with pytest.raises(Unavailable, match=r"2 target\(s\) are not as they should be: .*is not there.*target name"):
        export.reconcile(wanted(*publications), soon())
    assert fake_daemon.fake.state == "ready"
    assert fake_daemon.login(publications[0]).alive()
    assert fake_daemon.login(publications[3]).alive()


def test_records_are_read_under_the_lock(fake_daemon: FakeDaemon, export: TgtExport, make: Make) -> None:
    """So a target that is made meanwhile is never taken for a stray."""
    publication, reading, written = make(), threading.Event(), threading.Event()
    publishing = threading.Thread(target=export.ensure, args=(publication, soon()))

    def read() -> list[Publication]:
        publishing.start()
        reading.set()
        written.wait(0.1)
        return []  # read before the record was there

    export.reconcile(read, soon())
    publishing.join()
    assert reading.is_set()
    assert fake_daemon.login(publication).alive()


def test_system_left_offline_by_a_crash(fake_daemon: FakeDaemon, make: Make) -> None:
    publication = make()
    build_export(fake_daemon).ensure(publication, soon())
    fake_daemon.fake.state = "offline"
    build_export(fake_daemon).reconcile(wanted(publication), soon())
    assert fake_daemon.login(publication).alive()


def test_unused_accounts_of_ours_are_swept(fake_daemon: FakeDaemon, make: Make) -> None:
    publication = make()
    build_export(fake_daemon).ensure(publication, soon())
    fake_daemon.fake.accounts |= {"n00000000000000ff": "x", "t00000000000000ff": "x", "backup": "x"}
    build_export(fake_daemon).reconcile(wanted(publication), soon())
    assert set(fake_daemon.fake.accounts) == {publication.chap.user, publication.chap.mutual_user, "backup"}


def test_stray_with_commands_in_flight_is_told_and_removed_later(
    fake_daemon: FakeDaemon, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.exports.tgt._STUCK_SECONDS", 1.0)
    stray, kept = make(), make()
    export = build_export(fake_daemon)
    for publication in (stray, kept):
        export.ensure(publication, soon())
    fake_daemon.fake.add_session(stray.target, NODE.initiator, in_flight=True)
    with pytest.raises(Unavailable, match="not removed in time: commands"):
        export.reconcile(wanted(kept), soon())
    fake_daemon.fake.drain(stray.target)
    export.reconcile(wanted(kept), soon())
    assert [target.name for target in fake_daemon.fake.targets.values()] == [kept.target]


# -- problems ----------------------------------------------------------------------------------------------------------


def test_no_problems(export: TgtExport) -> None:
    assert export.problems(soon()) == []


def test_version_is_asked_once(fake_daemon: FakeDaemon) -> None:
    runner = tgtd_version()
    export = build_export(fake_daemon, runner=runner)
    for _ in range(3):
        assert export.problems(soon()) == []
    assert runner.calls == [("tgtd", "--version")]


@pytest.mark.parametrize("version", ["1.0.80", "1.0.82", "0.9.99"])
def test_old_tgtd(fake_daemon: FakeDaemon, version: str) -> None:
    [problem] = build_export(fake_daemon, runner=tgtd_version(f"{version}\n")).problems(soon())
    assert problem.startswith(f"tgtd {version} does not keep initiators apart") and "1.0.83 or newer" in problem


@pytest.mark.parametrize("version", ["1.0.83", "1.0.97", "1.1.0", "2.0.0"])
def test_new_tgtd(fake_daemon: FakeDaemon, version: str) -> None:
    assert build_export(fake_daemon, runner=tgtd_version(f"{version}\n")).problems(soon()) == []


def test_other_problems(fake_daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_daemon.fake.state = "offline"
    export = build_export(fake_daemon, portals=[], runner=FakeRunner({"tgtd": lambda *_: (0, "hello", "")}))
    problems = export.problems(soon())
    assert all(repair for _, _, repair in (problem.partition(" -> ") for problem in problems))
    assert [problem.split(" -> ")[0] for problem in problems] == [
        "tgtd is offline and takes no logins",
        "controller.portals is empty",
        "tgtd --version says 'hello', not a tgtd",
    ]
    fake_daemon.stop()
    [problem] = export.problems(soon())
    assert "tgtd does not answer on" in problem
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert export.problems(soon()) == ["tgtd obeys root alone -> run the driver as root"]


def test_no_problems_of_the_real_tgtd(real_daemon: FakeDaemon) -> None:
    assert build_export(real_daemon, runner=SubprocessRunner()).problems(soon()) == []
