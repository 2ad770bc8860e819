from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from csi.backends import lvm
from csi.backends.lvm import LvmBackend
from csi.backends.lvm_thick import Thick
from csi.backends.lvm_thin import Thin
from csi.errors import (
    Busy,
    CommandFailed,
    Conflict,
    DataLoss,
    DriverError,
    InUse,
    Invalid,
    NoSpace,
    NotFound,
    Unavailable,
)
from csi.model import Volume, volume_id_of
from tests.fakes.crash import Crash, CrashAt
from tests.fakes.lvm import FakeVg
from tests.fakes.runner import FakeRunner
from tests.unit.backends.rig import EXT4, MIB, Rig, soon

LONGEST_NAME = "ü" * 64  # 128 bytes of UTF-8


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


# -- one volume, from its creation on --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pvc-1", LONGEST_NAME, "@-=,/ \0 tab\t \U0001f600", "-" * 128])
def test_create_makes_one_labelled_volume(rig: Rig, name: str) -> None:
    parameters = {"pool": "fast", "fsType": "xfs", "note": "a,b=c ü"}
    volume = rig.create(name, size_bytes=4 * MIB, parameters=parameters)
    assert volume == Volume(
        volume_id=volume_id_of(name),
        name=name,
        pool="fast",
        size_bytes=4 * MIB,
        device=rig.lvm.device(volume_id_of(name)),
        blank=True,
        parameters=parameters,
    )
    rig.start()
    assert rig.backend.find(volume.volume_id, soon()) == volume
    assert rig.backend.list_volumes(soon()) == [volume]
    assert rig.records() == []


def test_create_costs_one_command_and_publish_none(rig: Rig) -> None:
    rig.backend.tend(soon())  # the background has read the group before
    before = len(rig.runner.calls)
    volume = rig.create()
    assert [call[0] for call in rig.runner.calls[before:]] == ["lvcreate"]
    before = len(rig.runner.calls)
    found = rig.backend.find(volume.volume_id, soon())
    assert found is not None
    assert rig.backend.open_for_export(found, soon()) == volume
    rig.backend.mark_used(volume)
    assert rig.runner.calls[before:] == []


def test_create_costs_one_command_at_every_moment_of_service(rig: Rig) -> None:
    """The background looks in every 2 seconds, or late, behind a wipe; two minutes of it."""
    for number, pause in enumerate([2.0] * 30 + [2.0, 10.0] * 5):
        rig.backend.tend(soon())
        rig.backend._group._read_at -= pause
        before = len(rig.runner.calls)
        rig.create(f"n{number}", size_bytes=MIB)
        assert [call[0] for call in rig.runner.calls[before:]] == ["lvcreate"], number


def test_an_old_report_refuses_nothing(rig: Rig) -> None:
    volume = rig.create("full", size_bytes=100 * MIB)
    with pytest.raises(NoSpace):
        rig.create("two", size_bytes=MIB)
    del rig.lvm.lvs[volume.volume_id]
    rig.create("two", size_bytes=MIB)


def test_every_command_sees_our_disks_only(rig: Rig) -> None:
    rig.create()
    rig.delete()
    rig.settle()
    for call in rig.runner.calls:
        config = next(word for word in call if word.startswith("--config="))
        if call[0] != "pvs":  # the search itself; the fake checks that the others reject the rest
            assert '"a|^/dev/sda$|","r|.*|"' in config


def test_create_again_gives_the_same_volume(rig: Rig) -> None:
    first = rig.create()
    assert rig.create() == first
    again = rig.backend.create(
        first.volume_id, name="one", size_bytes=first.size_bytes, parameters=first.parameters, deadline=soon()
    )
    assert again == first
    assert rig.thick_names == [first.volume_id]


def test_create_refuses_what_is_not_an_id(rig: Rig) -> None:
    for volume_id in ("../x", "vg0/x", "-x", "v-short", "v-" + "a" * 27, ""):
        with pytest.raises(ValueError, match="not a volume id"):
            rig.backend.create(volume_id, name="x", size_bytes=MIB, parameters={}, deadline=soon())
        assert rig.backend.find(volume_id, soon()) is None


