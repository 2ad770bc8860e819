from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import InUse, Timeout, Unavailable
from tests.fakes.crash import Crash, CrashAt
from tests.fakes.iscsi import FakeIscsi

V = "v-" + "a" * 26
OTHER = "v-" + "b" * 26
NEW = "00000000000000ff"


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
    with pytest.raises(InUse, match=r"older attachment.*unpublished and unstaged first.*mounted on /var/lib/x y"):
        connector.connect(node.publish(V, generation=NEW), deadline)
    assert len(node.sessions) == 1


def test_disconnect_ends_every_generation(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    attachment = node.publish(V, generation=NEW)
    node.make_session(attachment.paths[0].target)
    assert len(node.sessions) == 2
    connector.disconnect(V, deadline)
    assert node.leftovers() == []


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
        node.add_holder("sda", name="dm-0", uuid="LVM-x", label="vg-lv")
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


def test_dead_session_can_be_removed(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    node.set_state("FREE", "transport-offline")
    connector.disconnect(V, deadline)
    assert node.leftovers() == [] and node.runner.count("flush_helper") == 0


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


def test_a_lost_session_is_a_complaint(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    assert connector.complaints(V) == []
    attachment = node.publish(V)
    connector.connect(attachment, deadline)
    assert connector.complaints(V) == []
    before = len(node.runner.calls)
    for session_state, disk_state, reason, words in (
        ("FAILED", "blocked", "SessionLost", "I/O waits"),
        ("FREE", "transport-offline", "SessionGivenUp", "stage it again"),
    ):
        node.set_state(session_state, disk_state)
        (complaint,) = connector.complaints(V)
        assert complaint.reason == reason
        for word in (V, attachment.paths[0].target, words):
            assert word in complaint.message
    node.set_state("LOGGED_IN", "running")
    assert connector.complaints(V) == []
    assert len(node.runner.calls) == before


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
    node.make_session(node.publish(V, generation=NEW).paths[0].target)
    node.scan(node.sessions[2])
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


def test_left_over_names_sessions_and_records_and_nobody_elses(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    assert connector.left_over() == []
    connector.connect(node.publish(V), deadline)
    connector.connect(node.publish(OTHER), deadline)
    third = "v-" + "c" * 26
    for name in (f"iqn.2026-11.io.snode:{third}:ff", "iqn.2001-04.com.example:v-" + "d" * 26 + ":ff"):
        (node.database / "nodes" / name).mkdir()
    (node.database / ".snode-record.left").write_text("SENTINEL")
    assert connector.left_over() == sorted([V, OTHER, third])
    for volume_id in connector.left_over():
        connector.disconnect(volume_id, deadline)
    assert node.leftovers() == ["iqn.2001-04.com.example:v-" + "d" * 26 + ":ff"]


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
