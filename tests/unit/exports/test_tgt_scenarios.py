"""What a node can and can't do, on the fake tgtd and on the real one."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from csi.errors import Timeout, Unavailable
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_show import parse_accounts, parse_names, parse_system_state, parse_targets
from csi.model import MIB, IscsiPath, Publication, scsi_id_of
from tests.unit.exports.conftest import NODE, OTHER_NODE, Make, build_export, soon
from tests.unit.exports.daemons import CommandError, ConnectionGone, Daemon, FakeDaemon, LoginFailed, RealDaemon


def wanted(*publications: Publication) -> Callable[[], list[Publication]]:
    return lambda: list(publications)


def nothing_left(daemon: Daemon) -> bool:
    client = TgtClient(daemon.socket)
    return (
        parse_names(client.show_names(soon())) == {}
        and parse_accounts(client.show_accounts(soon())) == ()
        and parse_system_state(client.show_system(soon())) == "ready"
    )


def resize(path: Path, size_bytes: int) -> None:
    os.truncate(path, size_bytes)


def test_published_node_gets_in_and_sees_the_volume(daemon: Daemon, make: Make) -> None:
    publication = make()
    paths = build_export(daemon).ensure(publication, soon())
    assert paths == (IscsiPath(target=publication.target, portal=daemon.portal, lun=1),)
    session = daemon.login(publication)
    assert session.alive()
    assert session.size_bytes() == publication.size_bytes
    assert session.naa() == scsi_id_of(publication.volume_id)
    assert session.serial() == publication.volume_id
    assert session.vendor() == "SNODE"
    assert not session.write_protected()


@pytest.mark.parametrize(
    "changes",
    [
        {"initiator": OTHER_NODE.initiator},
        {"initiator": NODE.initiator + "0"},
        {"secret": "another-secret-1"},
        {"user": "nffffffffffffffff"},
        {"user": "", "secret": "", "mutual_user": "", "mutual_secret": ""},
    ],
    ids=["other-node", "longer-name", "wrong-secret", "wrong-user", "no-chap"],
)
def test_nobody_else_gets_in(daemon: Daemon, make: Make, changes: dict[str, str]) -> None:
    publication = make()
    build_export(daemon).ensure(publication, soon())
    with pytest.raises(LoginFailed):
        daemon.login(publication, **changes)
    assert daemon.login(publication).alive()


def test_credentials_of_one_publication_do_not_open_another(daemon: Daemon, make: Make) -> None:
    export, first, second = build_export(daemon), make(), make()
    for publication in (first, second):
        export.ensure(publication, soon())
    with pytest.raises(LoginFailed):
        daemon.login(second, user=first.chap.user, secret=first.chap.secret)


def test_readonly_publication(daemon: Daemon, make: Make) -> None:
    publication = make(readonly=True)
    build_export(daemon).ensure(publication, soon())
    assert daemon.login(publication).write_protected()


def test_ensure_twice_keeps_the_session(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make()
    first = export.ensure(publication, soon())
    session = daemon.login(publication)
    assert export.ensure(publication, soon()) == first
    assert session.alive()


def test_remove_fences_a_live_session(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make()
    export.ensure(publication, soon())
    session = daemon.login(publication)
    export.remove(publication, soon())
    assert not session.alive()
    assert nothing_left(daemon)
    with pytest.raises(LoginFailed):
        daemon.login(publication)
    export.remove(publication, soon())  # absent is fine


def test_remove_leaves_other_targets_alone(daemon: Daemon, make: Make) -> None:
    export, first, second = build_export(daemon), make(), make(node=OTHER_NODE)
    for publication in (first, second):
        export.ensure(publication, soon())
    session = daemon.login(second)
    export.remove(first, soon())
    assert session.alive()
    assert daemon.login(second).alive()


def test_two_nodes_share_one_volume(daemon: Daemon, make: Make) -> None:
    export, first = build_export(daemon), make(readonly=True)
    second = replace(make(node=OTHER_NODE, readonly=True), volume_id=first.volume_id, device=first.device)
    sessions = []
    for publication in (first, second):
        export.ensure(publication, soon())
        sessions.append(daemon.login(publication))
    assert sessions[0].naa() == sessions[1].naa()
    export.remove(first, soon())
    assert [session.alive() for session in sessions] == [False, True]


def test_grow(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make()
    export.ensure(publication, soon())
    old = daemon.login(publication)
    resize(publication.device, 128 * MIB)
    grown = replace(publication, size_bytes=128 * MIB)
    export.grow(grown, soon())
    assert not old.alive()  # a kernel logs in again by itself
    session = daemon.login(grown)
    assert session.size_bytes() == 128 * MIB
    assert session.naa() == scsi_id_of(publication.volume_id)
    export.grow(grown, soon())  # nothing to do: the session stays
    export.reconcile(wanted(grown), soon())
    assert session.alive()


def test_grow_by_the_smallest_step_is_seen(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make()
    export.ensure(publication, soon())
    resize(publication.device, 65 * MIB)
    export.grow(replace(publication, size_bytes=65 * MIB), soon())
    assert daemon.login(publication).size_bytes() == 65 * MIB


def test_grow_of_a_readonly_publication_stays_readonly(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make(readonly=True)
    export.ensure(publication, soon())
    resize(publication.device, 128 * MIB)
    export.grow(replace(publication, size_bytes=128 * MIB), soon())
    session = daemon.login(publication)
    assert (session.size_bytes(), session.write_protected()) == (128 * MIB, True)


def test_restart_of_tgtd_is_made_good_by_reconcile(daemon: Daemon, make: Make) -> None:
    export, publications = build_export(daemon), [make() for _ in range(5)]
    for publication in publications:
        export.ensure(publication, soon())
    sessions = [daemon.login(publication) for publication in publications]
    daemon.restart()
    assert not any(session.alive() for session in sessions)
    export.reconcile(wanted(*publications), soon())
    assert all(daemon.login(publication).alive() for publication in publications)
    assert parse_system_state(TgtClient(daemon.socket).show_system(soon())) == "ready"


def test_a_restart_of_tgtd_is_told_until_it_is_made_good(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make()
    assert not export.restarted()
    export.ensure(publication, soon())
    export.reconcile(lambda: [publication], soon())
    assert not export.restarted()
    daemon.restart()
    assert export.restarted() and export.restarted()
    export.reconcile(lambda: [publication], soon())
    assert not export.restarted()
    daemon.stop()
    assert not export.restarted(), "what is not there is not to be looked at ever more often"


def test_many_targets_are_restored_side_by_side(daemon: Daemon, make: Make) -> None:
    export, publications = build_export(daemon), [make() for _ in range(40)]
    export.reconcile(lambda: publications, soon())
    sessions = [daemon.login(publication) for publication in publications[::10]]
    assert all(session.alive() for session in sessions)
    daemon.restart()
    lost = replace(publications[7], device=publications[7].device.with_name("none"))
    wanted = [*publications[:7], lost, *publications[8:]]
    with pytest.raises(Unavailable, match="is not there"):
        export.reconcile(lambda: wanted, soon())
    for publication in (publications[0], publications[39]):
        assert daemon.login(publication).naa() == scsi_id_of(publication.volume_id)
    export.reconcile(lambda: publications, soon())
    assert daemon.login(publications[7]).alive()


def test_ensure_alone_makes_good_a_restart(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make()
    export.ensure(publication, soon())
    daemon.restart()
    export.ensure(publication, soon())
    assert daemon.login(publication).alive()


def test_reconcile_removes_strays_with_their_sessions_and_accounts(daemon: Daemon, make: Make) -> None:
    export, stray, kept = build_export(daemon), make(), make()
    for publication in (stray, kept):
        export.ensure(publication, soon())
    session, other = daemon.login(stray), daemon.login(kept)
    build_export(daemon).reconcile(wanted(kept), soon())
    assert not session.alive()
    assert other.alive()
    client = TgtClient(daemon.socket)
    assert list(parse_names(client.show_names(soon())).values()) == [kept.target]
    assert set(parse_accounts(client.show_accounts(soon()))) == {kept.chap.user, kept.chap.mutual_user}


def test_foreign_targets_are_not_touched(daemon: Daemon, make: Make) -> None:
    client, publication = TgtClient(daemon.socket), make()
    foreign = make()
    client.create_target(1, "iqn.2001-04.com.example:disk", soon())
    client.create_account("backup", "backup-secret-1", soon())
    client.bind_account(1, "backup", outgoing=False, deadline=soon())
    client.create_lun(1, 1, foreign.device, soon())
    before = client.show_targets(soon())
    export = build_export(daemon)
    export.ensure(publication, soon())
    export.reconcile(wanted(publication), soon())
    export.remove(publication, soon())
    export.reconcile(wanted(), soon())
    assert client.show_targets(soon()) == before
    assert parse_accounts(client.show_accounts(soon())) == ("backup",)


def test_reconcile_closes_sessions_of_another_initiator(daemon: Daemon, make: Make) -> None:
    export, publication = build_export(daemon), make()
    export.ensure(publication, soon())
    client = TgtClient(daemon.socket)
    client.bind_initiator(publication.tid, OTHER_NODE.initiator, soon())
    session, intruder = daemon.login(publication), daemon.login(publication, initiator=OTHER_NODE.initiator)
    client.unbind(publication.tid, OTHER_NODE.initiator, soon())
    assert intruder.alive()
    export.reconcile(wanted(publication), soon())
    assert session.alive()
    assert not intruder.alive()


def _no_lun(client: TgtClient, publication: Publication) -> None:
    client.create_target(publication.tid, publication.target, soon())


def _no_rule(client: TgtClient, publication: Publication) -> None:
    _no_lun(client, publication)
    client.create_account(publication.chap.user, "another-secret-2", soon())
    client.bind_account(publication.tid, publication.chap.user, outgoing=False, deadline=soon())
    client.create_lun(publication.tid, 1, publication.device, soon())


def _other_device(client: TgtClient, publication: Publication) -> None:
    _no_lun(client, publication)
    other = publication.device.with_name("other")
    shutil.copy(publication.device, other)
    client.create_lun(publication.tid, 1, other, soon())
    client.bind_initiator(publication.tid, publication.node.initiator, soon())


def _other_number(client: TgtClient, publication: Publication) -> None:
    client.create_target(publication.tid + 1000, publication.target, soon())


def _more_luns(client: TgtClient, publication: Publication) -> None:
    _no_rule(client, publication)
    client.create_lun(publication.tid, 2, publication.device, soon())


def _open_rule(client: TgtClient, publication: Publication) -> None:
    _no_rule(client, publication)
    client.bind_initiator(publication.tid, OTHER_NODE.initiator, soon())


def _only_accounts(client: TgtClient, publication: Publication) -> None:
    client.create_account(publication.chap.user, "another-secret-2", soon())
    client.create_account(publication.chap.mutual_user, "another-secret-3", soon())


@pytest.mark.parametrize(
    "prepare", [_no_lun, _no_rule, _other_device, _other_number, _more_luns, _open_rule, _only_accounts]
)
@pytest.mark.parametrize("act", ["ensure", "reconcile"])
def test_half_targets_are_made_anew(
    daemon: Daemon, make: Make, prepare: Callable[[TgtClient, Publication], None], act: str
) -> None:
    client, publication, export = TgtClient(daemon.socket), make(), build_export(daemon)
    prepare(client, publication)
    if act == "ensure":
        export.ensure(publication, soon())
    else:
        export.reconcile(wanted(publication), soon())
    session = daemon.login(publication)
    assert session.naa() == scsi_id_of(publication.volume_id)
    with pytest.raises(LoginFailed):
        daemon.login(publication, secret="another-secret-2")
    export.remove(publication, soon())
    assert nothing_left(daemon)


def _wrong_identity(client: TgtClient, publication: Publication) -> None:
    client.update_lun(publication.tid, 1, {"scsi_id": "6" + "0" * 31}, soon())


def _writable(client: TgtClient, publication: Publication) -> None:
    client.update_lun(publication.tid, 1, {"readonly": "0"}, soon())


def _offline(client: TgtClient, publication: Publication) -> None:
    client.set_target(publication.tid, "state", "offline", soon())


def _closed_device(client: TgtClient, publication: Publication) -> None:
    _offline(client, publication)
    with pytest.raises(Exception, match="INVALID_REQUEST"):
        client.reopen_lun(publication.tid, 1, publication.device.with_name("nothing"), soon())


def _second_rule(client: TgtClient, publication: Publication) -> None:
    client.bind_initiator(publication.tid, OTHER_NODE.initiator, soon())


def _no_rule_left(client: TgtClient, publication: Publication) -> None:
    client.unbind(publication.tid, publication.node.initiator, soon())


@pytest.mark.parametrize("spoil", [_wrong_identity, _writable, _offline, _closed_device, _second_rule, _no_rule_left])
@pytest.mark.parametrize("act", ["ensure", "reconcile", "grow"])
def test_spoiled_targets_are_mended(
    daemon: Daemon, make: Make, spoil: Callable[[TgtClient, Publication], None], act: str
) -> None:
    client, publication, export = TgtClient(daemon.socket), make(readonly=True), build_export(daemon)
    export.ensure(publication, soon())
    spoil(client, publication)
    if act == "reconcile":
        export.reconcile(wanted(publication), soon())
    else:
        getattr(export, act)(publication, soon())
    session = daemon.login(publication)
    assert session.naa() == scsi_id_of(publication.volume_id)
    assert session.size_bytes() == publication.size_bytes
    assert session.write_protected()
    with pytest.raises(LoginFailed):
        daemon.login(publication, initiator=OTHER_NODE.initiator)


def test_fifty_at_once(daemon: Daemon, make: Make) -> None:
    export, publications = build_export(daemon), [make() for _ in range(50)]
    failures: list[BaseException] = []

    def publish(publication: Publication) -> None:
        try:
            export.ensure(publication, soon())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=publish, args=(publication,)) for publication in publications]
    stop = threading.Event()
    known = list(publications)

    def reconcile() -> None:
        while not stop.is_set():
            export.reconcile(wanted(*known), soon())

    keeper = threading.Thread(target=reconcile)
    keeper.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    keeper.join()
    assert failures == []
    names = parse_names(TgtClient(daemon.socket).show_names(soon()))
    assert names == {publication.tid: publication.target for publication in publications}
    removers = [threading.Thread(target=export.remove, args=(publication, soon())) for publication in publications]
    for thread in removers:
        thread.start()
    for thread in removers:
        thread.join()
    assert nothing_left(daemon)


def test_number_taken_by_a_foreign_target(daemon: Daemon, make: Make) -> None:
    publication = make()
    TgtClient(daemon.socket).create_target(publication.tid, "iqn.2001-04.com.example:disk", soon())
    with pytest.raises(Exception, match="is taken in tgtd by another target"):
        build_export(daemon).ensure(publication, soon())


_SECTIONS = "\n    LUN information:\n    Account information:\n    ACL information:\n"
_HEAD = "    System information:\n        Driver: iscsi\n        State: ready\n    I_T nexus information:"
#: What an initiator may call itself, to be read as something else in tgtd's list.
ALIASES = {
    "stray of ours with a foreign number": f"x{_SECTIONS}Target 1: iqn.2026-11.io.snode:v-x:1\n{_HEAD}",
    "target without sections": "x\nTarget 5: iqn.2026-11.io.snode:v-x:1",
    "own sections are void": "x\nTarget x\nTarget 5: y\n",
    "another session": "x\n        I_T nexus: 999\n            Initiator: iqn.x:y alias: none",
    "rules that do not exist": "x\n    ACL information:\n        ALL\n        no rule, at all",
    "sections twice": f"x{_SECTIONS}",
    "only line breaks": "\n\n\n",
    "not a word": "\x1b[2J\t\x7f",
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_a_node_with_a_strange_alias_hurts_nobody_and_is_fenced(daemon: Daemon, make: Make, alias: str) -> None:
    client, export = TgtClient(daemon.socket), build_export(daemon)
    foreign_name = "iqn.2001-04.com.example:disk"
    client.create_target(1, foreign_name, soon())
    client.create_lun(1, 1, make().device, soon())
    strange, second, other = make(), make(), make(node=OTHER_NODE)
    for publication in (strange, second, other):
        export.ensure(publication, soon())
    session, bystander = daemon.login(strange, alias=alias), daemon.login(other)
    for _ in range(2):
        with suppress(Unavailable):  # its own target may be told to be unreadable
            export.reconcile(wanted(strange, second, other), soon())
    daemon.login(strange, alias=alias)
    late = make()
    export.ensure(late, soon())
    assert bystander.alive()
    assert daemon.login(second).alive()
    export.remove(second, soon())
    export.remove(strange, soon())
    assert not session.alive()
    export.reconcile(wanted(other, late), soon())
    assert bystander.alive()
    names = parse_names(client.show_names(soon()))
    assert names == {1: foreign_name, other.tid: other.target, late.tid: late.target}
    accounts = {user for p in (other, late) for user in (p.chap.user, p.chap.mutual_user)}
    assert set(parse_accounts(client.show_accounts(soon()))) == accounts
    assert "LUN: 1\n" in client.show_targets(soon()).split("Target ")[1]


def test_the_fake_shows_what_the_real_one_shows(fake_daemon: FakeDaemon, real_daemon: RealDaemon, make: Make) -> None:
    publications = [make(), make(readonly=True), make(node=OTHER_NODE, size_bytes=3 * MIB)]
    texts = []
    for daemon in (fake_daemon, real_daemon):
        export = build_export(daemon)
        for publication in publications:
            export.ensure(publication, soon())
        session = daemon.login(publications[0])
        client = TgtClient(daemon.socket)
        client.set_target(publications[1].tid, "state", "offline", soon())
        targets = client.show_targets(soon())
        sid = str(parse_targets(targets)[publications[0].tid, publications[0].target].nexuses[0].sid)
        connections = client.show_connections(publications[0].tid, soon())
        assert session.alive()
        texts.append(
            (
                targets.replace(f"nexus: {sid}\n", "nexus: N\n"),
                connections.replace(f"Session: {sid}\n", "Session: N\n"),
                client.show_names(soon()),
                client.show_accounts(soon()),
            )
        )
    assert texts[0] == texts[1]


# -- the real one alone ------------------------------------------------------------------------------------------------


def test_written_data_is_on_the_device_after_the_fence(real_daemon: RealDaemon, make: Make) -> None:
    export, publication = build_export(real_daemon), make()
    export.ensure(publication, soon())
    session = real_daemon.login(publication)
    assert session.write_cache()  # type: ignore[attr-defined]  # so that kernels flush
    written, stop, refused = [0], threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            block = written[0] % 1000
            try:
                session.write(block, written[0].to_bytes(8, "big") * 64)  # type: ignore[attr-defined]
            except CommandError:
                refused.set()
                return
            written[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    while written[0] < 200:
        assert writer.is_alive()
        time.sleep(0.005)
    export.remove(publication, soon())
    content = publication.device.read_bytes()
    assert refused.wait(10)
    writer.join()
    # The device holds every acknowledged block, and did not change once remove had returned.
    assert publication.device.read_bytes() == content
    last = written[0] - 1
    assert content[(last % 1000) * 512 :][:8] == last.to_bytes(8, "big")


def test_fence_against_a_node_that_keeps_coming_back(real_daemon: RealDaemon, make: Make) -> None:
    export, publication = build_export(real_daemon), make()
    export.ensure(publication, soon())
    removed, logins, late = threading.Event(), [0], list[str]()

    def come_back() -> None:
        while True:
            over = removed.is_set()
            try:
                session = real_daemon.login(publication)
            except LoginFailed:
                if over:
                    return
                continue
            logins[0] += 1
            if over:
                late.append("a login after the fence")
                return
            with suppress(CommandError):
                while True:
                    session.write(0, bytes(65536))  # type: ignore[attr-defined]

    threads = [threading.Thread(target=come_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    while logins[0] < 4:
        assert all(thread.is_alive() for thread in threads)
        time.sleep(0.005)
    export.remove(publication, soon())
    removed.set()
    for thread in threads:
        thread.join(10)
    assert late == []
    assert nothing_left(real_daemon)


def test_no_login_without_chap_while_targets_come_and_go(real_daemon: RealDaemon, make: Make) -> None:
    export, publication, stop = build_export(real_daemon), make(), threading.Event()
    let_in: list[str] = []

    def try_all_the_time() -> None:
        while not stop.is_set():
            try:
                real_daemon.login(publication, user="", secret="", mutual_user="", mutual_secret="")
                let_in.append("a login without CHAP")
            except LoginFailed:
                pass

    thread = threading.Thread(target=try_all_the_time)
    thread.start()
    for _ in range(60):
        export.ensure(publication, soon())
        export.remove(publication, soon())
    stop.set()
    thread.join()
    assert let_in == []


def test_no_acknowledged_write_is_lost_while_the_volume_grows(real_daemon: RealDaemon, make: Make) -> None:
    export, publication, stop = build_export(real_daemon), make(), threading.Event()
    export.ensure(publication, soon())
    acknowledged: list[dict[int, int]] = [{}, {}, {}]
    counts = [0, 0, 0]
    errors: list[str] = []

    def write(number: int) -> None:
        """As a kernel does: on a lost connection log in again and repeat the command."""
        session, count = real_daemon.login(publication), 0
        while not stop.is_set():
            block = number * 1000 + count % 1000
            try:
                session.write(block, count.to_bytes(8, "big") * 64)  # type: ignore[attr-defined]
            except ConnectionGone:
                session.close()
                while not stop.is_set():
                    with suppress(LoginFailed):
                        session = real_daemon.login(publication)
                        break
                continue
            except CommandError as error:
                errors.append(str(error))  # a filesystem would see it
                return
            acknowledged[number][block] = count
            count += 1
            counts[number] = count

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, 9):
        while min(counts) < step * 100:
            assert not errors
            time.sleep(0.005)
        resize(publication.device, (64 + step) * MIB)
        export.grow(replace(publication, size_bytes=(64 + step) * MIB), soon())
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    content = publication.device.read_bytes()
    for blocks in acknowledged:
        assert blocks
        for block, count in blocks.items():
            # the write that was under way at the end may have come after it
            assert int.from_bytes(content[block * 512 : block * 512 + 8], "big") in (count, count + 1000)


def _tool(*argv: str) -> subprocess.CompletedProcess[str]:
    assert shutil.which(argv[0]), f"{argv[0]} is missing: install the package libiscsi-bin"
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)


def test_with_the_tools_of_libiscsi(real_daemon: RealDaemon, make: Make) -> None:
    export, publication = build_export(real_daemon), make()
    export.ensure(publication, soon())
    chap = publication.chap
    url = f"iscsi://{chap.user}%{chap.secret}@{real_daemon.portal}/{publication.target}/1"
    ours, theirs = f"--initiator-name={NODE.initiator}", f"--initiator-name={OTHER_NODE.initiator}"
    assert "Vendor:SNODE" in _tool("iscsi-inq", ours, url).stdout
    assert f"Total size:{64 * MIB}\n" in _tool("iscsi-readcapacity16", ours, url).stdout
    assert publication.target in _tool("iscsi-ls", "-i", NODE.initiator, url.rsplit("/", 2)[0]).stdout
    assert publication.target not in _tool("iscsi-ls", "-i", OTHER_NODE.initiator, url.rsplit("/", 2)[0]).stdout
    refused = _tool("iscsi-inq", theirs, url)
    assert refused.returncode != 0 and "Target not found" in refused.stderr + refused.stdout
    refused = _tool("iscsi-inq", ours, url.replace(chap.secret, "another-secret-1"))
    assert refused.returncode != 0 and "Authentication failure" in refused.stderr + refused.stdout


def test_target_proves_itself(real_daemon: RealDaemon, make: Make) -> None:
    publication = make()
    build_export(real_daemon).ensure(publication, soon())
    with pytest.raises(LoginFailed, match="CHAP_R"):
        real_daemon.login(publication, mutual_secret="another-secret-1")


def test_logins_during_a_restore_fail_in_the_way_that_is_repeated(real_daemon: RealDaemon, make: Make) -> None:
    """Never "target not found": a node takes that as final."""
    export, publications = build_export(real_daemon), [make() for _ in range(60)]
    for publication in publications:
        export.ensure(publication, soon())
    real_daemon.restart()
    last, stop = publications[-1], threading.Event()
    seen: list[str] = []

    def knock() -> None:
        while not stop.is_set():
            try:
                real_daemon.login(last).close()
                seen.append("in")
                return
            except LoginFailed as error:
                seen.append(str(error))

    thread = threading.Thread(target=knock)
    thread.start()
    export.reconcile(wanted(*publications), soon())
    thread.join(10)
    stop.set()
    assert seen[-1] == "in"
    assert not [message for message in seen if "not found" in message]


def test_hung_tgtd_costs_no_more_than_the_deadline(real_daemon: RealDaemon, make: Make) -> None:
    export, publication = build_export(real_daemon), make()
    export.ensure(publication, soon())
    real_daemon.process.send_signal(19)  # SIGSTOP
    try:
        with pytest.raises(Timeout):
            export.ensure(publication, soon(0.3))
    finally:
        real_daemon.process.send_signal(18)  # SIGCONT
    export.ensure(publication, soon())
    assert real_daemon.login(publication).alive()
