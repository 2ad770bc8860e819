"""With the machine's own iscsiadm: its node database works without iscsid and without the kernel's iSCSI."""

import subprocess
from pathlib import Path

import pytest

from csi.connectors.iscsiadm import Iscsiadm
from csi.connectors.node_records import NodeRecords, node_settings, with_settings
from csi.connectors.portal import Portal
from csi.deadline import Deadline
from csi.errors import Unavailable
from csi.run import SubprocessRunner
from tests.fakes.iscsi import CHAP

TARGET = "iqn.2026-11.io.snode:v-" + "r" * 26 + ":0123456789abcdef"

pytestmark = pytest.mark.root


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    """iscsiadm with a node database of its own, in a mount namespace of its own."""
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "iscsid.conf").write_text("node.startup = automatic\nnode.session.scan = auto\n")
    script = f'mount --bind "{folder}" /etc/iscsi && mount -t tmpfs none /run/lock && shift && exec iscsiadm "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh", "iscsiadm")


@pytest.fixture
def records(tmp_path: Path, program: tuple[str, ...]) -> NodeRecords:
    iscsiadm = Iscsiadm(SubprocessRunner(), program=program, limit_seconds=30)
    settings = node_settings(replacement_seconds=77, login_seconds=9, digests=True)
    return NodeRecords(iscsiadm, settings=settings, folders=[tmp_path / "none", tmp_path / "etc"])


def show(program: tuple[str, ...], portal: Portal) -> dict[str, str]:
    argv = [*program, "--mode=node", f"--targetname={TARGET}", f"--portal={portal.argument}", "--op=show", "--show"]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return dict(line.partition(" = ")[::2] for line in text.splitlines())


@pytest.mark.parametrize("portal", [Portal("10.1.2.3", 3260), Portal("fd00::1", 3261)], ids=str)
def test_iscsiadm_reads_what_was_written(
    records: NodeRecords, program: tuple[str, ...], tmp_path: Path, deadline: Deadline, portal: Portal
) -> None:
    records.write(TARGET, portal, chap=CHAP, login_tries=2, deadline=deadline)
    shown = show(program, portal)
    wanted = {
        "node.name": TARGET,
        "node.conn[0].address": portal.address,
        "node.conn[0].port": str(portal.port),
        "node.startup": "manual",
        "node.session.scan": "manual",
        "node.session.nr_sessions": "1",
        "node.session.timeo.replacement_timeout": "77",
        "node.session.initial_login_retry_max": "2",
        "node.conn[0].timeo.login_timeout": "9",
        "node.conn[0].iscsi.HeaderDigest": "CRC32C",
        "node.conn[0].iscsi.DataDigest": "CRC32C",
        "node.session.auth.authmethod": "CHAP",
        "node.session.auth.username": CHAP.user,
        "node.session.auth.password": CHAP.secret,
        "node.session.auth.username_in": CHAP.mutual_user,
        "node.session.auth.password_in": CHAP.mutual_secret,
    }
    assert {key: shown.get(key) for key in wanted} == wanted
    (record,) = (tmp_path / "etc").glob("nodes/*/*/default")
    assert record.stat().st_mode & 0o777 == 0o600
    assert records.targets() == [TARGET]
    records.remove(TARGET)
    assert records.targets() == []
    assert not [path for path in (tmp_path / "etc").rglob("*") if "snode" in path.name]


def test_without_chap(records: NodeRecords, program: tuple[str, ...], deadline: Deadline) -> None:
    portal = Portal("10.1.2.3", 3260)
    records.write(TARGET, portal, chap=CHAP, deadline=deadline)
    records.write(TARGET, portal, chap=None, deadline=deadline)
    shown = show(program, portal)
    assert shown["node.session.auth.authmethod"] == "None"
    assert "SENTINEL" not in str(shown)


@pytest.mark.parametrize("damage", ["empty", "newline", "cut", "old form", "folder gone"])
def test_damaged_records_are_replaced(
    records: NodeRecords, program: tuple[str, ...], tmp_path: Path, deadline: Deadline, damage: str
) -> None:
    portal = Portal("10.1.2.3", 3260)
    records.write(TARGET, portal, chap=CHAP, deadline=deadline)
    (record,) = (tmp_path / "etc").glob("nodes/*/*/default")
    if damage == "old form":
        (record.parents[1] / "10.1.2.3,3260").touch()
    elif damage == "folder gone":
        record.unlink()
        record.parent.rmdir()
    else:
        record.write_text({"empty": "", "newline": "\n", "cut": record.read_text()[:100]}[damage])
    records.write(TARGET, portal, chap=CHAP, deadline=deadline)
    assert show(program, portal)["node.session.auth.username"] == CHAP.user


def test_foreign_targets_are_not_ours(records: NodeRecords, tmp_path: Path) -> None:
    (tmp_path / "etc" / "nodes" / "iqn.2001-04.com.example:disk").mkdir(parents=True)
    (tmp_path / "etc" / "nodes" / (TARGET + ":x")).mkdir()
    assert records.targets() == []
    for name in ("iqn.2001-04.com.example:disk", "../x", "", TARGET + "/.."):
        with pytest.raises(ValueError, match="not a target"):
            records.remove(name)


def test_database_elsewhere_is_told(program: tuple[str, ...], tmp_path: Path, deadline: Deadline) -> None:
    iscsiadm = Iscsiadm(SubprocessRunner(), program=program, limit_seconds=30)
    records = NodeRecords(iscsiadm, settings={}, folders=[tmp_path / "none"])
    with pytest.raises(Unavailable, match="wrote none below"):
        records.write(TARGET, Portal("10.1.2.3", 3260), chap=None, deadline=deadline)


def test_record_without_an_end() -> None:
    with pytest.raises(Unavailable, match="without an end"):
        with_settings("# BEGIN RECORD 2.1.8\nnode.name = x\n", {})
