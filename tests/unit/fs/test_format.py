"""Signatures, mkfs and fsck on real loop devices with the real tools."""

import hashlib
import os
import random
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import CommandFailed, DataLoss, InUse, Invalid, OutOfRange, Unavailable
from csi.fs.format import FS_TYPES, MINIMUM_BYTES, Filesystems
from csi.fs.mounts import Mounts
from csi.model import MIB
from csi.run import Result, SubprocessRunner
from tests.fakes.runner import FakeRunner
from tests.unit.fs.conftest import MakeDisk, backing_file, tool

pytestmark = pytest.mark.root


def write(device: Path, offset: int, data: bytes) -> None:
    with device.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def gpt(device: Path) -> None:
    """A protective MBR and an empty GPT, as a partitioning tool leaves them."""
    sectors = device_bytes(device) // 512
    entries = bytes(128 * 128)
    header = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        *(b"EFI PART", 0x10000, 92, 0, 0, 1, sectors - 1, 34, sectors - 34, b"\x11" * 16, 2, 128, 128),
        zlib.crc32(entries),
    )  # fmt: skip
    header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    protective = bytes(446) + struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, sectors - 1) + bytes(48)
    write(device, 0, protective + b"\x55\xaa" + header.ljust(512, b"\0") + entries)


def mbr(device: Path) -> None:
    write(device, 446, struct.pack("<B3sB3sII", 0, b"\1\1\0", 0x83, b"\xff" * 3, 2048, 4096) + bytes(48) + b"\x55\xaa")


def luks(device: Path) -> None:
    write(device, 0, b"LUKS\xba\xbe\0\1".ljust(168, b"\0") + b"11111111-2222-3333-4444-555555555555\0\0\0\0")


def raid(device: Path) -> None:
    """A version 1.2 superblock of md, 4 KiB from the start."""
    sectors = device_bytes(device) // 512
    block = bytearray(256)
    struct.pack_into("<IIII16s32s", block, 0, 0xA92B4EFC, 1, 0, 0, b"\x22" * 16, b"host:0")
    struct.pack_into("<QQQ", block, 128, 2048, sectors - 2048, 8)  # data_offset, data_size, super_offset
    total = sum(struct.unpack("<64I", block))
    struct.pack_into("<I", block, 216, (total & 0xFFFFFFFF) + (total >> 32))
    write(device, 4096, bytes(block))


def device_bytes(device: Path) -> int:
    return int(tool("blockdev", "--getsize64", str(device)))


def fingerprint(device: Path) -> tuple[int, str]:
    """What any mkfs would change: how much of the sparse file is allocated, and what its first MiB holds."""
    tool("sync", "--file-system", str(backing_file(device)))
    with device.open("rb") as file:
        return backing_file(device).stat().st_blocks, hashlib.sha256(file.read(MIB)).hexdigest()


def two_filesystems(device: Path) -> None:
    """A btrfs, and in the 64 KiB that it leaves free the superblock of an ext4: both whole, with their checksums."""
    tool("mkfs.ext4", "-q", "-b", "4096", str(device))
    with device.open("rb") as file:
        superblock = file.read(2048)[1024:]
    tool("mkfs.btrfs", "-q", "-f", str(device))
    write(device, 1024, superblock)


SIGNATURES: list[tuple[str, Callable[[Path], object]]] = [
    ("", lambda device: None),
    ("", lambda device: write(device, 0, b"\xa5" * MIB)),  # what a thick volume may hold: noise
    ("ext4", lambda device: tool("mkfs.ext4", "-q", str(device))),
    ("ext3", lambda device: tool("mkfs.ext3", "-q", str(device))),
    ("xfs", lambda device: tool("mkfs.xfs", "-q", str(device))),
    ("btrfs", lambda device: tool("mkfs.btrfs", "-q", str(device))),
    ("?LVM2_member", lambda device: tool("pvcreate", "--driverloaded", "n", "--devices", str(device), str(device))),
    ("?swap", lambda device: tool("mkswap", str(device))),
    ("?crypto_LUKS", luks),
    ("?linux_raid_member", raid),
    ("?a partition table (gpt)", gpt),
    ("?a partition table (dos)", mbr),
    ("?signatures that contradict each other (btrfs, ext4)", two_filesystems),
]


