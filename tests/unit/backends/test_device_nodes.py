from pathlib import Path

import pytest

from csi.backends.device_nodes import DeviceNodes, Node
from csi.errors import Unavailable


def test_real_block_device_is_seen_without_opening_it(tmp_path: Path) -> None:
    """Any block device of this machine will do: size from sysfs, no device-mapper facts."""
    names = [path.name for path in Path("/sys/block").iterdir() if not path.name.startswith(("loop", "dm-"))]
    device = next(Path("/dev", name) for name in names if int(Path("/sys/block", name, "size").read_text()))
    (tmp_path / "vg").mkdir()
    (tmp_path / "vg" / "lv").symlink_to(device)
    node = DeviceNodes(dev=tmp_path).look("vg", "lv")
    assert node is not None and node.size_bytes > 0 and node.dm_uuid == "" and not node.suspended
    assert node.path == tmp_path / "vg" / "lv"


def test_absent_and_wrong_nodes(tmp_path: Path) -> None:
    nodes = DeviceNodes(dev=tmp_path)
    assert nodes.look("vg", "lv") is None
    (tmp_path / "vg").mkdir()
    (tmp_path / "vg" / "lv").symlink_to("/dev/dm-4711")
    assert nodes.look("vg", "lv") is None, "a dead link of udev"
    (tmp_path / "vg" / "file").touch()
    with pytest.raises(Unavailable, match="not a block device"):
        nodes.look("vg", "file")


def test_in_doubt_a_device_counts_as_used(tmp_path: Path) -> None:
    """Whether device-mapper is there or not: it has no device of this uuid. The lab asks it of a real one."""
    node = Node(path=tmp_path / "lv", size_bytes=1, dm_uuid="LVM-none")
    assert not DeviceNodes().is_unused(node)
    assert not DeviceNodes(dev=tmp_path).is_unused(node)
