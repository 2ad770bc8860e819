"""Room: thick layouts over disks, thin pools with watermarks."""

from pathlib import Path

import pytest

from csi.backends.lvm_thick import Thick
from csi.backends.lvm_thin import Thin
from csi.errors import Invalid, NoSpace, Unavailable
from tests.unit.backends.rig import MIB, Rig, soon


def disks(*sizes: int) -> dict[str, int]:
    return {f"/dev/sd{chr(97 + number)}": size for number, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("space", "sizes", "most"),
    [
        (Thick(), (100,), 100),
        (Thick(), (60, 40), 100),
        (Thick("striped"), (50, 50), 100),
        (Thick("striped", stripes=3), (50, 50, 10), 30),
        (Thick("raid1"), (50, 50), 49),
        (Thick("raid1"), (60, 20, 40), 59),
        (Thick("raid1", mirrors=2), (50, 50, 50), 49),
        # As measured with LVM 2.03, which takes from the fullest disks first and so leaves one that is of no use then.
        (Thick("raid1"), (50, 50, 50), 49),
        (Thick("raid1"), (10, 6, 3, 3), 9),
        (Thick("striped"), (10, 6, 3, 3), 20),
        (Thick("raid5"), (7, 6, 5, 4), 10),
        (Thick("raid5"), (12, 4, 4, 4), 6),
        (Thick("raid5"), (50, 50, 50), 98),
        (Thick("raid5", stripes=3), (50, 50, 50, 50), 147),
        (Thick("raid6"), (50, 50, 50, 50, 50), 147),
        (Thick("raid10"), (50, 50, 50, 50), 98),
    ],
)
def test_the_largest_volume_fits_and_one_unit_more_does_not(
    tmp_path: Path, space: Thick, sizes: tuple[int, ...], most: int
) -> None:
    rig = Rig(tmp_path, space=space, disks=disks(*sizes))
    capacity = rig.backend.capacity(soon())
    assert (capacity.available_bytes, capacity.maximum_volume_bytes) == (most * MIB, most * MIB)
    with pytest.raises(NoSpace, match=r"bytes\).*free on \d disks"):
        rig.create("more", size_bytes=most * MIB + 1)
    assert rig.runner.count("lvcreate") == 0, "refused before LVM is asked"
    assert rig.create("all", size_bytes=most * MIB).size_bytes == most * MIB
    assert rig.start().capacity(soon()).available_bytes == 0
    assert rig.backend.problems(soon()) == []


def test_one_extent_around_the_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path, disks=disks(10))
    rig.create("a", size_bytes=9 * MIB)
    with pytest.raises(NoSpace):
        rig.create("b", size_bytes=MIB + 1)
    rig.create("b", size_bytes=MIB)
    with pytest.raises(NoSpace, match=r"1 MiB \(1048576 bytes\) as linear"):
        rig.create("c", size_bytes=1)


def test_lvm_refuses_what_a_stale_report_allowed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, disks=disks(10))
    rig.backend.capacity(soon())
    rig.lvm.add("somebody", extents=8, taken={"/dev/sda": 8})
    with pytest.raises(NoSpace, match=r"2 MiB"):
        rig.create(size_bytes=5 * MIB)
    assert rig.records() == ["fast/creating/" + next(iter(rig.backend._marks._creating.names())) + ".json"]
    rig.settle()
    assert rig.records() == []


def test_room_that_came_back_is_seen(tmp_path: Path) -> None:
    rig = Rig(tmp_path, disks=disks(10))
    rig.create("a", size_bytes=9 * MIB)
    with pytest.raises(NoSpace):
        rig.create("b", size_bytes=5 * MIB)
    rig.delete("a")
    with pytest.raises(NoSpace):
        rig.create("b", size_bytes=5 * MIB)
    rig.settle()
    rig.create("b", size_bytes=5 * MIB)


def test_sizes_are_whole_stripes(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thick("raid5", stripes=3), disks=disks(50, 50, 50, 50))
    assert rig.backend.round_size(1) == 3 * MIB
    assert rig.backend.round_size(3 * MIB + 1) == 6 * MIB
    assert rig.create(size_bytes=10 * MIB).size_bytes == 12 * MIB


def test_too_few_disks_for_the_layout(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thick("raid6"), disks=disks(50, 50))
    (warning,) = rig.backend.warnings(soon())
    assert "needs 5 disks, it has 2" in warning
    assert rig.backend.problems(soon()) == []
    with pytest.raises(NoSpace):
        rig.create()


def test_layouts_that_do_not_exist() -> None:
    for layout, stripes, mirrors in (
        ("raid0", 0, 0), ("linear", 2, 0), ("striped", 1, 0), ("raid5", 1, 0), ("raid6", 2, 0), ("raid1", 2, 0),
        ("linear", 0, 1), ("raid5", 2, 1), ("raid1", 0, -1), ("raid10", -2, 0),
    ):  # fmt: skip
        with pytest.raises(Invalid):
            Thick(layout, stripes=stripes, mirrors=mirrors)