@pytest.mark.parametrize(
    ("expected", "prepare"), SIGNATURES, ids=[f"{n}-{name[:20]}" for n, (name, _) in enumerate(SIGNATURES)]
)
def test_probe_says_what_stands_there_and_make_never_writes_over_it(
    expected: str, prepare: Callable[[Path], object], make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(320)
    prepare(device)
    assert filesystems.probe(device, deadline) == expected
    if not expected:
        return
    before = fingerprint(device)
    for fs_type in FS_TYPES:
        with pytest.raises(DataLoss, match="not formatted"):
            filesystems.make(device, fs_type=fs_type, deadline=deadline)
    assert fingerprint(device) == before


def test_a_superblock_with_a_wrong_checksum_is_still_something(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    """blkid of util-linux 2.41 checks it and then finds nothing, earlier ones find the filesystem."""
    device = make_disk(64)
    filesystems.make(device, fs_type="ext4", deadline=deadline)
    write(device, 1024 + 120, b"changed")
    assert filesystems.probe(device, deadline) in ("ext4", "?ext4 with a damaged superblock")
    with pytest.raises(DataLoss, match="not formatted"):
        filesystems.make(device, fs_type="ext4", deadline=deadline)


def test_a_missing_device_is_not_blank(tmp_path: Path, filesystems: Filesystems, deadline: Deadline) -> None:
    for device in (tmp_path / "none", Path("/dev/loop-none")):
        with pytest.raises(Unavailable, match="attached"):
            filesystems.probe(device, deadline)
        with pytest.raises(Unavailable):
            filesystems.make(device, fs_type="ext4", deadline=deadline)


@pytest.mark.parametrize("left", [0, 1 * MIB, 63 * MIB])
def test_a_device_that_can_not_be_read_somewhere_is_not_blank(
    left: int, make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    """Its file was cut off under the loop device, so that reads fail at the start, in the middle, or at the end."""
    device = make_disk(64)
    os.truncate(backing_file(device), left)
    with pytest.raises(Unavailable, match="can't be read at byte"):
        filesystems.probe(device, deadline)


def test_a_dead_device_whose_pages_are_cached_is_not_blank(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(32)
    device.read_bytes()
    os.truncate(backing_file(device), 0)
    with pytest.raises(Unavailable, match="can't be read"):
        filesystems.probe(device, deadline)


class DiesDuring(SubprocessRunner):
    """Cuts the device off once a program was run, and lets the program's answer stand."""

    def __init__(self, program: str, file: Path) -> None:
        super().__init__()
        self._program, self._file = program, file

    def run(
        self,
        argv: Sequence[str],
        *,
        deadline: Deadline,
        read_only: bool = False,
        ok: frozenset[int] | None = frozenset({0}),
        input: str | None = None,
        timeout: float = 60.0,
        pass_fds: Sequence[int] = (),
    ) -> Result:
        if argv[0] == self._program:
            os.truncate(self._file, 0)
        return super().run(
            argv, deadline=deadline, read_only=read_only, ok=ok, input=input, timeout=timeout, pass_fds=pass_fds
        )


def test_a_device_that_dies_while_blkid_looks_is_not_blank(make_disk: MakeDisk, deadline: Deadline) -> None:
    """This is how live data gets formatted: blkid itself says 2, blank."""
    device = make_disk(32)
    dying = Filesystems(DiesDuring("blkid", backing_file(device)))
    with pytest.raises(Unavailable, match="can't be read"):
        dying.make(device, fs_type="ext4", deadline=deadline)


@pytest.mark.parametrize("fs_type", FS_TYPES)
def test_make_works_at_the_smallest_size_and_not_below(
    fs_type: str, make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    mib = MINIMUM_BYTES[fs_type] // MIB
    small, device = make_disk(mib - 1), make_disk(mib)
    with pytest.raises(OutOfRange, match=f"needs {mib} MiB"):
        filesystems.make(small, fs_type=fs_type, deadline=deadline)
    filesystems.make(device, fs_type=fs_type, deadline=deadline)
    (scratch / "m").mkdir()
    mounts.mount(device, scratch / "m", fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
    (scratch / "m/file").write_bytes(b"x" * (MINIMUM_BYTES[fs_type] // 8))
    if fs_type == "ext4":
        assert "has_journal" in tool("dumpe2fs", "-h", str(device))


def test_make_takes_only_filesystems_of_the_list(filesystems: Filesystems, deadline: Deadline) -> None:
    for fs_type in ("", "../mkfs", "ext4 -E x", "vfat"):
        with pytest.raises(Invalid, match="fs_type"):
            filesystems.make(Path("/dev/none"), fs_type=fs_type, deadline=deadline)


def test_make_does_not_take_a_held_device(make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline) -> None:
    device = make_disk(320)
    holder = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        for fs_type in FS_TYPES:
            with pytest.raises((InUse, CommandFailed)):
                filesystems.make(device, fs_type=fs_type, deadline=deadline)
        assert filesystems.probe(device, deadline) == ""
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
        if filesystems.probe(device, deadline) == "":
            filesystems.make(device, fs_type=fs_type, deadline=deadline)
        filesystems.check(device, fs_type=fs_type, deadline=deadline)
        mounts.mount(device, target, fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
        (target / "file").write_text("works")
        mounts.unmount_all(target, deadline)


def test_an_xfs_whose_mkfs_never_ended_is_no_filesystem(
    make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    device = make_disk(320)
    filesystems.make(device, fs_type="xfs", deadline=deadline)
    tool("xfs_db", "-x", "-c", "sb 0", "-c", "write inprogress 1", str(device))
    (scratch / "m").mkdir()
    tool("mount", "-t", "xfs", str(device), str(scratch / "m"), ok=(32,))
    assert filesystems.probe(device, deadline) == ""
    filesystems.make(device, fs_type="ext4", deadline=deadline)
    assert filesystems.probe(device, deadline) == "ext4"


@pytest.fixture
def ext4(make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline) -> Path:
    device = make_disk(64)
    filesystems.make(device, fs_type="ext4", deadline=deadline)
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
