from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import DataLoss, Unavailable
from csi.fs.format import Filesystems
from csi.fs.grow import may_grow_mounted_ext4
from csi.fs.mounts import Mounts
from csi.fs.usage import filesystem_usage
from csi.model import MIB
from tests.unit.fs.conftest import MakeDisk, grow_disk, make_fs, tool

pytestmark = pytest.mark.root


def total(path: Path) -> int:
    return filesystem_usage(path)[0].total


@pytest.fixture
def target(scratch: Path) -> Path:
    (scratch / "m").mkdir()
    return scratch / "m"


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_a_mounted_filesystem_grows_and_repeats(
    fs_type: str, make_disk: MakeDisk, target: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    device = make_disk(320)
    make_fs(filesystems, device, fs_type, deadline)
    mounts.mount(device, target, fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
    (target / "kept").write_text("data")
    before = total(target)
    filesystems.grow(device, fs_type=fs_type, mount_point=target, deadline=deadline)
    assert total(target) == before
    grow_disk(device, 512 * MIB)
    for _ in range(2):
        filesystems.grow(device, fs_type=fs_type, mount_point=target, deadline=deadline)
        assert total(target) - before == 192 * MIB
    assert (target / "kept").read_text() == "data"


def test_a_mounted_ext4_grows_or_says_which_capability_is_missing(
    make_disk: MakeDisk, target: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    device = make_disk(64)
    make_fs(filesystems, device, "ext4", deadline)
    mounts.mount(device, target, fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    before = total(target)
    filesystems.grow(device, fs_type="ext4", mount_point=target, deadline=deadline)  # nothing to do needs no right
    grow_disk(device, 128 * MIB)
    if may_grow_mounted_ext4():
        filesystems.grow(device, fs_type="ext4", mount_point=target, deadline=deadline)
        assert total(target) > before + 60 * MIB
        return
    with pytest.raises(Unavailable, match=r"CAP_SYS_RESOURCE.*staged again"):
        filesystems.grow(device, fs_type="ext4", mount_point=target, deadline=deadline)
    assert total(target) == before


def test_an_unmounted_ext4_grows_where_a_mounted_one_may_not(
    make_disk: MakeDisk,
    target: Path,
    filesystems: Filesystems,
    mounts: Mounts,
    deadline: Deadline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = make_disk(64)
    make_fs(filesystems, device, "ext4", deadline)
    grow_disk(device, 128 * MIB)
    monkeypatch.setattr("csi.fs.grow.may_grow_mounted_ext4", lambda: True)
    filesystems.grow_before_mount(filesystems.look(device, deadline), deadline)
    assert "16384" in tool("dumpe2fs", "-h", str(device))
    monkeypatch.setattr("csi.fs.grow.may_grow_mounted_ext4", lambda: False)
    for fills_device in (False, True):
        look = filesystems.look(device, deadline)
        assert look.fills_device == fills_device
        filesystems.grow_before_mount(look, deadline)
    mounts.mount(device, target, fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    assert total(target) > 110 * MIB


def test_a_damaged_ext4_does_not_grow(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.fs.grow.may_grow_mounted_ext4", lambda: False)
    device = make_disk(64)
    make_fs(filesystems, device, "ext4", deadline)
    tool("debugfs", "-w", "-R", "clri <2>", str(device))
    grow_disk(device, 128 * MIB)
    with pytest.raises(DataLoss, match="e2fsck -f"):
        filesystems.grow_before_mount(filesystems.look(device, deadline), deadline)


def test_a_filesystem_that_is_not_mounted_can_not_grow_mounted(
    make_disk: MakeDisk, target: Path, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(320)
    make_fs(filesystems, device, "ext4", deadline)
    grow_disk(device, 400 * MIB)
    with pytest.raises(DataLoss, match="e2fsck -f"):
        # resize2fs would take an unmounted one too, but asks for a check first
        tool("debugfs", "-w", "-R", "set_super_value lastcheck 1", str(device))
        tool("debugfs", "-w", "-R", "set_super_value mtime now", str(device))
        filesystems.grow(device, fs_type="ext4", mount_point=target, deadline=deadline)
