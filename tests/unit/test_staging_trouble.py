"""Dead filesystems, full and broken state folders, left-overs: what must never keep a volume on a node for ever."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from csi.deadline import Deadline
from csi.errors import DataLoss, InUse, Invalid, NotFound, Unavailable
from csi.model import AccessMode, Capability
from tests.leftovers import all_below, loops_below
from tests.unit.machine import BLOCK, Machine, machine_in_use
from tests.unit.snode import MIB, soon

XFS = Capability(AccessMode.SINGLE_NODE_WRITER, fs_type="xfs")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with machine_in_use() as machine:
        yield machine


@pytest.mark.parametrize("records", ["kept", "lost"])
def test_a_filesystem_that_was_shut_down_is_taken_away(machine: Machine, records: str) -> None:
    machine.volume_id = machine.create("x", 320 * MIB).volume_id
    with pytest.raises(NotFound, match="neither attached here nor staged"):
        machine.staging.complaints(machine.volume_id)
    machine.stage(XFS)
    machine.publish(XFS)
    assert machine.staging.complaints(machine.volume_id) == []
    subprocess.run(["xfs_io", "-x", "-c", "shutdown", machine.staging_path], check=True)
    (complaint,) = machine.staging.complaints(machine.volume_id)
    assert (complaint.reason, str(machine.staging_path) in complaint.message) == ("FilesystemStopped", True)
    with pytest.raises(OSError, match="Input/output error"):
        machine.target.stat()
    for path in (machine.target, machine.staging_path):
        with suppress(Unavailable):
            machine.stats(path)
    if records == "lost":
        machine.record().unlink()
    machine.unpublish()
    machine.unstage()
    assert all_below(machine.folder) == []
    assert not machine.target.exists()


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_state_folder_that_takes_nothing_holds_up_no_teardown(machine: Machine, trouble: str) -> None:
    state = machine.folder / "state" / "node"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "state", state], check=True)
    machine.start()
    machine.stage()
    other = machine.folder / "targets" / "two"
    machine.publish()
    machine.publish(target=other)
    if trouble == "full":
        with pytest.raises(OSError, match="No space"):
            (state / "filler").write_bytes(bytes(MIB))
    else:
        subprocess.run(["mount", "-o", "remount,ro", state], check=True)
    for target in (machine.target, other):
        machine.unpublish(target)
        machine.unpublish(target)
        assert not target.exists()
    machine.unstage()
    machine.unstage()
    subprocess.run(["umount", state], check=True)
    assert all_below(machine.folder) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 99}', '{"format": 1, "staged": 7}'])
def test_a_damaged_record_holds_up_nothing(machine: Machine, damage: str) -> None:
    for capability in (BLOCK, XFS):
        machine.volume_id = machine.create(capability.fs_type or "raw", 320 * MIB).volume_id
        machine.stage(capability)
        machine.publish(capability)
        machine.record().write_text(damage)
        if not capability.block:
            machine.stage(capability)
            machine.record().write_text(damage)
        machine.publish(capability)
        machine.record().write_text(damage)
        machine.unpublish()
        machine.record().write_text(damage)
        machine.unstage()
        assert not machine.record().exists()
    assert all_below(machine.folder) == []


def test_a_damaged_note_of_what_was_formatted_forbids_to_format_and_nothing_else(machine: Machine) -> None:
    machine.stage()
    machine.leave()
    (machine.folder / "state" / "node" / "formatted.json").write_text("{")
    machine.stage(may_format="true")
    machine.leave()
    machine.volume_id = machine.create("b").volume_id
    with pytest.raises(DataLoss, match="damaged"):
        machine.stage()
    machine.unstage()


def test_the_sweep_goes_on_until_all_is_swept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("csi.sweep.time.monotonic", lambda: now)
    machine.stage(BLOCK)
    machine.record().unlink()
    machine.start()
    (connector,) = machine.staging._connectors.values()
    disconnect = connector.disconnect
    tries = 0

    def refuse(volume_id: str, deadline: Deadline) -> None:
        nonlocal tries
        tries += 1
        raise InUse("held")

    monkeypatch.setattr(connector, "disconnect", refuse)
    with structlog.testing.capture_logs() as logs:
        for _ in range(50):
            machine.staging.tend(soon())
            now += 2.0
    assert 3 < tries < 12
    assert _events(logs) == ["left attached"]
    monkeypatch.setattr(connector, "disconnect", disconnect)
    now += 100.0
    with machine.staging._locks.hold(machine.volume_id), structlog.testing.capture_logs() as logs:
        machine.staging.tend(soon())
    assert logs == []
    now += 100.0
    machine.staging.tend(soon())
    assert all_below(machine.folder) == []


def test_what_a_lost_record_told_of_is_not_swept_once_the_orchestrator_asked(machine: Machine) -> None:
    machine.stage(BLOCK)
    machine.publish(BLOCK)
    machine.record().unlink()
    machine.start()
    machine.unpublish()
    machine.staging.tend(soon())
    machine.publish(BLOCK)
    machine.unpublish()
    machine.unstage()


def test_a_staged_volume_whose_device_is_gone_is_told(machine: Machine) -> None:
    machine.stage(BLOCK)
    (loop,) = loops_below(machine.folder)
    subprocess.run(["losetup", "--detach", f"/dev/{loop}"], check=True)
    (complaint,) = machine.staging.complaints(machine.volume_id)
    assert (complaint.reason, machine.volume_id in complaint.message) == ("DeviceGone", True)
    machine.unstage()


@pytest.mark.parametrize("path", ["/etc/x", "/var/tmp/elsewhere", "/var/tmp/../etc"])
def test_a_refused_path_is_told_by_its_field(machine: Machine, path: str) -> None:
    place = Path(path)
    with pytest.raises(Invalid, match=r"^staging_target_path '"):
        machine.stage(path=place)
    with pytest.raises(Invalid, match=r"^staging_target_path '"):
        machine.unstage(place)
    with pytest.raises(Invalid, match=r"^target_path '"):
        machine.publish(target=place)
    with pytest.raises(Invalid, match=r"^target_path '"):
        machine.unpublish(place)
    with pytest.raises(Invalid, match=r"^volume_path '"):
        machine.stats(place)


def test_a_folder_in_the_place_of_a_raw_device_is_told_by_its_field(machine: Machine) -> None:
    machine.stage(BLOCK)
    machine.target.mkdir(parents=True)
    with pytest.raises(Invalid, match=r"^target_path '"):
        machine.publish(BLOCK)
    machine.unpublish()
    machine.unstage()


def test_a_refused_stage_leaves_no_record(machine: Machine) -> None:
    with pytest.raises(Invalid, match=r"^publish_context\.file"):
        machine.stage(file="/etc/passwd")
    assert not machine.record().exists()
    machine.stage()
    with pytest.raises(Invalid):
        machine.stage(file="/etc/passwd")
    assert machine.record().exists()
    machine.unstage()


def _events(logs: list[Any]) -> list[str]:
    return [line["event"] for line in logs]