def test_create_refuses_parameters_that_no_tag_holds(rig: Rig) -> None:
    with pytest.raises(Invalid, match=r"parameters: \d+ characters as an LVM tag, at most 1024"):
        rig.create(parameters={"pool": "fast", "x": "y" * 800})
    assert rig.thick_names == []


def test_create_leaves_a_foreign_volume_of_its_name_alone(rig: Rig) -> None:
    volume_id = volume_id_of("one")
    rig.lvm.add(volume_id, extents=1, active=False)
    assert rig.backend.find(volume_id, soon()) is None
    with pytest.raises(Conflict, match="not of pool fast"):
        rig.backend.create(volume_id, name="one", size_bytes=MIB, parameters={}, deadline=soon())
    assert rig.backend.list_volumes(soon()) == []


def test_a_name_that_another_pool_of_the_group_gave_up_is_free(rig: Rig) -> None:
    fast, slow = rig.backend, rig.start(pool="slow")
    rig.backend = fast
    volume = rig.create()
    slow.list_volumes(soon())  # it remembers what it sees
    rig.delete()
    parameters = {"pool": "slow"}
    again = slow.create(volume.volume_id, name="one", size_bytes=MIB, parameters=parameters, deadline=soon())
    assert (again.volume_id, again.pool) == (volume.volume_id, "slow")


def test_create_never_touches_a_volume_that_appeared_meanwhile(rig: Rig) -> None:
    """Another process made it after our report; its data must not be taken for leftovers."""
    rig.backend.round_size(1)
    other = Rig(rig.folder / "other")
    other.lvm = rig.lvm
    other.runner.programs = rig.lvm.programs
    other.nodes = rig.nodes
    other.start()
    volume = other.create()
    rig.stage_fs(volume)
    with pytest.raises(Busy, match="appeared"):
        rig.backend.create(volume.volume_id, name="one", size_bytes=4 * MIB, parameters={}, deadline=soon())
    found = rig.backend.find(volume.volume_id, soon())
    assert found is not None
    opened = rig.backend.open_for_export(found, soon())
    assert not opened.blank
    assert volume.device.read_bytes()[1024:2048] == bytes(EXT4)


# -- killed and failing commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("midway", [False, True])
def test_killed_at_lvcreate_then_retry(rig: Rig, after: bool, midway: bool) -> None:
    rig.lvm.stale = bytes(1024) + bytes(EXT4)  # an old filesystem on the extents
    if midway:
        rig.lvm.midway.add("lvcreate")
    rig.runner.fail("lvcreate", after=after, reply=None)
    with pytest.raises(Crash):
        rig.create()
    rig.lvm.midway.clear()
    rig.start()
    volume = rig.create()
    opened = rig.backend.open_for_export(volume, soon())
    assert opened.blank, "nobody was ever given it, so what is on it is not its data"
    assert rig.thick_names == [volume.volume_id]
    assert rig.records() == []


@pytest.mark.parametrize("reply", [(5, "", "  Something new.\n"), (137, "", "")])
@pytest.mark.parametrize("after", [False, True])
def test_lvcreate_fails(rig: Rig, after: bool, reply: tuple[int, str, str]) -> None:
    rig.runner.fail("lvcreate", after=after, reply=reply)
    if after:
        volume = rig.create()  # it is there, so it is a success
        assert rig.backend.open_for_export(volume, soon()).blank
    else:
        with pytest.raises(CommandFailed, match="lvcreate"):
            rig.create()
        rig.create()
    assert rig.thick_names == [volume_id_of("one")]


def test_lvcreate_stopped_midway_in_a_living_driver(rig: Rig) -> None:
    rig.lvm.stale = bytes(1024) + bytes(EXT4)
    rig.lvm.midway.add("lvcreate")
    volume = rig.create()
    assert rig.backend.open_for_export(volume, soon()).blank
    assert rig.records() == []


