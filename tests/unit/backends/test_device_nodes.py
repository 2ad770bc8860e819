from pathlib import Path

import pytest

from csi.backends.device_nodes import DeviceNodes
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


def test_parts_of_a_raid_volume_and_a_thin_pool(tmp_path: Path) -> None:
    names = {
        "dm-0": ("vg--0-v--a_rimage_0", "LVM-Uabc"), "dm-1": ("vg--0-v--a_rmeta_11", "LVM-Udef"),
        "dm-2": ("vg--0-v--a", "LVM-Ughi"), "dm-3": ("vg--0-v--ab_rimage_0", "LVM-Ujkl"),
        "dm-6": ("vg--0-tp_tdata", "LVM-Upqr-tdata"), "dm-7": ("vg--0-tp-tpool", "LVM-Ustu-tpool"),
        "dm-8": ("vg--0-tp_tdata_rimage_0", "LVM-Uvwx"), "dm-9": ("vg--0-tp", "LVM-Uyz"),
        "dm-4": ("vg--0-v--a_rimage_1", "LVM-other"), "dm-5": ("vg--0-v--a_rimage_x", "LVM-Umno"),
    }  # fmt: skip
    for device, (name, uuid) in names.items():
        folder = tmp_path / "block" / device / "dm"
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "uuid").write_text(f"{uuid}\n")
    nodes = DeviceNodes(sys=tmp_path)
    assert nodes.parts("vg-0", "v-a", vg_uuid="U") == ["vg--0-v--a_rimage_0", "vg--0-v--a_rmeta_11"]
    assert nodes.parts("vg-0", "tp", vg_uuid="U") == ["vg--0-tp-tpool", "vg--0-tp_tdata", "vg--0-tp_tdata_rimage_0"]
