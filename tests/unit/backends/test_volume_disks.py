"""Which disks are volumes of ours, by what sysfs says; and that LVM's search passes them over."""

from pathlib import Path

import pytest

from csi.backends.lvm_cli import Lvm
from csi.backends.volume_disks import VENDOR, is_on, volume_disks
from csi.errors import Unavailable
from csi.exports import tgt_target
from csi.model import volume_id_of
from csi.records import RecordStore
from tests.fakes.lvm import FakeLvm, FakeVg
from tests.fakes.runner import FakeRunner
from tests.unit.backends.rig import soon

VOLUME = volume_id_of("x")


class Sysfs:
    """Block devices as folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "class" / "block").mkdir(parents=True)

    def add(self, name: str, *, under: str = "", on: tuple[str, ...] = (), **attributes: str) -> None:
        folder = self.root / "devices" / under / name
        folder.mkdir(parents=True)
        for key, value in attributes.items():
            path = folder / key.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(value + "\n")
        for part in on:
            (folder / "slaves" / part).mkdir(parents=True)
        (self.root / "class" / "block" / name).symlink_to(folder)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    sysfs = Sysfs(tmp_path / "sys")
    sysfs.add("sda", device__vendor="ATA     ")
    sysfs.add("sda1", under="sda", partition="1")
    sysfs.add("loop0", loop__backing_file="/var/lib/libvirt/disk.img")
    sysfs.add("dm-0", on=("sda1",), dm__name="cryptdisk")
    sysfs.add("dm-1", on=("dm-0",), dm__name="vg0-root")
    sysfs.add("md0", on=("sda1",))
    return sysfs


def test_the_machines_own_disks_are_not_among_them(sysfs: Sysfs) -> None:
    assert volume_disks(sysfs.root) == set()


def test_volumes_and_what_stands_on_them(sysfs: Sysfs) -> None:
    sysfs.add("sdb", device__vendor="SNODE   ")
    sysfs.add("sdb1", under="sdb", partition="1")
    sysfs.add("loop1", loop__backing_file=f"/var/lib/snode/volumes/{VOLUME}.img")
    sysfs.add("loop2", loop__backing_file=f"/var/lib/snode/volumes/{VOLUME}.img (deleted)")
    sysfs.add("dm-2", on=("sda1",), dm__name=f"vg0-{VOLUME.replace('-', '--')}")
    sysfs.add("dm-3", on=("sda1",), dm__name="vg0-trash--0123456789abcdef")
    sysfs.add("dm-4", on=("dm-5",), dm__name="a PV in LUKS on a partition of a volume")
    sysfs.add("dm-5", on=("sdb1",), dm__name="luks")
    sysfs.add("md1", on=("loop1", "loop2"))
    assert volume_disks(sysfs.root) == {"sdb", "sdb1", "loop1", "loop2", "dm-2", "dm-3", "dm-4", "dm-5", "md1"}


def test_a_disk_is_known_by_every_name(tmp_path: Path) -> None:
    (tmp_path / "sdb").touch()
    (tmp_path / "by-id").symlink_to(tmp_path / "sdb")
    assert is_on(str(tmp_path / "by-id"), {"sdb"}) and not is_on(str(tmp_path / "by-id"), {"sda"})


def test_the_vendor_is_what_our_targets_say() -> None:
    assert VENDOR == tgt_target.VENDOR


@pytest.mark.parametrize("heeded", [True, False], ids=["filter", "without a filter"])
def test_lvm_does_not_search_them(tmp_path: Path, sysfs: Sysfs, heeded: bool) -> None:
    """A group of the pool's name inside an attached volume, and the real one absent."""
    lvm = FakeLvm(tmp_path / "dev")
    lvm.exists = False
    lvm.others.append(FakeVg("vg0", "Guest-0", ("/dev/sdb",)))
    runner = FakeRunner(lvm.programs)
    if not heeded:
        runner.programs["pvs"] = lambda _argv, _input: lvm._pvs([])
    state = RecordStore(tmp_path / "state")
    sysfs.add("sdb", device__vendor="SNODE   ")
    with pytest.raises(Unavailable, match="not found on this machine"):
        Lvm("vg0", runner=runner, state=state, sys=sysfs.root).report(soon())
    assert runner.count("lvm") == 0 and state.names() == []
    config = next(word for word in runner.calls[0] if word.startswith("--config="))
    assert 'filter=["r|^/dev/sdb$|"]' in config
    lvm.exists = True
    assert Lvm("vg0", runner=runner, state=state, sys=sysfs.root).report(soon()).vg == "vg0"
