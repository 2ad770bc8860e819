"""Deletion of thick volumes: gone at once, zeroed before the space is given on, resumed after every kill."""

import random
import threading
import time
from pathlib import Path

import pytest

from csi.backends import lvm_trash, wipe
from csi.backends.lvm_thick import Thick
from csi.errors import DataLoss, DriverError
from csi.model import Volume, volume_id_of
from csi.run import Boundary
from tests.fakes.crash import Crash, CrashAt
from tests.unit.backends.rig import MIB, Rig, soon


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def full_of_data(rig: Rig, name: str = "one", *, size_bytes: int = 20 * MIB) -> Volume:
    volume = rig.create(name, size_bytes=size_bytes)
    volume.device.write_bytes(random.Random(1).randbytes(size_bytes))
    return volume


def test_deleted_is_gone_at_once_and_its_space_comes_later(rig: Rig) -> None:
    volume = full_of_data(rig)
    rig.backend.delete(volume, soon())
    assert rig.backend.find(volume.volume_id, soon()) is None
    assert rig.backend.list_volumes(soon()) == []
    assert rig.backend.capacity(soon()).available_bytes == 80 * MIB
    (trash,) = rig.thick_names
    assert trash.startswith("trash-")
    rig.settle()
    assert rig.thick_names == [] and rig.lvm.dirty == [] and rig.records() == []
    assert rig.backend.capacity(soon(60)).available_bytes == 100 * MIB


def test_the_name_is_free_at_once(rig: Rig) -> None:
    for _ in range(3):
        full_of_data(rig)
        rig.delete()
    volume = rig.create()
    assert rig.backend.open_for_export(volume, soon()).blank
    assert len(rig.thick_names) == 4
    rig.settle()
    assert rig.thick_names == [volume.volume_id] and rig.lvm.dirty == []


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("program", ["lvrename", "lvremove"])
def test_killed_at_a_command(rig: Rig, program: str, after: bool) -> None:
    full_of_data(rig)
    rig.runner.fail(program, after=after, reply=None)
    with pytest.raises(Crash):
        rig.delete()
        rig.settle()
    rig.start()
    rig.delete()
    rig.settle()
    assert rig.thick_names == [] and rig.lvm.dirty == [] and rig.records() == []


def test_killed_at_each_step_of_a_wipe(rig: Rig) -> None:
    for step in range(1, 60):
        rig.start(seconds=0.0)  # a step of the wipe a call
        full_of_data(rig)
        rig.start(boundary=CrashAt(step), seconds=0.0)
        try:
            rig.delete()
            rig.settle()
        except Crash:
            rig.start(seconds=0.0)
            rig.delete()
            rig.settle()
        assert rig.thick_names == [] and rig.lvm.dirty == [] and rig.records() == []
        if step > 20:
            return


