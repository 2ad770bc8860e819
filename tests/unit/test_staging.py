"""The use cases of a CNODE with real loop devices, filesystems and mounts."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.errors import Conflict, DataLoss, InUse, Invalid, NotFound
from csi.model import AccessMode, Capability
from tests.leftovers import all_below, loops_below, mounts_below
from tests.unit.machine import BLOCK, READER, SINGLE, WRITER, Machine, machine_in_use
from tests.unit.snode import MIB, soon


@pytest.fixture
def machine() -> Iterator[Machine]:
    with machine_in_use() as machine:
        yield machine


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_data_survive_every_round_trip(machine: Machine, fs_type: str) -> None:
    capability = Capability(AccessMode.SINGLE_NODE_WRITER, fs_type=fs_type)
    machine.volume = machine.create(fs_type, 400 * MIB)
    machine.volume_id = machine.volume.volume_id
    for step in range(2):
        for _ in range(2):
            machine.stage(capability)
            machine.publish(capability)
        if step == 0:
            (machine.target / "data").write_text("kept")
        assert (machine.target / "data").read_text() == "kept"
        (usage, *_) = machine.staging.stats(machine.volume_id, volume_path=machine.target, deadline=soon())
        assert usage.unit == "bytes"
        assert usage.total > 200 * MIB
        for _ in range(2):
            machine.unpublish()
        assert not machine.target.exists()
        for _ in range(2):
            machine.unstage()
        assert all_below(machine.folder) == []
        machine.volumes.unpublish(machine.volume_id, node_id="", deadline=soon())


def test_raw_block(machine: Machine) -> None:
    machine.stage(BLOCK)
    machine.publish(BLOCK)
    machine.publish(BLOCK)
    assert stat.S_ISBLK(machine.target.stat().st_mode)
    with machine.target.open("r+b") as device:
        device.write(b"raw data")
    (usage,) = machine.staging.stats(machine.volume_id, volume_path=machine.target, deadline=soon())
    assert usage.total == 16 * MIB
    with pytest.raises(InUse):
        machine.unstage()
    machine.unpublish()
    machine.leave()
    assert machine.volume.device.read_bytes()[:8] == b"raw data"
    with pytest.raises(DataLoss, match="held data"):
        machine.stage()
    machine.leave()
    assert machine.volume.device.read_bytes()[:8] == b"raw data"


def test_another_filesystem_or_mode_is_a_conflict(machine: Machine) -> None:
    machine.stage()
    with pytest.raises(Conflict, match="xfs"):
        machine.stage(Capability(AccessMode.SINGLE_NODE_WRITER, fs_type="xfs"))
    machine.unstage()
    with pytest.raises(Conflict, match="has a ext4"):
        machine.stage(Capability(AccessMode.SINGLE_NODE_WRITER, fs_type="xfs"))
    machine.unstage()


@pytest.mark.parametrize("snode_looks", [False, True], ids=["by the node alone", "by the SNODE"])
def test_a_destroyed_superblock_is_never_formatted(machine: Machine, snode_looks: bool) -> None:
    machine.stage()
    machine.publish()
    (machine.target / "data").write_text("precious")
    machine.unpublish()
    machine.unstage()
    if snode_looks:
        machine.volumes.tend(soon())  # as the service does every few seconds
    with machine.volume.device.open("r+b") as device:
        device.write(bytes(4096))
    before = machine.volume.device.read_bytes()
    if snode_looks:
        machine.leave()  # another publication, of which the node knows nothing
    for _ in range(2):
        with pytest.raises(DataLoss, match="held data" if snode_looks else "formatted before"):
            machine.stage()
    machine.unstage()
    assert machine.volume.device.read_bytes() == before


def test_a_filesystem_is_remembered_if_its_maker_was_killed_right_then(machine: Machine) -> None:
    subprocess.run(["mkfs.ext4", "-q", machine.volume.device], check=True)
    machine.stage(may_format="true")
    machine.unstage()
    with machine.volume.device.open("r+b") as device:
        device.write(bytes(4096))
    with pytest.raises(DataLoss, match="formatted before"):
        machine.stage(may_format="true")
    machine.unstage()


def test_an_xfs_whose_mkfs_was_killed_on_a_node_that_is_lost_is_made_on_the_next(machine: Machine) -> None:
    xfs = Capability(AccessMode.SINGLE_NODE_WRITER, fs_type="xfs")
    machine.volume = machine.create("x", 320 * MIB)
    machine.volume_id = machine.volume.volume_id
    machine.context(xfs)
    device = str(machine.volume.device)
    subprocess.run(["mkfs.xfs", "-q", device], check=True)
    unfinished = ["xfs_db", "-x", "-c", "sb 0", "-c", "write inprogress 1", device]
    subprocess.run(unfinished, check=True, capture_output=True)
    machine.volumes.tend(soon())
    machine.volumes.unpublish(machine.volume_id, node_id="", deadline=soon())
    machine.stage(xfs)
    machine.unstage()
    assert machine.context(xfs)["may_format"] == "false"


def test_no_permission_no_mkfs(machine: Machine) -> None:
    with pytest.raises(DataLoss, match="held data"):
        machine.stage(may_format="false")
    machine.unstage()
    assert not machine.volume.device.read_bytes().strip(b"\0")


def test_a_foreign_signature_is_never_overwritten(machine: Machine) -> None:
    subprocess.run(["mkswap", "-q", machine.volume.device], check=True, capture_output=True)
    before = machine.volume.device.read_bytes()
    with pytest.raises(DataLoss, match="swap"):
        machine.stage(may_format="true")
    machine.unstage()
    assert machine.volume.device.read_bytes() == before


def test_blank_volume_for_a_reader_says_that_there_is_nothing(machine: Machine) -> None:
    with pytest.raises(DataLoss, match="never written"):
        machine.stage(READER)
    machine.leave()
    machine.stage()
    machine.leave()
    machine.stage(READER)
    machine.publish(READER)
    with pytest.raises(OSError, match="Read-only"):
        (machine.target / "data").write_text("x")
    machine.unpublish()
    machine.unstage()


def test_publish_needs_a_stage(machine: Machine) -> None:
    with pytest.raises(InUse, match="NodeStageVolume"):
        machine.publish()
    machine.stage()
    with pytest.raises(InUse, match="not mounted at"):
        machine.staging.publish(
            machine.volume_id, staging_path=machine.folder / "other", target_path=machine.target, capability=WRITER,
            readonly=False, publish_context={}, deadline=soon(),
        )  # fmt: skip
    machine.unstage()


def test_read_only_publish_of_a_writable_stage(machine: Machine) -> None:
    machine.stage()
    machine.publish(readonly=True)
    machine.publish(readonly=True)
    with pytest.raises(OSError, match="Read-only"):
        (machine.target / "data").write_text("x")
    with pytest.raises(Conflict, match="read-only"):
        machine.publish()
    machine.unpublish()
    machine.unstage()


def test_single_writer_has_one_path_and_multi_writer_several(machine: Machine) -> None:
    machine.stage(SINGLE)
    machine.publish(SINGLE)
    machine.publish(SINGLE)
    other = machine.folder / "targets" / "two"
    with pytest.raises(InUse, match="SINGLE_NODE_SINGLE_WRITER"):
        machine.publish(SINGLE, target=other)
    assert not other.exists()
    machine.unpublish()
    machine.publish(SINGLE, target=other)
    machine.unpublish(other)
    machine.leave()
    machine.stage()
    machine.publish()
    machine.publish(target=other)
    with pytest.raises(InUse, match="targets"):
        machine.unstage()
    machine.unpublish()
    machine.unpublish(other)
    machine.unstage()


def test_a_foreign_mount_is_not_touched(machine: Machine) -> None:
    machine.staging_path.mkdir()
    machine.target.mkdir(parents=True)
    for path in (machine.staging_path, machine.target):
        subprocess.run(["mount", "-t", "tmpfs", "foreign", path], check=True)
    with pytest.raises(InUse, match="foreign"):
        machine.stage()
    with pytest.raises(InUse, match="foreign"):
        machine.unstage()
    with pytest.raises(InUse, match="foreign"):
        machine.unpublish()
    assert len(mounts_below(machine.folder)) == 2
    for path in (machine.staging_path, machine.target):
        subprocess.run(["umount", path], check=True)
    machine.stage()
    machine.publish()
    machine.unpublish()
    machine.unstage()


def test_a_wrong_volume_id_takes_down_no_raw_device(machine: Machine) -> None:
    first, second = machine.volume_id, machine.create("b").volume_id
    for volume_id in (first, second):
        machine.volume_id = volume_id
        machine.stage(BLOCK, path=machine.folder / "staged" / volume_id)
        machine.publish(BLOCK, target=machine.folder / volume_id)
    with pytest.raises(InUse, match="mounted there"):
        machine.staging.unpublish(first, target_path=machine.folder / second, deadline=soon())
    assert len(mounts_below(machine.folder)) == 2
    for volume_id in (first, second):
        machine.volume_id = volume_id
        machine.unpublish(machine.folder / volume_id)
        machine.unstage(machine.folder / "staged" / volume_id)
    assert all_below(machine.folder) == []


def test_stacked_mounts_all_go(machine: Machine) -> None:
    machine.stage()
    machine.publish()
    for path in (machine.target, machine.staging_path):
        subprocess.run(["mount", "--bind", machine.staging_path, path], check=True)
    assert len(mounts_below(machine.folder)) == 4
    machine.unpublish()
    machine.unstage()
    assert all_below(machine.folder) == []


def test_lost_state_folder_does_not_leave_an_attachment(machine: Machine) -> None:
    machine.stage()
    machine.publish()
    shutil.rmtree(machine.folder / "state" / "node")
    machine.start()
    machine.unpublish()
    machine.unstage()
    assert all_below(machine.folder) == []


def test_target_with_files_in_it_is_not_removed(machine: Machine) -> None:
    machine.target.mkdir(parents=True)
    (machine.target / "mine").write_text("x")
    with pytest.raises(InUse):
        machine.unpublish()
    assert (machine.target / "mine").exists()


@pytest.mark.parametrize("path", ["/etc/x", "/proc/x", "relative", "/var/tmp/../etc", "/"])
def test_paths_elsewhere_are_refused(machine: Machine, path: str) -> None:
    with pytest.raises(Invalid):
        machine.stage(path=Path(path))
    with pytest.raises(Invalid):
        machine.unpublish(Path(path))
    assert all_below(machine.folder) == []


def test_a_link_on_the_way_is_refused(machine: Machine) -> None:
    (machine.folder / "elsewhere").mkdir()
    (machine.folder / "link").symlink_to(machine.folder / "elsewhere")
    machine.stage()
    with pytest.raises(Invalid, match="link"):
        machine.publish(target=machine.folder / "link" / "x")
    assert list((machine.folder / "elsewhere").iterdir()) == []
    machine.unstage()


def test_a_file_outside_the_pool_is_never_attached(machine: Machine) -> None:
    victim = machine.folder / "victim.img"
    victim.write_bytes(bytes(16 * MIB))
    for file in (victim, machine.folder / "pool" / ".." / "victim.img"):
        with pytest.raises((Invalid, DataLoss)):
            machine.stage(file=str(file))
    assert loops_below(machine.folder) == []


def test_stats_and_expand_of_what_is_not_there(machine: Machine) -> None:
    for path in (machine.folder / "nothing", machine.folder / "pool"):
        with pytest.raises(NotFound):
            machine.staging.stats(machine.volume_id, volume_path=path, deadline=soon())
        with pytest.raises(NotFound):
            machine.staging.expand(machine.volume_id, volume_path=path, block=None, required_bytes=0, deadline=soon())


def test_growth_online_and_at_the_next_stage(machine: Machine) -> None:
    capability = Capability(AccessMode.SINGLE_NODE_WRITER, fs_type="xfs")
    machine.volume_id = machine.create("grow", 320 * MIB).volume_id
    machine.stage(capability)
    machine.publish(capability)
    machine.volumes.expand(machine.volume_id, required_bytes=400 * MIB, limit_bytes=0, deadline=soon())
    for _ in range(2):
        size_bytes = machine.staging.expand(
            machine.volume_id, volume_path=machine.target, block=False, required_bytes=400 * MIB,
            deadline=soon(),
        )  # fmt: skip
        assert size_bytes == 400 * MIB
    first = os.statvfs(machine.target).f_blocks
    machine.unpublish()
    machine.unstage()
    # Killed before NodeExpandVolume: the next stage makes it good.
    machine.volumes.expand(machine.volume_id, required_bytes=480 * MIB, limit_bytes=0, deadline=soon())
    machine.stage(capability)
    assert os.statvfs(machine.staging_path).f_blocks > first
    machine.unstage()


def test_two_staging_paths_share_one_device(machine: Machine) -> None:
    other = machine.folder / "staging2"
    machine.stage()
    machine.stage(path=other)
    assert len(loops_below(machine.folder)) == 1
    machine.unstage()
    assert len(loops_below(machine.folder)) == 1
    machine.unstage(other)
    assert all_below(machine.folder) == []


def test_what_an_earlier_life_left_is_detached_unless_it_is_staged_or_used(machine: Machine) -> None:
    used, staged = machine.volume_id, machine.create("staged").volume_id
    unknown = machine.create("unknown").volume_id
    for volume_id in (used, staged, unknown):
        machine.volume_id = volume_id
        machine.stage(BLOCK if volume_id == unknown else WRITER, path=machine.folder / volume_id)
    subprocess.run(["umount", machine.folder / staged], check=True)
    for volume_id in (used, unknown):
        (machine.folder / "state" / "node" / f"{volume_id}.json").unlink()
    machine.start()
    machine.staging.tend(soon())
    found = [machine.staging._attached.find(volume_id) is not None for volume_id in (used, staged, unknown)]
    assert found == [True, True, False]
    for volume_id in (used, staged):
        machine.volume_id = volume_id
        machine.unstage(machine.folder / volume_id)
