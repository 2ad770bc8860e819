"""The way of a volume on the fakes: killed before and after every command, then repeated."""

import sys
import time
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import DataLoss, DriverError, InUse, Unavailable
from csi.fs.format import FS_TYPES, Filesystems
from csi.fs.mounts import Mounts
from csi.model import GIB
from tests.fakes.crash import Crash
from tests.fakes.mounts import FakeMounts
from tests.fakes.runner import FakeRunner


class Node:
    def __init__(self, folder: Path) -> None:
        self.fake = FakeMounts(folder)
        self.runner = FakeRunner(self.fake.programs)
        self.mounts = Mounts(self.runner, table=self.fake.table, number_of=self.fake.number_of)
        self.filesystems = Filesystems(self.runner)
        self.device = folder / "sda"
        self.device.touch()
        self.disk = self.fake.add_disk(self.device, GIB, key="volume")
        self.staging, self.target, self.block = folder / "staging", folder / "pod/mount", folder / "pod/block"

    def up(self, fs_type: str) -> None:
        deadline = Deadline.after(10)
        look = self.filesystems.look(self.device, deadline)
        if not look.signature:
            self.filesystems.make(look, fs_type=fs_type, deadline=deadline)
        number = self.fake.number_of(self.device)
        assert number
        if not self.mounts.of(number):
            self.filesystems.check(self.device, fs_type=fs_type, deadline=deadline)
        self.mounts.ensure_directory(self.staging)
        self.mounts.mount(
            self.device, self.staging, fs_type=fs_type, flags=["noatime"], readonly=False, deadline=deadline
        )
        if look.signature and not look.fills_device:
            self.filesystems.grow(self.device, fs_type=fs_type, mount_point=self.staging, deadline=deadline)
        self.mounts.ensure_directory(self.target)
        self.mounts.bind(self.staging, self.target, readonly=True, deadline=deadline)
        self.mounts.ensure_file(self.block)
        self.mounts.bind(self.device, self.block, readonly=False, deadline=deadline)

    def down(self) -> None:
        deadline = Deadline.after(10)
        for path in (self.block, self.target, self.staging):
            self.mounts.unmount_all(path, deadline)
            self.mounts.remove_target(path)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_up_and_down_and_again(node: Node) -> None:
    for _ in range(2):
        node.up("ext4")
        node.up("ext4")
        assert node.fake.mount_points() == [node.staging, node.target, node.block]
        (bound,) = node.mounts.at(node.target)
        assert bound.readonly and bound.options >= {"nosuid", "nodev", "noatime"}
        assert [mount.mount_point for mount in node.mounts.of_node(node.device)] == [node.block]
        node.down()
        node.down()
        assert node.fake.mount_points() == []
    assert node.runner.count("mkfs.ext4") == 1


@pytest.mark.parametrize("fs_type", FS_TYPES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("killed", [False, True])
def test_a_fault_at_any_command_is_made_good_by_repeating(
    fs_type: str, after: bool, killed: bool, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    whole = Node(tmp_path / "whole")
    whole.up(fs_type)
    whole.down()
    for nth in range(1, len(whole.runner.calls) + 1):
        folder = tmp_path / str(nth)
        folder.mkdir()
        node = Node(folder)
        node.runner.fail(nth=nth, after=after, reply=None if killed else (1, "", "injected"))
        for step in (lambda node=node: node.up(fs_type), node.down):
            for attempt in range(3):
                try:
                    step()
                    break
                except (DriverError, Crash):
                    assert attempt < 2
        assert node.fake.mount_points() == []
        assert node.fake.on("volume").signature == fs_type
        assert not node.staging.exists() and not node.target.exists() and not node.block.exists()


def test_a_dead_device_is_never_formatted(node: Node) -> None:
    node.disk.readable = False
    with pytest.raises(Unavailable):
        node.up("ext4")
    assert node.runner.count("mkfs.ext4") == 0


def test_what_is_there_is_never_formatted(node: Node) -> None:
    node.fake.on("volume").signature = "?LVM2_member"
    look = node.filesystems.look(node.device, Deadline.after(5))
    assert look.signature == "?LVM2_member"
    with pytest.raises(DataLoss):
        node.filesystems.make(look, fs_type="ext4", deadline=Deadline.after(5))
    assert node.fake.on("volume").signature == "?LVM2_member"


def test_damage_stops_the_mount(node: Node) -> None:
    node.up("ext4")
    node.down()
    node.fake.on("volume").fsck_code = 1
    node.up("ext4")
    node.down()
    node.fake.on("volume").fsck_code = 4
    with pytest.raises(DataLoss):
        node.up("ext4")
    assert node.fake.mount_points() == []


def test_busy_and_reboot(node: Node) -> None:
    node.up("xfs")
    node.fake.busy.add(node.target)
    with pytest.raises(InUse):
        node.down()
    node.fake.reboot()
    node.down()
    node.up("xfs")
    assert node.runner.count("mkfs.xfs") == 1


def test_a_grown_disk_is_filled(node: Node) -> None:
    node.up("xfs")
    node.disk.size_bytes = 2 * GIB
    for _ in range(2):
        node.up("xfs")
        assert node.fake.on("volume").fs_bytes == 2 * GIB
    assert node.runner.count("xfs_growfs") == 1


def test_unknown_commands_fail(node: Node) -> None:
    for argv in (
        ["mount", "-o", "bind", "/a", "/b"],
        ["mkfs.ext4", "-F", "--", str(node.device)],
        [sys.executable, "-c", "pass"],
        [sys.executable, "-I", "-S", "helper.py", str(node.device)],
        ["e2fsck", "-y", "--", str(node.device)],
    ):
        with pytest.raises((AssertionError, KeyError)):
            node.runner.run(argv, deadline=Deadline.after(5))


def test_the_fakes_are_fast(node: Node) -> None:
    began = time.monotonic()
    for _ in range(20):
        node.up("ext4")
        node.down()
    assert (time.monotonic() - began) / 20 < 0.1