@pytest.mark.parametrize("living", [False, True])
def test_raid_volume_of_a_killed_lvcreate_is_made_anew(tmp_path: Path, living: bool) -> None:
    rig = Rig(tmp_path, space=Thick("raid1"), disks={"/dev/sda": 50, "/dev/sdb": 50})
    rig.lvm.midway.add("lvcreate")
    if living:
        with pytest.raises(CommandFailed, match="Refusing activation"):
            rig.create()
    else:
        rig.runner.fail("lvcreate", after=True, reply=None)
        with pytest.raises(Crash):
            rig.create()
        rig.start()
    rig.lvm.midway.clear()
    assert rig.backend.find(volume_id_of("one"), soon()) is None
    assert rig.backend.list_volumes(soon()) == []
    volume = rig.create()
    assert rig.backend.open_for_export(volume, soon()).blank
    assert rig.thick_names == [volume.volume_id] and rig.records() == []


@pytest.mark.parametrize("midway", [False, True])
def test_what_nobody_asks_for_again_is_removed(rig: Rig, midway: bool) -> None:
    if midway:
        rig.lvm.midway.add("lvcreate")
    rig.runner.fail("lvcreate", after=True, reply=None)
    with pytest.raises(Crash):
        rig.create()
    rig.start()
    rig.delete()
    rig.settle()
    assert rig.thick_names == [] and rig.records() == []


def test_an_old_note_does_not_harm_a_volume_in_use(rig: Rig) -> None:
    """The state folder came back from a backup; the volume has been used since."""
    volume = rig.create()
    made = next(tag for tag in rig.lvm.lvs[volume.volume_id].tags if tag.startswith("snode.made="))
    rig.backend.mark_used(volume)
    note = rig.folder / "state" / "fast" / "creating" / f"{volume.volume_id}.json"
    note.write_text(f'{{"format": 1, "nonce": "{made.partition("=")[2]}"}}')
    rig.start()
    rig.settle()
    assert rig.backend.find(volume.volume_id, soon()) is not None
    assert rig.records() == []


def test_success_that_changed_nothing_is_a_failure(rig: Rig) -> None:
    rig.runner.fail("lvcreate", reply=(0, "created", ""))
    with pytest.raises(Unavailable, match="changed nothing"):
        rig.create()


def test_killed_at_each_record_of_a_creation(rig: Rig) -> None:
    for step in range(1, 40):
        rig.start(boundary=CrashAt(step))
        try:
            rig.create()
        except Crash:
            rig.start()
            volume = rig.create()
            assert rig.backend.open_for_export(volume, soon()).blank
            assert rig.thick_names == [volume.volume_id]
            rig.delete()
            rig.settle()
            assert rig.records() == []
        else:
            assert step > 5
            return
    pytest.fail("the creation has no end")


def test_a_new_volume_is_not_haunted_by_the_marks_of_the_old_one(rig: Rig) -> None:
    """Crash between the removal of the volume and of its records."""
    volume = rig.create()
    rig.backend.mark_used(volume)
    rig.runner.fail("lvrename", after=True, reply=None)
    with pytest.raises(Crash):
        rig.delete()
    rig.start()
    assert rig.backend.open_for_export(rig.create(), soon()).blank


# -- blank -----------------------------------------------------------------------------------------------------------


def test_used_is_for_good(rig: Rig) -> None:
    volume = rig.create()
    rig.backend.mark_used(volume)
    rig.start()
    found = rig.backend.find(volume.volume_id, soon())
    assert found is not None and not found.blank
    assert not rig.backend.open_for_export(volume, soon()).blank
    assert "snode.blank" in rig.lvm.lvs[volume.volume_id].tags
    rig.settle()
    assert "snode.blank" not in rig.lvm.lvs[volume.volume_id].tags
    assert rig.records() == []
    assert rig.runner.count("--deltag=snode.blank") == 1
    assert not rig.backend.open_for_export(volume, soon()).blank


def test_mark_stays_when_the_tag_cannot_be_written(rig: Rig) -> None:
    volume = rig.create()
    rig.backend.mark_used(volume)
    rig.runner.fail("--deltag=snode.blank", reply=(5, "", "  Failed to write VG vg0.\n"))
    rig.settle()
    assert rig.runner.count("--deltag=snode.blank") == 1, "not again at once"
    rig.start()
    assert not rig.backend.open_for_export(volume, soon()).blank
    rig.settle()
    assert rig.records() == []


