import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from csi.deadline import Deadline
from csi.errors import DataLoss, DriverError, InUse, Invalid, NotFound, Timeout, Unavailable
from csi.model import Chap, IscsiPath
from tests.fakes.crash import Crash, CrashAt
from tests.fakes.iscsi import CHAP, FakeIscsi

V = "v-" + "a" * 26
OTHER = "v-" + "b" * 26
NEW = "00000000000000ff"


def test_connect_gives_the_verified_device_and_a_private_record(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    device = node.connector().connect(attachment, deadline)
    assert (device.path, device.major_minor) == (node.dev / "sda", "8:16")
    assert (device.size_bytes, device.generation) == (1 << 30, attachment.generation)
    (record,) = node.database.glob("nodes/*/*/default")
    assert record.stat().st_mode & 0o777 == 0o600
    text = record.read_text()
    for line in (
        "node.startup = manual",
        "node.session.scan = manual",
        "node.conn[0].startup = manual",
        "node.session.timeo.replacement_timeout = 120",
        "node.conn[0].timeo.login_timeout = 10",
        "node.session.initial_login_retry_max = 3",
        "node.session.nr_sessions = 1",
        "node.session.auth.authmethod = CHAP",
    ):
        assert text.count(line + "\n") == 1
        assert len(re.findall(re.escape(line.partition(" = ")[0]) + " = ", text)) == 1


def test_secrets_are_in_no_command_line(node: FakeIscsi, deadline: Deadline) -> None:
    node.connector().connect(node.publish(V), deadline)
    node.connector().disconnect(V, deadline)
    assert not any("SENTINEL" in word for call in node.runner.calls for word in call)


def test_connect_repeated_adopts(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    connector = node.connector()
    first = connector.connect(attachment, deadline)
    assert connector.connect(attachment, deadline) == first == node.connector().find(V)
    assert len(node.sessions) == 1 and node.runner.count("--login") == 1


def test_parallel_connects_of_one_volume_make_one_session(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    with ThreadPoolExecutor(8) as pool:
        devices = set(pool.map(lambda _: connector.connect(attachment, deadline), range(8)))
    assert len(devices) == 1 and len(node.sessions) == 1


def test_disconnect_leaves_nothing_and_may_be_repeated(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    connector.connect(node.publish(OTHER), deadline)
    connector.disconnect(V, deadline)
    connector.disconnect(V, deadline)
    assert connector.find(V) is None and connector.find(OTHER) is not None
    connector.disconnect(OTHER, deadline)
    assert node.leftovers() == []
    flushed = [call for call in node.runner.calls if call[0] == "blockdev"]
    assert [call[2] for call in flushed] == [str(node.dev / "sda"), str(node.dev / "sdb")]


def test_find_takes_whole_names_only(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    assert connector.find(V[:-1]) is None
    assert connector.find(V + "a") is None


@pytest.mark.parametrize("code", [4, 6, 8, 9, 11, 18, 20, 28, 29, 32, 33, 19])
def test_login_is_repeated_for_codes_that_may_pass(node: FakeIscsi, deadline: Deadline, code: int) -> None:
    node.runner.fail("--login", reply=(code, "", ""))
    assert node.connector().connect(node.publish(V), deadline)
    assert node.runner.count("--login") == 2


@pytest.mark.parametrize("code", [1, 3, 5, 7, 10, 12, 13, 14, 16, 22, 23, 24, 31, 99])
def test_login_stops_at_codes_that_stay(node: FakeIscsi, deadline: Deadline, code: int) -> None:
    node.runner.fail("--login", reply=(code, "", ""))
    with pytest.raises(DriverError, match=f"{V}.*{code}"):
        node.connector().connect(node.publish(V), deadline)
    assert node.runner.count("--login") == 1
    assert node.leftovers() == []


def test_login_that_finds_a_session_is_judged_by_sysfs(node: FakeIscsi, deadline: Deadline) -> None:
    node.runner.fail("--login", after=True, reply=(15, "", ""))
    assert node.connector().connect(node.publish(V), deadline)


def test_login_reported_but_not_in_sysfs(node: FakeIscsi) -> None:
    node.runner.fail("--login", reply=(0, "", ""))
    with pytest.raises(Unavailable, match="kernel shows none"):
        node.connector().connect(node.publish(V), Deadline.after(1))


def test_login_that_fails_after_its_effect_is_adopted_at_the_repetition(node: FakeIscsi, deadline: Deadline) -> None:
    node.runner.fail("--login", after=True, reply=(5, "", ""))
    attachment, connector = node.publish(V), node.connector()
    with pytest.raises(Unavailable):
        connector.connect(attachment, deadline)
    assert connector.connect(attachment, deadline)
    assert len(node.sessions) == 1


def test_refused_target_is_tried_a_few_times_and_leaves_nothing(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.targets.clear()
    with pytest.raises(Unavailable, match="published to this node"):
        node.connector().connect(attachment, deadline)
    assert node.runner.count("--login") == 5
    assert node.leftovers() == []


def test_wrong_secret_is_refused_and_not_told(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.targets[attachment.paths[0].target].chap = dataclasses.replace(CHAP, mutual_secret="another")
    with pytest.raises(Unavailable, match="CHAP failed") as raised:
        node.connector().connect(attachment, deadline)
    assert "SENTINEL" not in str(raised.value)
    assert node.leftovers() == []


def test_secret_cannot_add_settings(node: FakeIscsi, deadline: Deadline) -> None:
    chap = Chap(user="u", secret="SENTINEL\nnode.startup = automatic", mutual_user="m", mutual_secret="x")
    with pytest.raises(Invalid) as raised:
        node.connector().connect(dataclasses.replace(node.publish(V), chap=chap), deadline)
    assert "SENTINEL" not in str(raised.value)
    assert node.leftovers() == []


def test_silent_portal_is_told_before_any_login(node: FakeIscsi) -> None:
    attachment = node.publish(V)
    node.close()
    with pytest.raises(Unavailable, match="does not answer"):
        node.connector().connect(attachment, Deadline.after(1.5))
    assert node.runner.calls == [] and node.leftovers() == []


def test_second_portal_is_used_when_the_first_is_silent(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    path = attachment.paths[0]
    paths = (IscsiPath(path.target, "127.0.0.1:1", 1), path)
    assert node.connector().connect(dataclasses.replace(attachment, paths=paths), deadline)


def test_damaged_record_is_made_anew(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    record = node.database / "nodes" / attachment.paths[0].target / f"{node.portal.replace(':', ',')},1" / "default"
    record.parent.mkdir(parents=True)
    record.write_text("\n")
    assert node.connector().connect(attachment, deadline)
    assert "# END RECORD" in record.read_text()


@pytest.mark.parametrize("field", ["volume_id", "scsi_id", "paths", "lun"])
def test_context_of_another_volume_is_refused(node: FakeIscsi, deadline: Deadline, field: str) -> None:
    attachment = node.publish(V)
    changes: dict[str, dict[str, Any]] = {
        "volume_id": {"volume_id": OTHER},
        "scsi_id": {"scsi_id": ""},
        "paths": {"paths": ()},
        "lun": {"paths": (dataclasses.replace(attachment.paths[0], lun=0),)},
    }
    with pytest.raises(Invalid, match="publish context of volume"):
        node.connector().connect(dataclasses.replace(attachment, **changes[field]), deadline)
    assert node.runner.calls == []


# ------------------------------------------------------------------------------------------------ the right disk


def test_disk_that_appears_late(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.lun_of(attachment).after_scans = 2
    assert node.connector().connect(attachment, deadline).path == node.dev / "sda"


def test_disk_that_never_appears(node: FakeIscsi) -> None:
    attachment = node.publish(V)
    node.targets[attachment.paths[0].target].lun = None
    with pytest.raises(Unavailable, match="LUN 1 shows no disk"):
        node.connector().connect(attachment, Deadline.after(4))
    assert node.leftovers() == []


def test_unit_that_is_no_disk_is_forgotten_and_looked_for_again(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.lun_of(attachment).kind = "12"
    connector = node.connector()
    with pytest.raises(Unavailable):
        connector.connect(attachment, Deadline.after(4))
    node.lun_of(attachment).kind = "0"
    assert connector.connect(attachment, deadline)


def test_disk_without_its_node_is_not_used(node: FakeIscsi) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, Deadline.after(5))
    (node.dev / "sda").unlink()
    with pytest.raises(Unavailable, match="host's /dev"):
        connector.connect(attachment, Deadline.after(0.5))


def test_foreign_disk_is_refused_and_detached(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.lun_of(attachment).scsi_id = "6" + "1" * 31
    with pytest.raises(DataLoss, match=r"another disk.*naa.6111"):
        node.connector().connect(attachment, deadline)
    assert node.leftovers() == []


def test_lun_swapped_under_a_session_is_noticed(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, deadline)
    node.lun_of(attachment).scsi_id = "6" + "1" * 31
    with pytest.raises(DataLoss):
        connector.rescan(V, size_bytes=1, deadline=deadline)
    with pytest.raises(DataLoss):
        connector.connect(attachment, deadline)


def test_identity_is_asked_of_the_disk_not_of_the_cache(
    node: FakeIscsi, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "names", lambda _path: frozenset({"naa.6" + "2" * 31}))
    with pytest.raises(DataLoss):
        node.connector().connect(node.publish(V), deadline)


def test_size_may_be_larger_than_the_context_says_but_not_smaller(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    node.lun_of(attachment).size_bytes += 1 << 20
    assert connector.connect(attachment, deadline).size_bytes == attachment.size_bytes + (1 << 20)
    connector.disconnect(V, deadline)
    node.lun_of(attachment).size_bytes = attachment.size_bytes - 512
    with pytest.raises(DataLoss, match="bytes"):
        connector.connect(attachment, deadline)
    assert node.leftovers() == []


@pytest.mark.parametrize("readonly", [True, False])
def test_write_protection_must_be_as_published(node: FakeIscsi, deadline: Deadline, readonly: bool) -> None:
    attachment, connector = node.publish(V, readonly=readonly), node.connector()
    assert connector.connect(attachment, deadline)
    with pytest.raises(Unavailable, match="publish it again"):
        connector.connect(dataclasses.replace(attachment, readonly=not readonly), deadline)


def test_multipath_that_took_the_disk_is_named(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, deadline)
    _make_holder(node, "sda", name="dm-3", uuid="mpath-36001", label="mpatha")
    with pytest.raises(InUse, match=r"dm-3 \(mpatha\).*blacklist"):
        connector.connect(attachment, deadline)


def test_rescan_waits_for_the_new_size(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, deadline)
    with pytest.raises(Timeout, match="2147483648 bytes"):
        connector.rescan(V, size_bytes=2 << 30, deadline=Deadline.after(0.5))
    node.lun_of(attachment).size_bytes = 2 << 30
    assert connector.rescan(V, size_bytes=2 << 30, deadline=deadline).size_bytes == 2 << 30
    with pytest.raises(NotFound):
        connector.rescan(OTHER, size_bytes=1, deadline=deadline)


# ------------------------------------------------------------------------------------------- generations and users


def test_unused_session_of_an_older_generation_is_ended(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    device = connector.connect(node.publish(V, generation=NEW), deadline)
    assert device.generation == NEW and len(node.sessions) == 1
    assert len(list(node.database.glob("nodes/*"))) == 1


def test_used_session_of_an_older_generation_stops_the_new_one(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    device = connector.connect(node.publish(V), deadline)
    node.mount(device.path, device.major_minor, "/var/lib/x\\040y")
    with pytest.raises(InUse, match=r"older attachment.*mounted on /var/lib/x y"):
        connector.connect(node.publish(V, generation=NEW), deadline)
    assert len(node.sessions) == 1


def test_disconnect_ends_every_generation(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    attachment = node.publish(V, generation=NEW)
    node._make_session(attachment.paths[0].target)
    assert len(node.sessions) == 2
    connector.disconnect(V, deadline)
    assert node.leftovers() == []


def _make_holder(node: FakeIscsi, disk: str, *, name: str, uuid: str, label: str) -> None:
    (node.sysfs / "block" / disk / "holders" / name).touch()
    folder = node.sysfs / "block" / name / "dm"
    folder.mkdir(parents=True)
    (folder / "uuid").write_text(uuid + "\n")
    (folder / "name").write_text(label + "\n")


@pytest.mark.parametrize("user", ["mount", "btrfs", "block publish", "holder", "partition", "namespace"])
def test_disconnect_is_refused_while_somebody_uses_the_disk(node: FakeIscsi, deadline: Deadline, user: str) -> None:
    connector = node.connector()
    device = connector.connect(node.publish(V), deadline)
    words = "mounted on /mnt/x"
    if user == "mount":
        node.mount(device.path, device.major_minor)
    elif user == "btrfs":
        node.mount(device.path, "0:52")
    elif user == "block publish":
        with node.mountinfo.open("a") as file:
            file.write("41 20 0:5 /sda /mnt/x rw - devtmpfs udev rw\n")
    elif user == "holder":
        _make_holder(node, "sda", name="dm-0", uuid="LVM-x", label="vg-lv")
        words = r"held by dm-0 \(vg-lv\)"
    elif user == "partition":
        part = node.sysfs / "block" / "sda" / "sda1"
        part.mkdir()
        (part / "partition").write_text("1\n")
        (part / "dev").write_text("8:17\n")
        node.mount(Path("/dev/sda1"), "8:17")
    else:
        node.held_paths.add(device.path)
        words = "another mount namespace"
    with pytest.raises(InUse, match=words):
        connector.disconnect(V, deadline)
    assert connector.find(V) == device and node.runner.count("--logout") == 0


def test_mounts_of_others_do_not_matter(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    device = connector.connect(node.publish(V), deadline)
    node.mount(Path(f"{device.path}a"), f"{device.major_minor}0")
    with node.mountinfo.open("a") as file:
        file.write("41 20 0:5 /sdab /mnt/y rw - devtmpfs udev rw\ngarbage\n")
    connector.disconnect(V, deadline)
    assert node.leftovers() == []


# ---------------------------------------------------------------------------------------------------- dead sessions


def test_dead_session_can_be_removed(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    node.set_state("FREE", "transport-offline")
    connector.disconnect(V, deadline)
    assert node.leftovers() == [] and node.runner.count("blockdev") == 0


def test_blocked_disk_is_not_touched_before_the_kernel_gives_it_up(node: FakeIscsi) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), Deadline.after(5))
    node.set_state("FAILED", "blocked")
    before = len(node.runner.calls)
    with pytest.raises(Timeout, match="replacement_timeout"):
        connector.disconnect(V, Deadline.after(0.3))
    assert len(node.runner.calls) == before
    node.set_state("LOGGED_IN", "running")
    connector.disconnect(V, Deadline.after(5))
    assert node.leftovers() == []


def test_dead_session_of_this_generation_is_replaced(node: FakeIscsi) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, Deadline.after(5))
    node.set_state("FREE", "transport-offline")
    device = connector.connect(attachment, Deadline.after(4))
    assert device.path == node.dev / "sdb" and len(node.sessions) == 1


def test_dead_session_that_is_mounted_is_left_to_iscsid(node: FakeIscsi) -> None:
    attachment, connector = node.publish(V), node.connector()
    device = connector.connect(attachment, Deadline.after(5))
    node.mount(device.path, device.major_minor)
    node.set_state("FAILED", "transport-offline")
    with pytest.raises(Unavailable, match="session is lost"):
        connector.connect(attachment, Deadline.after(0.5))
    assert len(node.sessions) == 1


def test_living_session_is_found_before_a_dead_one(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    node.set_state("FREE", "transport-offline")
    node._make_session(node.publish(V, generation=NEW).paths[0].target)
    node._scan(node.sessions[2])
    found = connector.find(V)
    assert found is not None and found.generation == NEW


@pytest.mark.parametrize("code", [2, 21, 22])
def test_logout_that_finds_nothing_is_judged_by_sysfs(node: FakeIscsi, deadline: Deadline, code: int) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    node.runner.fail("--logout", after=True, reply=(code, "", ""))
    connector.disconnect(V, deadline)
    assert node.leftovers() == []


@pytest.mark.parametrize(("code", "words"), [(21, "see that iscsid runs"), (20, "enable --now iscsid"), (10, "logout")])
def test_logout_that_did_nothing_is_an_error(node: FakeIscsi, deadline: Deadline, code: int, words: str) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    node.runner.fail("--logout", reply=(code, "", ""))
    with pytest.raises(Unavailable, match=words):
        connector.disconnect(V, deadline)
    connector.disconnect(V, deadline)
    assert node.leftovers() == []


# ------------------------------------------------------------------------------------------------ sweep and crashes


def test_sweep_removes_what_nobody_wants(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    device = connector.connect(node.publish(OTHER), deadline)
    node.mount(device.path, device.major_minor)
    for name in ("iqn.2026-11.io.snode:v-" + "c" * 26 + ":ff", "iqn.2001-04.com.example:v-" + "d" * 26 + ":ff"):
        (node.database / "nodes" / name).mkdir()
    (node.database / ".snode-record.left").write_text("SENTINEL")
    (kept,) = connector.sweep(lambda _: False, deadline)
    assert OTHER in kept and "mounted on /mnt/x" in kept
    node.unmount_all()
    assert connector.sweep(lambda volume_id: volume_id == OTHER, deadline) == []
    assert connector.find(OTHER) is not None and connector.find(V) is None
    assert connector.sweep(lambda _: False, deadline) == []
    assert node.leftovers() == ["iqn.2001-04.com.example:v-" + "d" * 26 + ":ff"]


def test_sweep_removes_the_record_of_a_wanted_volume_without_a_session(node: FakeIscsi, deadline: Deadline) -> None:
    (node.database / "nodes" / f"iqn.2026-11.io.snode:{V}:ff").mkdir(parents=True)
    assert node.connector().sweep(lambda _: True, deadline) == []
    assert node.leftovers() == []


def _way(node: FakeIscsi, boundary: CrashAt, deadline: Deadline) -> None:
    node.runner.boundary = boundary
    connector = node.connector(boundary=boundary)
    connector.connect(node.publish(V), deadline)
    connector.connect(node.publish(V, generation=NEW), deadline)
    connector.disconnect(V, deadline)


def test_kill_at_every_step_then_repeat(tmp_path: Path) -> None:
    step = 0
    while True:
        step += 1
        node = FakeIscsi(_folder(tmp_path, step))
        boundary, deadline = CrashAt(step), Deadline.after(20)
        try:
            _way(node, boundary, deadline)
            break
        except Crash:
            pass
        node.runner.boundary = CrashAt()
        connector = node.connector()
        assert connector.connect(node.publish(V, generation=NEW), deadline).generation == NEW
        assert len(node.sessions) == 1, boundary.names
        connector.disconnect(V, deadline)
        assert node.leftovers() == [], boundary.names
        node.close()
    node.close()
    assert step > 30  # 36 on the real tools


def _folder(root: Path, step: int) -> Path:
    folder = root / str(step)
    folder.mkdir()
    return folder
