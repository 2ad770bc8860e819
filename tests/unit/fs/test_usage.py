import os
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import Invalid, NotFound
from csi.fs.format import FS_TYPES, Filesystems
from csi.fs.mounts import Mounts
from csi.fs.usage import block_size, device_number, filesystem_usage
from csi.model import MIB
from tests.unit.fs.conftest import MakeDisk, make_fs

pytestmark = pytest.mark.root


@pytest.mark.parametrize("fs_type", FS_TYPES)
def test_usage_of_a_real_filesystem(
    fs_type: str, make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    device = make_disk(320)
    make_fs(filesystems, device, fs_type, deadline)
    target = scratch / "m"
    mounts.ensure_directory(target)
    mounts.mount(device, target, fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
    empty = filesystem_usage(target)
    (target / "data").write_bytes(os.urandom(40 * MIB))
    os.sync()
    full = filesystem_usage(target)
    assert [usage.unit for usage in full] == (["bytes"] if fs_type == "btrfs" else ["bytes", "inodes"])
    assert 39 * MIB <= full[0].used - empty[0].used <= 44 * MIB
    assert full[0].available <= full[0].total - full[0].used
    assert 150 * MIB < full[0].total <= 320 * MIB
    if fs_type != "btrfs":
        assert full[1].used - empty[1].used == 1


def test_usage_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        filesystem_usage(tmp_path / "x")


def test_block_size_and_number(make_disk: MakeDisk, tmp_path: Path) -> None:
    device = make_disk(17)
    assert block_size(device) == 17 * MIB
    number = device_number(device)
    assert number is not None and number.startswith("7:")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert block_size(tmp_path / "file") == 1000
    assert device_number(tmp_path / "file") is None
    assert device_number(tmp_path / "none") is None
    with pytest.raises(NotFound):
        block_size(tmp_path / "none")
    with pytest.raises(Invalid):
        block_size(tmp_path)