def test_a_wipe_goes_on_where_it_was(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    real = wipe.wipe_step

    def spy(path: Path, *, start: int, size_bytes: int, seconds: float, boundary: Boundary) -> int:
        starts.append(start)
        return real(path, start=start, size_bytes=size_bytes, seconds=0.0, boundary=boundary)

    monkeypatch.setattr(lvm_trash, "wipe_step", spy)
    full_of_data(rig, size_bytes=30 * MIB)
    rig.delete()
    rig.backend.tend(soon())
    rig.start()
    rig.settle()
    assert starts == [0, 8 * MIB, 16 * MIB, 24 * MIB]
    assert rig.thick_names == [] and rig.lvm.dirty == []


def test_a_note_of_another_volume_is_not_believed(rig: Rig) -> None:
    full_of_data(rig)
    rig.delete()
    (trash,) = rig.thick_names
    note = rig.folder / "state" / "fast" / "wipes" / f"{trash}.json"
    note.write_text('{"format": 1, "uuid": "somebody-else", "zeroed_bytes": 20971520}')
    rig.settle()
    assert rig.lvm.dirty == [] and rig.thick_names == []


def test_zeros_go_to_the_right_device_only(rig: Rig) -> None:
    volume = full_of_data(rig)
    rig.delete()
    (trash,) = rig.thick_names
    rig.nodes.wrong[trash] = "LVM-somebody-else"
    rig.settle()
    assert rig.thick_names == [trash]
    assert rig.lvm.device(trash).read_bytes().strip(b"\0"), "not touched"
    assert rig.backend.find(volume.volume_id, soon()) is None


def test_a_disk_that_does_not_keep_zeros_keeps_its_volume(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(path: Path, *, start: int, size_bytes: int, seconds: float, boundary: Boundary) -> int:
        return size_bytes

    monkeypatch.setattr(lvm_trash, "wipe_step", lie)
    full_of_data(rig)
    rig.delete()
    rig.settle()
    assert len(rig.thick_names) == 1 and rig.records() == []


def test_inactive_and_open_and_partial_trash(rig: Rig) -> None:
    full_of_data(rig)
    rig.delete()
    (trash,) = rig.thick_names
    rig.lvm.reboot()
    rig.lvm.lvs[trash].health = "partial"
    rig.start()
    rig.settle()
    assert rig.lvm.device(trash).read_bytes().strip(b"\0"), "a part of the data would stay on the missing disk"
    rig.lvm.lvs[trash].health = ""
    rig.lvm.lvs[trash].is_open = True
    rig.start()
    rig.settle()
    assert rig.thick_names == [trash], "held by something"
    rig.lvm.lvs[trash].is_open = False
    rig.start()
    rig.settle()
    assert rig.thick_names == [] and rig.lvm.dirty == []


def test_one_that_fails_does_not_hold_up_the_others(rig: Rig) -> None:
    for name in ("a", "b", "c"):
        full_of_data(rig, name)
        rig.delete(name)
    stuck = rig.thick_names[0]
    rig.lvm.lvs[stuck].health = "partial"
    rig.start()
    rig.settle()
    assert rig.thick_names == [stuck] and rig.lvm.dirty == []


# -- RAID: what a leg that fell out still holds ------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path: Path) -> Rig:
    return Rig(tmp_path, space=Thick("raid1"), disks={"/dev/sda": 50, "/dev/sdb": 50})


def fall_out_while_wiping(mirror: Rig, monkeypatch: pytest.MonkeyPatch, *, disk_too: bool) -> str:
    """The leg fails after the health was looked at, before the last zero."""
    real = wipe.wipe_step

    def wipe_step(path: Path, *, start: int, size_bytes: int, seconds: float, boundary: Boundary) -> int:
        mirror.lvm.drop_leg(path.name)
        if disk_too:
            mirror.lvm.gone.add("/dev/sdb")
        monkeypatch.setattr(lvm_trash, "wipe_step", real)
        return real(path, start=start, size_bytes=size_bytes, seconds=seconds, boundary=boundary)

    full_of_data(mirror)
    mirror.delete()
    monkeypatch.setattr(lvm_trash, "wipe_step", wipe_step)
    (trash,) = mirror.thick_names
    return trash


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("disk_too", [False, True])
def test_a_leg_that_fails_during_the_wipe_keeps_the_volume(
    mirror: Rig, monkeypatch: pytest.MonkeyPatch, disk_too: bool, restart: bool
) -> None:
    trash = fall_out_while_wiping(mirror, monkeypatch, disk_too=disk_too)
    mirror.settle()
    assert mirror.thick_names == [trash] and mirror.lvm.dirty == []
    assert not any("wipes" in name for name in mirror.records()), "what was zeroed without the leg counts for nothing"
    (text,) = [text for text in mirror.backend.warnings(soon()) if trash in text]
    assert "space stays taken" in text and "vgreduce --removemissing --force vg0" in text
    if restart:
        mirror.start()
        mirror.settle()
        assert not disk_too or mirror.thick_names == [trash]
    mirror.lvm.gone.clear()
    mirror.start()  # or after the pause
    mirror.settle()
    assert mirror.thick_names == [] and mirror.lvm.dirty == []
    assert mirror.runner.count("lvchange", "--refresh") == 1
    assert mirror.backend.warnings(soon()) == []


def test_a_note_of_all_zeros_does_not_outlive_a_lost_leg(mirror: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroed to the end, killed before the removal, then a leg is lost."""
    full_of_data(mirror)
    mirror.delete()
    mirror.runner.fail("lvremove", reply=None)
    with pytest.raises(Crash):
        mirror.settle()
    (trash,) = mirror.thick_names
    assert any("wipes" in name for name in mirror.records())
    mirror.lvm.lvs[trash].leg_left = b"old data"
    mirror.start()
    starts: list[int] = []
    real = wipe.wipe_step

    def spy(path: Path, *, start: int, size_bytes: int, seconds: float, boundary: Boundary) -> int:
        starts.append(start)
        return real(path, start=start, size_bytes=size_bytes, seconds=seconds, boundary=boundary)

    monkeypatch.setattr(lvm_trash, "wipe_step", spy)
    mirror.settle()
    assert starts == [0] and mirror.thick_names == [] and mirror.lvm.dirty == []


def test_legs_that_are_not_in_step_yet_are_waited_for(mirror: Rig) -> None:
    full_of_data(mirror)
    mirror.delete()
    (trash,) = mirror.thick_names
    mirror.lvm.lvs[trash].sync = "40.00"
    mirror.settle()
    assert mirror.thick_names == [trash]
    mirror.lvm.lvs[trash].sync = "100.00"
    mirror.start()
    mirror.settle()
    assert mirror.thick_names == [] and mirror.lvm.dirty == [] and mirror.records() == []


def test_the_kernels_word_for_the_legs_counts_when_lvm_sees_nothing(mirror: Rig) -> None:
    full_of_data(mirror)
    mirror.delete()
    (trash,) = mirror.thick_names
    mirror.runner.programs["dmsetup"] = lambda _argv, _input: (0, "0 8 raid raid1 2 AD 8/8 idle 0 0 -\n", "")
    mirror.settle()
    assert mirror.thick_names == [trash]


def test_trash_waits_for_every_disk_of_the_group(tmp_path: Path) -> None:
    rig = Rig(tmp_path, disks={"/dev/sda": 50, "/dev/sdb": 50})
    full_of_data(rig)
    rig.delete()
    (trash,) = rig.thick_names
    rig.lvm.gone.add("/dev/sdb")
    rig.settle()
    assert rig.thick_names == [trash]
    rig.lvm.gone.clear()
    rig.start()
    rig.settle()
    assert rig.thick_names == [] and rig.lvm.dirty == []


# -- disks that hang ---------------------------------------------------------------------------------------------------


def test_a_step_that_hangs_holds_up_neither_marks_nor_requests_nor_the_end_of_others(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm_trash, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(lvm_trash, "_HANGS_SECONDS", 0.0)
    rig.start(seconds=0.2)
    for name in ("a", "b"):
        full_of_data(rig, name)
        rig.delete(name)
    stuck = rig.thick_names[0]
    go_on = threading.Event()
    real = wipe.wipe_step

    def wipe_step(path: Path, *, start: int, size_bytes: int, seconds: float, boundary: Boundary) -> int:
        if path.name == stuck:
            assert go_on.wait(30)
        return real(path, start=start, size_bytes=size_bytes, seconds=seconds, boundary=boundary)

    monkeypatch.setattr(lvm_trash, "wipe_step", wipe_step)
    volume = rig.create("c")
    rig.backend.mark_used(volume)
    began = time.monotonic()
    rig.settle()
    assert time.monotonic() - began < 10
    assert rig.thick_names == [stuck, volume.volume_id]
    assert "snode.blank" not in rig.lvm.lvs[volume.volume_id].tags
    assert any("hangs" in text for text in rig.backend.warnings(soon()))
    rig.create("d")
    go_on.set()
    assert rig.backend._trash._zeroing[stuck].ended(wait_seconds=20.0)
    rig.settle()
    assert stuck not in rig.thick_names and rig.lvm.dirty == []
    assert rig.backend.warnings(soon()) == []


def test_foreign_volumes_with_such_a_name_are_not_ours_to_wipe(rig: Rig) -> None:
    name = lvm_trash.new_name()
    rig.lvm.add(name, extents=2)
    rig.lvm.device(name).write_bytes(b"precious" * 1000)
    rig.settle()
    assert rig.lvm.device(name).read_bytes().startswith(b"precious")


def test_background_does_not_wait_behind_requests(rig: Rig) -> None:
    rig.create()
    with rig.backend._group.lock.hold(soon()):
        rig.backend.tend(soon())


def test_group_gone_in_the_background_is_an_error_for_the_log(rig: Rig) -> None:
    rig.lvm.exists = False
    with pytest.raises(DriverError):
        rig.backend.tend(soon())


# -- the writer of zeros, on a real loop device and on files -----------------------------------------------------------


def test_wipe_step_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xaa" * (20 * MIB + 512))
    done = wipe.wipe_step(path, start=0, size_bytes=20 * MIB + 512, seconds=0.0)
    assert done == 8 * MIB
    with pytest.raises(DataLoss):
        wipe.check_zero(path, size_bytes=20 * MIB + 512)
    assert wipe.wipe_step(path, start=done, size_bytes=20 * MIB + 512, seconds=60.0) == 20 * MIB + 512
    wipe.check_zero(path, size_bytes=20 * MIB + 512)
    assert path.stat().st_size == 20 * MIB + 512


def test_zero_ends_of_small_and_large(tmp_path: Path) -> None:
    for size in (MIB, 5 * MIB, 20 * MIB):
        path = tmp_path / str(size)
        path.write_bytes(b"\xaa" * size)
        wipe.zero_ends(path, size_bytes=size)
        data = path.read_bytes()
        ends = min(4 * MIB, size)
        assert not data[:ends].strip(b"\0") and not data[-ends:].strip(b"\0")
        assert data[ends:-ends] == b"\xaa" * max(0, size - 2 * ends)


def test_volume_ids_never_look_like_trash() -> None:
    assert not volume_id_of("x").startswith("trash-")
