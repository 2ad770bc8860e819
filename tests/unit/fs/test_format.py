"""mkfs and fsck on real loop devices with the real tools."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import CommandFailed, DataLoss, InUse, Invalid, OutOfRange, Unavailable
from csi.fs.format import FS_TYPES, MINIMUM_BYTES, Filesystems, Look
from csi.fs.mounts import Mounts
from csi.model import MIB
from csi.run import SubprocessRunner
from tests.fakes.runner import FakeRunner
from tests.unit.fs.conftest import MakeDisk, backing_file, fingerprint, make_fs, tool, write

pytestmark = pytest.mark.root


@pytest.mark.parametrize("fs_type", FS_TYPES)
def test_make_works_at_the_smallest_size_and_not_below(
    fs_type: str, make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    mib = MINIMUM_BYTES[fs_type] // MIB
    small, device = make_disk(mib - 1), make_disk(mib)
    with pytest.raises(OutOfRange, match=f"needs {mib} MiB"):
        make_fs(filesystems, small, fs_type, deadline)
    make_fs(filesystems, device, fs_type, deadline)
    (scratch / "m").mkdir()
    mounts.mount(device, scratch / "m", fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
    (scratch / "m/file").write_bytes(b"x" * (MINIMUM_BYTES[fs_type] // 8))
    if fs_type == "ext4":
        assert "has_journal" in tool("dumpe2fs", "-h", str(device))


def test_make_takes_only_filesystems_of_the_list(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    look = filesystems.look(make_disk(32), deadline)
    for fs_type in ("", "../mkfs", "ext4 -E x", "vfat"):
        with pytest.raises(Invalid, match="fs_type"):
            filesystems.make(look, fs_type=fs_type, deadline=deadline)


def test_make_takes_only_a_look_of_its_own_and_each_once(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(32)
    for forged in (Look(device, 32 * MIB, ""), Filesystems(SubprocessRunner()).look(device, deadline)):
        with pytest.raises(RuntimeError, match="after a look"):
            filesystems.make(forged, fs_type="ext4", deadline=deadline)
    look = filesystems.look(device, deadline)
    filesystems.make(look, fs_type="ext4", deadline=deadline)
    with pytest.raises(RuntimeError, match="one for each look"):
        filesystems.make(look, fs_type="ext4", deadline=deadline)


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_what_came_onto_the_device_after_the_look_is_seen_by_mkfs(
    fs_type: str, make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    """mke2fs has such a guard on a terminal only."""
    device = make_disk(320)
    look = filesystems.look(device, deadline)
    tool("mkfs.ext4", "-q", str(device))
    before = fingerprint(device)
    with pytest.raises((DataLoss, CommandFailed)):
        filesystems.make(look, fs_type=fs_type, deadline=deadline)
    assert fingerprint(device) == before


def test_make_does_not_take_a_held_device(make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline) -> None:
    device = make_disk(320)
    holder = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        for fs_type in FS_TYPES:
            with pytest.raises((InUse, CommandFailed)):
                make_fs(filesystems, device, fs_type, deadline)
        assert filesystems.look(device, deadline).signature == ""
    finally:
        os.close(holder)


MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-E", "nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-K"],
    "btrfs": ["mkfs.btrfs", "-q", "--nodiscard"],
}


@pytest.mark.parametrize("fs_type", FS_TYPES)
def test_a_mkfs_that_was_killed_is_made_good_by_the_next(
    fs_type: str, make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    target = scratch / "m"
    target.mkdir()
    device = make_disk(600)
    began = time.monotonic()
    subprocess.run([*MKFS[fs_type], str(device)], check=True, capture_output=True)
    whole_seconds = time.monotonic() - began
    for _ in range(12):
        tool("wipefs", "--all", str(device))
        process = subprocess.Popen(
            [*MKFS[fs_type], str(device)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(random.uniform(0, whole_seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        look = filesystems.look(device, deadline)
        if look.signature == "":
            filesystems.make(look, fs_type=fs_type, deadline=deadline)
        filesystems.check(device, fs_type=fs_type, deadline=deadline)
        mounts.mount(device, target, fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
        (target / "file").write_text("works")
        mounts.unmount_all(target, deadline)


def test_an_xfs_whose_mkfs_never_ended_is_no_filesystem(
    make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    device = make_disk(320)
    make_fs(filesystems, device, "xfs", deadline)
    tool("xfs_db", "-x", "-c", "sb 0", "-c", "write inprogress 1", str(device))
    (scratch / "m").mkdir()
    tool("mount", "-t", "xfs", str(device), str(scratch / "m"), ok=(32,))
    look = filesystems.look(device, deadline)
    assert (look.signature, look.unfinished) == ("", True)
    filesystems.make(look, fs_type="ext4", deadline=deadline)
    assert filesystems.look(device, deadline).signature == "ext4"


@pytest.fixture
def ext4(make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline) -> Path:
    device = make_disk(64)
    make_fs(filesystems, device, "ext4", deadline)
    return device


def test_check_passes_what_is_clean_and_what_is_not_ext(
    ext4: Path, make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    filesystems.check(ext4, fs_type="ext4", deadline=deadline)
    for fs_type in ("xfs", "btrfs"):
        filesystems.check(Path("/dev/none"), fs_type=fs_type, deadline=deadline)


def test_check_repairs_what_can_be_repaired_without_loss(
    ext4: Path, filesystems: Filesystems, deadline: Deadline
) -> None:
    tool("debugfs", "-w", "-R", "set_inode_field <11> links_count 7", str(ext4))
    tool("debugfs", "-w", "-R", "set_super_value state 2", str(ext4))
    tool("e2fsck", "-n", "-f", str(ext4), ok=(4,))
    filesystems.check(ext4, fs_type="ext4", deadline=deadline)
    tool("e2fsck", "-n", "-f", str(ext4))


def test_check_leaves_real_damage_to_a_human(ext4: Path, filesystems: Filesystems, deadline: Deadline) -> None:
    tool("debugfs", "-w", "-R", "clri <2>", str(ext4))  # the root folder is gone
    tool("debugfs", "-w", "-R", "set_super_value state 2", str(ext4))
    with pytest.raises(DataLoss, match=f"e2fsck -f {ext4}"):
        filesystems.check(ext4, fs_type="ext4", deadline=deadline)


def test_check_of_a_destroyed_superblock(ext4: Path, filesystems: Filesystems, deadline: Deadline) -> None:
    write(ext4, 0, bytes(4096))
    with pytest.raises(DataLoss, match=r"superblock.*e2fsck -b"):
        filesystems.check(ext4, fs_type="ext4", deadline=deadline)


def test_check_of_a_device_that_is_dead_or_missing(ext4: Path, filesystems: Filesystems, deadline: Deadline) -> None:
    tool("blockdev", "--flushbufs", str(ext4))
    os.truncate(backing_file(ext4), 0)
    for device in (ext4, Path("/dev/loop-none")):
        with pytest.raises(Unavailable, match="could not be checked"):
            filesystems.check(device, fs_type="ext4", deadline=deadline)


def test_a_mounted_device_is_never_checked(
    ext4: Path, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    (scratch / "m").mkdir()
    mounts.mount(ext4, scratch / "m", fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    with pytest.raises(InUse, match="mounted or held"):
        filesystems.check(ext4, fs_type="ext4", deadline=deadline)


def test_a_device_mounted_in_another_namespace_is_never_checked(
    ext4: Path, scratch: Path, filesystems: Filesystems, deadline: Deadline
) -> None:
    (scratch / "m").mkdir()
    script = f"mount -t ext4 {ext4} {scratch}/m && echo ready && read line"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"ready\n"
        with pytest.raises(InUse, match="mounted or held"):
            filesystems.check(ext4, fs_type="ext4", deadline=deadline)
        process.stdin.close()
        process.wait()


@pytest.mark.parametrize(
    ("code", "said", "error"),
    [
        (0, "", None),
        (1, "", None),
        (2, "", None),
        (3, "", None),
        (4, "UNEXPECTED INCONSISTENCY", DataLoss),
        (5, "", DataLoss),
        (8, "e2fsck: Device or resource busy; is in use.", InUse),
        (8, "Bad magic number in super-block ... superblock", DataLoss),
        (8, "e2fsck: No such file or directory", Unavailable),
        # A disk that is removed while e2fsck opens it, as seen on a real kernel.
        (8, "e2fsck: Invalid argument while trying to open /dev/x\nThe superblock could not be read", Unavailable),
        (12, "", DataLoss),
        (16, "Usage: e2fsck", CommandFailed),
        (32, "cancelled", Unavailable),
        (128, "shared library", CommandFailed),
    ],
)
def test_every_exit_code_of_e2fsck_has_its_error(
    code: int, said: str, error: type[Exception] | None, deadline: Deadline
) -> None:
    runner = FakeRunner({"e2fsck": lambda argv, stdin: (code, "", said)})
    filesystems = Filesystems(runner)
    if error is None:
        filesystems.check(Path("/dev/x"), fs_type="ext4", deadline=deadline)
    else:
        with pytest.raises(error):
            filesystems.check(Path("/dev/x"), fs_type="ext4", deadline=deadline)
