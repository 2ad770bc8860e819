"""Raw devices and filesystems on one volume: neither is ever taken for the other. Real loop devices."""

from collections.abc import Iterator

import pytest

from csi.errors import Conflict, DataLoss, InUse, Invalid, NotFound
from tests.leftovers import all_below
from tests.unit.machine import BLOCK, WRITER, Machine, machine_in_use
from tests.unit.snode import MIB, soon


@pytest.fixture
def machine() -> Iterator[Machine]:
    with machine_in_use() as machine:
        yield machine


def test_the_other_access_type_than_published_is_refused(machine: Machine) -> None:
    context = machine.context(WRITER)
    with pytest.raises(Invalid, match="access_type"):
        machine.stage(BLOCK, context=context)
    machine.volumes.unpublish(machine.volume_id, node_id="", deadline=soon())
    context = machine.context(BLOCK)
    with pytest.raises(Invalid, match="access_type"):
        machine.stage(WRITER, context=context)
    assert all_below(machine.folder) == []
    assert not machine.record().exists()


def test_raw_data_are_never_formatted_even_with_a_forged_context(machine: Machine) -> None:
    context = machine.context(WRITER)
    assert context["may_format"] == "true"
    machine.stage(BLOCK, context=context, access_type="block")
    machine.publish(BLOCK)
    with machine.target.open("r+b") as device:
        device.write(b"raw data")
    with pytest.raises(InUse, match="published raw"):
        machine.stage(WRITER, context=context)
    machine.unpublish()
    machine.unstage()
    for _ in range(2):
        with pytest.raises(DataLoss, match="formatted before"):
            machine.stage(WRITER, context=context)
    machine.unstage()
    assert machine.volume.device.read_bytes()[:8] == b"raw data"


def test_a_mounted_filesystem_is_neither_staged_nor_published_as_block(machine: Machine) -> None:
    context = machine.context()
    machine.stage(context=context)
    with pytest.raises(Conflict, match="mounted as a filesystem"):
        machine.stage(BLOCK, context=context, access_type="block", path=machine.folder / "other")
    with pytest.raises(InUse, match="staged as a filesystem"):
        machine.publish(BLOCK)
    machine.staging._mounts.unmount_all(machine.staging_path, soon())
    with pytest.raises(InUse, match="staged as a filesystem"):
        machine.publish(BLOCK)
    assert not machine.target.exists()
    machine.unstage()


def test_a_writable_raw_device_is_not_published_read_only(machine: Machine) -> None:
    machine.stage(BLOCK)
    with pytest.raises(InUse, match="ControllerPublishVolume"):
        machine.publish(BLOCK, readonly=True)
    assert not machine.target.exists()
    machine.leave()
    machine.stage(BLOCK, context=machine.context(BLOCK, readonly=True))
    machine.publish(BLOCK, readonly=True)
    with pytest.raises(OSError, match=r"not permitted|Read-only"), machine.target.open("r+b") as device:
        device.write(b"x")
    machine.unpublish()
    machine.unstage()


def test_stats_of_a_staging_path_are_those_of_the_volume_or_none(machine: Machine) -> None:
    machine.stage()
    assert machine.stats(machine.staging_path)[0].total < 16 * MIB
    machine.staging._mounts.unmount_all(machine.staging_path, soon())
    with pytest.raises(NotFound):
        machine.stats(machine.staging_path)
    machine.leave()
    machine.staging_path.mkdir(exist_ok=True)
    machine.stage(BLOCK)
    (usage,) = machine.stats(machine.staging_path)
    assert usage.total == 16 * MIB
    machine.unstage()