def test_a_filesystem_makes_it_not_blank(rig: Rig) -> None:
    volume = rig.create()
    rig.stage_fs(volume)
    assert not rig.backend.open_for_export(volume, soon()).blank
    with volume.device.open("r+b") as file:
        file.write(bytes(4096))
    assert rig.backend.open_for_export(volume, soon()).blank, "only mark_used is for good, and the caller does that"


def test_unreadable_is_not_blank(rig: Rig) -> None:
    volume = rig.create()
    with volume.device.open("r+b") as file:
        file.truncate(0)
    with pytest.raises(Unavailable, match="has no size"):
        rig.backend.open_for_export(volume, soon())


# -- the device ------------------------------------------------------------------------------------------------------


def test_open_activates_after_a_reboot(rig: Rig) -> None:
    volume = rig.create()
    rig.lvm.reboot()
    rig.start()
    assert rig.backend.open_for_export(volume, soon()) == volume
    assert rig.runner.count("lvchange", "--activate=y") == 1


def test_open_after_a_killed_activation_of_a_raid_volume(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thick("raid1"), disks={"/dev/sda": 50, "/dev/sdb": 50})
    volume = rig.create()
    rig.lvm.reboot()
    stem = f"vg0-{volume.volume_id.replace('-', '--')}"
    rig.lvm.lvs[volume.volume_id].legs = [f"{stem}_rimage_0", f"{stem}_rmeta_0"]
    rig.start()
    assert rig.backend.open_for_export(volume, soon()) == volume


def test_open_refuses_another_device(rig: Rig) -> None:
    volume = rig.create()
    rig.nodes.wrong[volume.volume_id] = "LVM-other"
    with pytest.raises(DataLoss, match="not volume"):
        rig.backend.open_for_export(volume, soon())


def test_open_of_a_vanished_volume(rig: Rig) -> None:
    volume = rig.create()
    del rig.lvm.lvs[volume.volume_id]
    with pytest.raises(NotFound):
        rig.backend.open_for_export(volume, soon())


def test_open_sees_a_size_that_an_administrator_changed(rig: Rig) -> None:
    volume = rig.create()
    rig.lvm.lvs[volume.volume_id].extents = 8
    rig.lvm.activate(volume.volume_id)
    assert rig.backend.open_for_export(volume, soon()).size_bytes == 8 * MIB


