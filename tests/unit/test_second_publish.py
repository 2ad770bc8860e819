"""CSI's table of the second NodePublishVolume, and repeated NodeStageVolume with other arguments. Real mounts."""

import subprocess
from collections.abc import Iterator

import pytest

from csi.errors import Conflict, InUse, Invalid
from csi.model import AccessMode, Capability
from tests.leftovers import mounts_below
from tests.unit.machine import BLOCK, SINGLE, WRITER, Machine, machine_in_use

MULTI = Capability(AccessMode.SINGLE_NODE_MULTI_WRITER)
NOATIME = Capability(AccessMode.SINGLE_NODE_WRITER, mount_flags=("noatime",))


@pytest.fixture
def machine() -> Iterator[Machine]:
    with machine_in_use() as machine:
        yield machine


@pytest.mark.parametrize("lost", [False, True], ids=["", "records lost"])
def test_a_writer_is_not_turned_read_only(machine: Machine, lost: bool) -> None:
    machine.stage()
    machine.publish()
    if lost:
        machine.record().unlink()
    with (machine.target / "data").open("w") as writer:
        with pytest.raises(Conflict):
            machine.publish(readonly=True)
        writer.write("goes on")
    machine.publish()
    assert (machine.target / "data").read_text() == "goes on"
    machine.unpublish()
    machine.unstage()


def test_a_half_made_read_only_publish_is_finished(machine: Machine) -> None:
    machine.stage()
    machine.publish(readonly=True)
    subprocess.run(["mount", "-o", "remount,bind,rw", machine.target], check=True)  # as before the second step
    machine.publish(readonly=True)
    with pytest.raises(OSError, match="Read-only"):
        (machine.target / "data").write_text("x")
    machine.unpublish()
    machine.unstage()


@pytest.mark.parametrize("second", [SINGLE, MULTI, NOATIME], ids=["mode", "mode 2", "flags"])
def test_the_same_target_in_another_way_is_a_conflict(machine: Machine, second: Capability) -> None:
    machine.stage()
    machine.publish()
    with pytest.raises(Conflict, match="published at"):
        machine.publish(second)
    machine.publish()
    machine.unpublish()
    machine.unstage()


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        (MULTI, MULTI, True),
        (WRITER, WRITER, True),
        (SINGLE, SINGLE, False),
        (SINGLE, MULTI, False),
        (SINGLE, WRITER, False),
        (MULTI, SINGLE, False),
        (WRITER, SINGLE, False),
        (WRITER, MULTI, False),
        (WRITER, NOATIME, False),
    ],
)
def test_another_target(machine: Machine, first: Capability, second: Capability, allowed: bool) -> None:
    other = machine.folder / "targets" / "two"
    machine.stage()
    machine.publish(first)
    if allowed:
        machine.publish(second, target=other)
        machine.unpublish(other)
        machine.publish(second, target=other, readonly=True)
    else:
        with pytest.raises(InUse, match="targets/one"):
            machine.publish(second, target=other)
        assert not other.exists()
    machine.unpublish()
    machine.publish(second, target=other, readonly=allowed)
    machine.unpublish(other)
    machine.unstage()


@pytest.mark.parametrize("capability", [SINGLE, Capability(AccessMode.SINGLE_NODE_SINGLE_WRITER, block=True)])
@pytest.mark.parametrize("restaged", [False, True])
def test_a_single_writer_stays_single_when_the_records_are_lost(
    machine: Machine, capability: Capability, restaged: bool
) -> None:
    other = machine.folder / "targets" / "two"
    machine.stage(capability)
    machine.publish(capability)
    machine.record().unlink()
    if restaged and not capability.block:
        machine.stage(capability)
    with pytest.raises(InUse, match="targets/one"):
        machine.publish(capability, target=other)
    machine.publish(capability)
    with pytest.raises(InUse, match="targets/one"):
        machine.publish(capability, target=other)
    machine.unpublish()
    machine.publish(capability, target=other)
    machine.unpublish(other)
    machine.unstage()


def test_mirrors_of_a_mount_count_for_nothing_while_there_is_a_record(machine: Machine) -> None:
    machine.stage(SINGLE)
    mirror = machine.folder / "mirror"
    mirror.mkdir()
    subprocess.run(["mount", "--bind", machine.staging_path, mirror], check=True)
    machine.publish(SINGLE)
    machine.unpublish()
    subprocess.run(["umount", mirror], check=True)
    machine.unstage()


def test_target_and_staging_path_lie_apart(machine: Machine) -> None:
    machine.stage()
    for target in (machine.staging_path, machine.staging_path / "in", machine.staging_path.parent):
        with pytest.raises(Invalid, match=r"^target_path"):
            machine.publish(target=target)
    assert mounts_below(machine.folder) == [str(machine.staging_path)]
    machine.publish()
    with pytest.raises(Conflict, match="published at"):
        machine.stage(path=machine.target)
    machine.unpublish()
    machine.unstage()


def test_a_repeated_stage_with_other_flags_is_a_conflict(machine: Machine) -> None:
    machine.stage(NOATIME)
    machine.stage(NOATIME)
    with pytest.raises(Conflict, match="noatime"):
        machine.stage()
    machine.unstage()
    machine.stage()
    machine.unstage()


def test_a_repeated_raw_publish(machine: Machine) -> None:
    machine.stage(BLOCK)
    machine.publish(BLOCK)
    machine.publish(BLOCK)
    with pytest.raises(Conflict, match="published at"):
        machine.publish(Capability(AccessMode.SINGLE_NODE_MULTI_WRITER, block=True))
    machine.unpublish()
    machine.unstage()
