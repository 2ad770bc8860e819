"""The texts of tgtd, kind and unkind."""

from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csi.errors import CommandFailed
from csi.exports.tgt_show import (
    Connection,
    Nexus,
    parse_accounts,
    parse_connections,
    parse_drivers,
    parse_names,
    parse_system_state,
    parse_targets,
    shown_mb,
)
from csi.model import GIB, MIB

TARGET = """\
Target 7: iqn.2026-11.io.snode:v-a:1
    System information:
        Driver: iscsi
        State: ready
        Nop interval: 5
        Nop count: 6
    I_T nexus information:
        I_T nexus: 12
            Initiator: iqn.1993-08.org.debian:01:a alias: none
            Connection: 0
                IP Address: 192.0.2.1
    LUN information:
        LUN: 0
            Type: controller
            SCSI ID: IET     00070000
            SCSI SN: beaf70
            Size: 0 MB, Block size: 1
            Online: Yes
            Removable media: No
            Prevent removal: No
            Readonly: No
            SWP: No
            Thin-provisioning: No
            Backing store type: null
            Backing store path: None
            Backing store flags: 
        LUN: 1
            Type: disk
            SCSI ID: 6aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
            SCSI SN: v-a
            Size: 105 MB, Block size: 512
            Online: Yes
            Removable media: No
            Prevent removal: No
            Readonly: Yes
            SWP: No
            Thin-provisioning: No
            Backing store type: rdwr
            Backing store path: /dev/fast/v-a
            Backing store flags: direct
    Account information:
        n1
        t1 (outgoing)
    ACL information:
        iqn.1993-08.org.debian:01:a
"""  # noqa: W291
OTHER = TARGET.replace("Target 7: iqn.2026-11.io.snode:v-a:1", "Target 9: iqn.2026-11.io.snode:v-a:12")
KEY = (7, "iqn.2026-11.io.snode:v-a:1")
ALIAS = "alias: none"


def test_targets() -> None:
    targets = parse_targets(TARGET + OTHER)
    assert list(targets) == [(7, "iqn.2026-11.io.snode:v-a:1"), (9, "iqn.2026-11.io.snode:v-a:12")]
    target = targets[KEY]
    assert target.problem == ""
    assert (target.tid, target.driver, target.state) == (7, "iscsi", "ready")
    assert target.nexuses == (Nexus(12, "iqn.1993-08.org.debian:01:a"),)
    assert (target.incoming, target.outgoing) == (("n1",), ("t1",))
    assert target.acl == ("iqn.1993-08.org.debian:01:a",)
    controller, disk = target.luns
    assert (controller.number, controller.type, controller.path) == (0, "controller", "")
    assert target.lun(1) == disk
    assert target.lun(2) is None
    assert (disk.scsi_id, disk.scsi_sn, disk.size_mb) == ("6" + "a" * 31, "v-a", 105)
    assert (disk.online, disk.readonly, disk.removable, disk.thin) == (True, True, False, False)
    assert (disk.store, disk.path, disk.flags) == ("rdwr", "/dev/fast/v-a", "direct")


def test_nothing() -> None:
    assert parse_targets("") == {}
    assert parse_connections("") == ()
    assert parse_accounts("") == ()
    assert parse_names("") == {}


def test_more_lines_of_a_newer_release_are_skipped() -> None:
    more = TARGET.replace(
        "        State: ready\n", "        State: ready\n        Mood: fine\n            very: fine\n"
    )
    more = more.replace("            SWP: No\n", "            SWP: No\n            Colour: red\n")
    more = more.replace("    ACL information:", "    Weather information:\n        sunny\n    ACL information:")
    assert parse_targets(more) == parse_targets(TARGET)


@pytest.mark.parametrize(
    "line",
    [
        "        State: ready\n",
        "        Driver: iscsi\n",
        "    I_T nexus information:\n",
        "    LUN information:\n",
        "    Account information:\n",
        "    ACL information:\n",
        "            Type: disk\n",
        "            SCSI ID: 6aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n",
        "            Size: 105 MB, Block size: 512\n",
        "            Readonly: Yes\n",
        "            Backing store type: rdwr\n",
        "            Backing store path: /dev/fast/v-a\n",
    ],
)
def test_a_line_that_decides_must_be_there(line: str) -> None:
    assert line in TARGET
    targets = parse_targets(TARGET.replace(line, "") + OTHER)
    assert targets[KEY].problem.endswith("is this version of tgtd supported?")
    assert targets[KEY].nexuses == (() if "nexus" in line else (Nexus(12, "iqn.1993-08.org.debian:01:a"),))
    assert targets[9, "iqn.2026-11.io.snode:v-a:12"] == parse_targets(OTHER)[9, "iqn.2026-11.io.snode:v-a:12"]