def test_a_device_that_hangs_does_not_hold_the_pool(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the look at the end of a creation nor in that before an export."""
    other = rig.create("other")
    locked = rig.backend._group.lock
    looks: list[Path] = []

    def look(path: Path) -> str:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(try_lock).result()
        looks.append(path)
        rig.backend.tend(soon())
        return ""

    def try_lock() -> bool:
        with locked.hold(soon(1)):
            return True

    monkeypatch.setattr(lvm, "glance", look)
    monkeypatch.setattr(lvm, "holds_data", lambda path: bool(look(path)))
    volume = rig.create()
    rig.backend.open_for_export(other, soon())
    assert looks == [volume.device, other.device]
    assert rig.thick_names == sorted([volume.volume_id, other.volume_id]), "the background left the new one alone"
    assert rig.records() == []


# -- grow ------------------------------------------------------------------------------------------------------------


def test_grow(rig: Rig) -> None:
    volume = rig.create()
    grown = rig.backend.grow(volume, size_bytes=9 * MIB, deadline=soon())
    assert grown.size_bytes == 9 * MIB
    assert rig.backend.find(volume.volume_id, soon()) == grown
    assert rig.backend.grow(volume, size_bytes=9 * MIB, deadline=soon()) == grown
    assert rig.backend.grow(volume, size_bytes=4 * MIB, deadline=soon()) == grown, "never smaller"
    assert rig.runner.count("lvextend") == 1
    with pytest.raises(NoSpace, match=r"1000 MiB|991 MiB"):
        rig.backend.grow(volume, size_bytes=1000 * MIB, deadline=soon())


@pytest.mark.parametrize("midway", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_lvextend_then_retry(rig: Rig, after: bool, midway: bool) -> None:
    volume = rig.create()
    if midway:
        rig.lvm.midway.add("lvextend")
    rig.runner.fail("lvextend", after=after, reply=None)
    with pytest.raises(Crash):
        rig.backend.grow(volume, size_bytes=9 * MIB, deadline=soon())
    rig.lvm.midway.clear()
    rig.start()
    assert rig.backend.grow(volume, size_bytes=9 * MIB, deadline=soon()).size_bytes == 9 * MIB
    assert rig.backend.open_for_export(volume, soon()).size_bytes == 9 * MIB
    assert rig.lvm.lvs[volume.volume_id].table_extents == 9
    assert not rig.lvm.lvs[volume.volume_id].suspended


def test_open_resumes_what_a_killed_extend_left_suspended(rig: Rig) -> None:
    volume = rig.create()
    rig.lvm.midway.add("lvextend")
    rig.runner.fail("lvextend", after=True, reply=None)
    with pytest.raises(Crash):
        rig.backend.grow(volume, size_bytes=9 * MIB, deadline=soon())
    rig.start()
    assert rig.backend.open_for_export(volume, soon()).size_bytes == 9 * MIB
    assert not rig.lvm.lvs[volume.volume_id].suspended


# -- the group -------------------------------------------------------------------------------------------------------


def test_foreign_and_other_pools_volumes_are_not_listed(rig: Rig) -> None:
    mine = rig.create()
    rig.lvm.add("root", extents=1)
    rig.lvm.add("v-not_an_id", extents=1, tags=["snode.format=1", "snode.pool=fast"])
    rig.lvm.add(volume_id_of("no tags"), extents=1)
    rig.lvm.add(volume_id_of("other"), extents=1, tags=["snode.format=1", "snode.pool=slow", "snode.name=eA=="])
    rig.lvm.add(volume_id_of("bad"), extents=1, tags=["snode.format=x", "snode.pool=fast"])
    assert rig.backend.list_volumes(soon()) == [mine]


def test_damaged_tags_are_a_health_fact_and_newer_ones_are_refused(rig: Rig) -> None:
    damaged = volume_id_of("damaged")
    rig.lvm.add(damaged, extents=1, tags=["snode.format=1", "snode.pool=fast", "snode.name=***"])
    found = rig.backend.find(damaged, soon())
    assert found is not None and "damaged" in found.health and not found.blank
    newer = volume_id_of("newer")
    rig.lvm.add(newer, extents=1, tags=["snode.format=2", "snode.pool=fast", "snode.name=eA=="])
    assert [volume.volume_id for volume in rig.backend.list_volumes(soon())] == [damaged]
    with pytest.raises(DataLoss, match="upgrade"):
        rig.backend.find(newer, soon())


def test_two_pools_in_one_group(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    fast = rig.start(pool="fast")
    slow = rig.start(pool="slow")
    volume_id = volume_id_of("one")
    volume = slow.create(volume_id, name="one", size_bytes=MIB, parameters={}, deadline=soon())
    assert slow.list_volumes(soon()) == [volume]
    assert fast.list_volumes(soon()) == []
    fast.delete(volume, soon())
    assert slow.list_volumes(soon()) == [volume]


def test_missing_group(rig: Rig) -> None:
    rig.lvm.exists = False
    (problem,) = rig.backend.problems(soon())
    assert "vg0: not found" in problem and "vgcreate" in problem
    with pytest.raises(Unavailable, match="vgcreate"):
        rig.backend.find(volume_id_of("x"), soon())
    rig.lvm.exists = True
    assert rig.backend.problems(soon()) == []


def test_missing_tools(rig: Rig) -> None:
    rig.runner.programs.clear()
    (problem,) = rig.backend.problems(soon())
    assert "program not found" in problem


def test_two_groups_of_one_name(rig: Rig) -> None:
    rig.lvm.others.append(FakeVg("vg0", "Guest-0", ("/dev/sdz",)))
    (problem,) = rig.backend.problems(soon())
    assert "2 groups have this name" in problem and "vgrename" in problem


def test_a_guests_group_of_our_name_changes_nothing_later(rig: Rig) -> None:
    volume = rig.create()
    rig.lvm.others.append(FakeVg("vg0", "Guest-0", ("/dev/sdz",)))
    rig.start()
    assert rig.backend.list_volumes(soon()) == [volume]


def test_another_group_in_the_place_of_ours_is_refused(rig: Rig) -> None:
    rig.create()
    rig.lvm.vg_uuid = "Other0-0000-0000-0000-0000-0000-000002"
    rig.start()
    (problem,) = rig.backend.problems(soon())
    assert "this pool was made on" in problem
    with pytest.raises(Unavailable):
        rig.create("two")


def test_a_disk_that_was_added_is_found(rig: Rig) -> None:
    rig.create()
    rig.lvm.disks["/dev/sdb"] = 100
    assert rig.backend.problems(soon()) == []
    rig.backend.list_volumes(soon())
    volume = rig.create("big", size_bytes=150 * MIB)
    assert volume.size_bytes == 150 * MIB


def test_a_missing_disk_is_a_problem(tmp_path: Path) -> None:
    rig = Rig(tmp_path, disks={"/dev/sda": 50, "/dev/sdb": 50})
    volume = rig.create()
    rig.lvm.gone.add("/dev/sdb")
    rig.lvm.lvs[volume.volume_id].health = "partial"
    assert "disk of the volume is missing" in rig.backend.list_volumes(soon())[0].health
    assert rig.backend.problems(soon()) == [], "what is there is served"
    warning, of_volume = rig.backend.warnings(soon())
    assert of_volume.startswith(f"pool fast: volume {volume.volume_id}: a disk of the volume is missing -> bring")
    assert "1 of its disks are missing" in warning and "vgreduce" in warning
    assert rig.backend.capacity(soon()).available_bytes == 0
    with pytest.raises(DriverError):
        rig.create("two", size_bytes=5 * MIB)


def test_health_is_logged_once_for_each_change(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thick("raid1"), disks={"/dev/sda": 50, "/dev/sdb": 50})
    volume = rig.create()
    lv = rig.lvm.lvs[volume.volume_id]

    def said() -> list[tuple[str, str]]:
        with capture_logs() as lines:
            for _ in range(3):
                rig.backend._group._read_at -= 20.0
                rig.backend.tend(soon())
        return [(line["event"], line["problem"].partition(" -> ")[0]) for line in lines]

    assert said() == []
    lv.sync = "10.00"
    (syncing,) = said()
    assert syncing[0] == "needs care" and f"volume {volume.volume_id}: the RAID copies are not in step" in syncing[1]
    lv.sync = "60.00"
    assert said() == [], "a figure that moves is no change"
    lv.sync, lv.health = "100.00", "refresh needed"
    assert [event for event, _ in said()] == ["needs care", "over"]
    lv.health = ""
    assert said() == [("over", f"pool fast: volume {volume.volume_id}: a disk of the volume had errors")]


def test_one_sentence_for_a_trouble_of_many(rig: Rig) -> None:
    for number in range(6):
        rig.lvm.lvs[rig.create(f"n{number}", size_bytes=MIB).volume_id].health = "partial"
    (warning,) = rig.start().warnings(soon())
    assert " and 2 more: a disk of the volume is missing" in warning


def test_full_metadata_area(rig: Rig) -> None:
    rig.lvm.mda_free = rig.lvm.mda_size // 10 - 1
    with pytest.raises(NoSpace, match=r"metadata area .*`vgcreate --metadatasize=64m`"):
        rig.create()
    assert rig.backend.capacity(soon()).available_bytes == 0
    (warning,) = rig.backend.warnings(soon())
    assert "metadata area" in warning
    assert rig.backend.problems(soon()) == [], "volumes must stay deletable"
    assert rig.runner.count("lvcreate") == 0


def test_bad_names_never_reach_lvm(tmp_path: Path) -> None:
    for vg in ("", ".", "..", "-x", "a/b", "a b", "x" * 41, "vg\n"):
        with pytest.raises(Invalid):
            LvmBackend("fast", vg=vg, space=Thick(), state=tmp_path, runner=FakeRunner({}))
    for device in ("sda", "/dev/sd a", '/dev/sd"a', "/dev/sd|a", "/etc/passwd", "/dev/sd$"):
        with pytest.raises(Invalid):
            LvmBackend("fast", vg="v", space=Thick(), state=tmp_path, runner=FakeRunner({}), devices=[Path(device)])


def test_given_disks_need_no_search(tmp_path: Path) -> None:
    rig = Rig(tmp_path, disks={"/dev/disk/by-id/wwn-0x5.1+a": 50})
    backend = LvmBackend(
        "fast",
        vg="vg0",
        space=Thick(),
        state=tmp_path / "s",
        runner=rig.runner,
        devices=[Path("/dev/disk/by-id/wwn-0x5.1+a")],
        nodes=rig.nodes,
    )
    assert backend.list_volumes(soon()) == []
    assert rig.runner.count("pvs") == 0


def test_in_use_is_said(rig: Rig) -> None:
    volume = rig.create()
    rig.lvm.lvs[volume.volume_id].is_open = True
    with pytest.raises(InUse, match="still open on this machine"):
        rig.backend.delete(volume, soon(1))
    assert rig.thick_names == [volume.volume_id]


def test_thin_volumes_after_a_killed_activation_of_their_pool(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thin("tp"))
    pool = rig.lvm.add("tp", extents=50, kind="thin-pool")
    volume = rig.create()
    for act in (
        lambda: rig.backend.open_for_export(volume, soon()),
        lambda: rig.backend.capacity(soon()),
        lambda: rig.create("two"),
        lambda: rig.delete(),
    ):
        rig.lvm.reboot()
        pool.legs = ["vg0-tp_tdata", "vg0-tp_tmeta"]
        rig.start()
        act()
        assert pool.legs == []
    assert len(rig.thick_names) == 1


def test_parts_in_use_are_not_the_reason(rig: Rig) -> None:
    volume = rig.create()
    rig.lvm.lvs[volume.volume_id].legs = [f"vg0-{volume.volume_id.replace('-', '--')}_rimage_0"]
    rig.runner.fail("dmsetup", "remove", reply=(1, "", "Device or resource busy"))
    rig.runner.fail("lvremove", reply=(5, "", "  Something else.\n"))
    with pytest.raises(CommandFailed, match="Something else"):
        report = rig.backend._group.reread(soon())
        rig.backend._group.remove(report, report.lvs[volume.volume_id], soon())
    assert rig.thick_names == [volume.volume_id]


def test_which_devices_are_parts_of_a_volume(tmp_path: Path) -> None:
    from csi.backends.lvm_cli import Lvm
    from csi.backends.lvm_report import Report
    from csi.records import RecordStore

    answer = """
        vg--0-v--a_rimage_0:LVM-Uabc
        vg--0-v--a_rmeta_11:LVM-Udef
        vg--0-v--a:LVM-Ughi
        vg--0-v--ab_rimage_0:LVM-Ujkl
        vg--0-v--a_rimage_1:LVM-other
        vg--0-v--a_rimage_x:LVM-Umno
        vg--0-tp_tdata_rimage_0:LVM-Uvwx
        vg--0-tp_tdata:LVM-Upqr-tdata
        vg--0-tp-tpool:LVM-Ustu-tpool
        vg--0-tp:LVM-Uyz
        No devices found
    """
    runner = FakeRunner({"dmsetup": lambda argv, _input: (0, answer, "")})
    lvm = Lvm("vg-0", runner=runner, state=RecordStore(tmp_path))
    report = Report("vg-0", "U", 1, 1, 1, 0)
    assert lvm.parts(report, ["v-a"], soon()) == ["vg--0-v--a_rimage_0", "vg--0-v--a_rmeta_11"]
    assert lvm.parts(report, ["tp"], soon()) == ["vg--0-tp-tpool", "vg--0-tp_tdata", "vg--0-tp_tdata_rimage_0"]


def test_thin_delete_is_one_removal(tmp_path: Path) -> None:
    rig = Rig(tmp_path, space=Thin("tp"))
    rig.lvm.add("tp", extents=50, kind="thin-pool")
    volume = rig.create()
    rig.backend.mark_used(volume)
    rig.runner.fail("lvremove", after=True, reply=None)
    with pytest.raises(Crash):
        rig.delete()
    rig.start()
    rig.delete()
    rig.settle()
    assert rig.thick_names == []
    assert rig.records() == []
    assert rig.runner.count("lvrename") == 0