def test_raid_health(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thick("raid1"), disks=disks(50, 50))
    volume = rig.create()
    lv = rig.lvm.lvs[volume.volume_id]
    lv.sync = "43.70"
    assert "not in step yet (44 %)" in rig.backend.list_volumes(soon())[0].health
    lv.sync = "100.00"
    assert rig.backend.list_volumes(soon())[0].health == "ok"
    lv.health = "refresh needed"
    assert "lvchange --refresh" in rig.backend.list_volumes(soon())[0].health
    lv.health = "something new"
    assert "something new" in rig.backend.list_volumes(soon())[0].health


# -- thin ------------------------------------------------------------------------------------------------------------


def thin(tmp_path: Path, space: Thin | None = None) -> Rig:
    rig = Rig(tmp_path, space=space or Thin("tp"))
    rig.lvm.add("tp", extents=50, kind="thin-pool")
    return rig


def test_thin_promises_what_is_there(tmp_path: Path) -> None:
    rig = thin(tmp_path)
    assert rig.backend.capacity(soon()).available_bytes == 50 * MIB
    volume = rig.create(size_bytes=30 * MIB)
    assert rig.backend.capacity(soon()).available_bytes == 20 * MIB
    with pytest.raises(NoSpace, match=r"20 MiB .*can still be promised .*overcommit_ratio 1\)"):
        rig.create("two", size_bytes=21 * MIB)
    with pytest.raises(NoSpace):
        rig.backend.grow(volume, size_bytes=51 * MIB, deadline=soon())
    assert rig.backend.grow(volume, size_bytes=50 * MIB, deadline=soon()).size_bytes == 50 * MIB
    rig.delete()
    assert rig.thick_names == []
    assert rig.backend.capacity(soon()).available_bytes == 50 * MIB


def test_thin_overcommit(tmp_path: Path) -> None:
    rig = thin(tmp_path, Thin("tp", overcommit_ratio=2.5))
    rig.create(size_bytes=100 * MIB)
    assert rig.backend.capacity(soon()).available_bytes == 25 * MIB


@pytest.mark.parametrize(("field", "at"), [("data_percent", 90.0), ("metadata_percent", 70.0)])
def test_thin_watermarks(tmp_path: Path, field: str, at: float) -> None:
    rig = thin(tmp_path)
    volume = rig.create()
    setattr(rig.lvm.lvs["tp"], field, at)
    rig.start()
    with pytest.raises(NoSpace, match=r"% full, nothing new from .*lvextend"):
        rig.create("two")
    with pytest.raises(NoSpace):
        rig.backend.grow(volume, size_bytes=20 * MIB, deadline=soon())
    assert rig.backend.capacity(soon()).available_bytes == 0
    assert rig.backend.problems(soon()) == [], "what exists is served"
    assert "% full" in rig.backend.warnings(soon())[0]
    setattr(rig.lvm.lvs["tp"], field, at - 0.1)
    rig.create("two")


def test_thin_pool_that_is_not_active_is_activated_for_its_numbers(tmp_path: Path) -> None:
    rig = thin(tmp_path)
    rig.lvm.reboot()
    rig.start()
    assert rig.backend.capacity(soon()).available_bytes == 50 * MIB
    rig.lvm.reboot()
    rig.start()
    rig.create()
    assert rig.lvm.lvs["tp"].active


def test_thin_pool_that_shows_old_data_is_refused(tmp_path: Path) -> None:
    rig = thin(tmp_path)
    rig.lvm.lvs["tp"].zeroes = False
    (problem,) = rig.backend.problems(soon())
    assert "lvchange --zero=y vg0/tp" in problem
    with pytest.raises(Unavailable, match="does not zero"):
        rig.create()


def test_thin_pool_missing_or_not_one(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thin("tp"))
    (problem,) = rig.backend.problems(soon())
    assert "does not exist -> make it with `lvcreate --type=thin-pool" in problem
    with pytest.raises(Unavailable):
        rig.create()
    rig.lvm.add("tp", extents=5)
    (problem,) = rig.start().problems(soon())
    assert "is not a thin pool" in problem
    assert rig.backend.capacity(soon()).available_bytes == 0


@pytest.mark.parametrize("word", ["out_of_data", "metadata_read_only", "failed"])
def test_a_sick_thin_pool_makes_its_volumes_sick(tmp_path: Path, word: str) -> None:
    rig = thin(tmp_path)
    rig.create()
    rig.lvm.lvs["tp"].health = word
    assert "thin pool" in rig.backend.list_volumes(soon())[0].health
    (warning,) = rig.start().warnings(soon())
    assert "thin pool" in warning and rig.backend.problems(soon()) == []
    assert rig.backend.capacity(soon()).available_bytes == 0
    with pytest.raises(Unavailable):
        rig.create("two")