def test_text_that_is_something_else() -> None:
    with pytest.raises(CommandFailed, match="is this version of tgtd supported"):
        parse_targets("Ziel 7: iqn\n")


FORGERIES = [
    # the end of the own sections, and a target of somebody else
    "x\n    LUN information:\n    Account information:\n    ACL information:\n" + OTHER,
    # a second nexus, of the owner
    "x\n        I_T nexus: 99\n            Initiator: iqn.owner alias: none",
    # another initiator for the same nexus
    "x\n            Initiator: iqn.owner alias: none",
    # rules and accounts before the true ones
    "x\n    ACL information:\n        ALL",
]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_alias_with_line_breaks_does_not_hide_its_session(forgery: str) -> None:
    target = parse_targets(TARGET.replace(ALIAS, f"alias: {forgery}"))[KEY]
    assert target.nexuses[0] == Nexus(12, "iqn.1993-08.org.debian:01:a")


@settings(max_examples=300)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200))
@example(FORGERIES[0])
def test_any_alias(alias: str) -> None:
    targets = parse_targets(TARGET.replace(ALIAS, f"alias: {alias}") + OTHER)
    assert targets[KEY].nexuses[0] == Nexus(12, "iqn.1993-08.org.debian:01:a")
    assert (9, "iqn.2026-11.io.snode:v-a:12") in targets


@settings(max_examples=300)
@given(st.text(max_size=300), st.integers(0, len(TARGET)))
def test_any_text_is_read_or_refused(text: str, position: int) -> None:
    for whole in (text, TARGET[:position] + text, TARGET[:position] + text + TARGET[position:]):
        for parse in (parse_targets, parse_connections, parse_accounts, parse_names, parse_drivers, parse_system_state):
            with suppress(CommandFailed):
                parse(whole)


def test_connections() -> None:
    text = (
        "Session: 6\n    Connection: 0\n        Initiator: iqn.a:b\n        IP Address: 192.0.2.1\n"
        "    Connection: 1\n        Initiator: iqn.a:b\n        IP Address: 192.0.2.1\n"
        "Session: 5\n    Connection: 0\n        Initiator: iqn.a:c\n        IP Address: 192.0.2.1\n"
    )
    assert parse_connections(text) == (
        Connection(6, 0, "iqn.a:b", "192.0.2.1"),
        Connection(6, 1, "iqn.a:b", "192.0.2.1"),
        Connection(5, 0, "iqn.a:c", "192.0.2.1"),
    )


def test_names_and_drivers() -> None:
    text = "LLDs:\n    iscsi: ready\n        Target 1: iqn.a:b\n        Target 22: iqn.a:c\n    iser: error\n"
    assert parse_names(text) == {1: "iqn.a:b", 22: "iqn.a:c"}
    assert parse_drivers(text) == {"iscsi": "ready", "iser": "error"}


def test_accounts_and_state() -> None:
    assert parse_accounts("Account list:\n    n1\n    t1\n") == ("n1", "t1")
    system = "System:\n    State: offline\n    debug: off\nLLDs:\n    iscsi: ready\n"
    assert parse_system_state(system) == "offline"
    with pytest.raises(CommandFailed):
        parse_system_state("LLDs:\n    State: ready\n")


@given(st.integers(1, 16 << 20), st.integers(1, 16 << 20))
def test_sizes_a_mebibyte_apart_are_told_apart(first: int, second: int) -> None:
    if first < second:
        assert shown_mb(first * MIB) < shown_mb(second * MIB)


def test_sizes_as_tgtd_shows_them() -> None:
    """Read from tgtd 1.0.85."""
    assert shown_mb(100 * MIB) == 105
    assert shown_mb(200 * MIB) == 210
    assert shown_mb(GIB) == 1074
