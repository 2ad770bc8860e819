"""The look at a device, on real loop devices with what the real tools make: in doubt it is never blank."""

import errno
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi import signature
from csi.deadline import Deadline
from csi.errors import DataLoss, Timeout, Unavailable
from csi.fs import look_helper
from csi.fs.format import FS_TYPES, Filesystems
from csi.fs.mounts import Mounts
from csi.model import MIB
from csi.run import Result, SubprocessRunner
from tests.fakes.runner import FakeRunner
from tests.unit.fs.conftest import (
    MakeDisk,
    backing_file,
    device_bytes,
    fingerprint,
    grow_disk,
    make_fs,
    tool,
    write,
)

pytestmark = pytest.mark.root


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


def two_filesystems(device: Path) -> None:
    """A btrfs, and in the 64 KiB that it leaves free the superblock of an ext4: both whole, with their checksums."""
    tool("mkfs.ext4", "-q", "-b", "4096", str(device))
    with device.open("rb") as file:
        superblock = file.read(2048)[1024:]
    tool("mkfs.btrfs", "-q", "-f", str(device))
    write(device, 1024, superblock)


def ext4_with_mbr(device: Path) -> None:
    tool("mkfs.ext4", "-q", str(device))
    mbr(device)


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
    ("?ext4 and a partition table (dos)", ext4_with_mbr),
    ("?signatures that contradict each other (ext4, btrfs)", two_filesystems),
]


@pytest.mark.parametrize(
    ("expected", "prepare"), SIGNATURES, ids=[f"{n}-{name[:20]}" for n, (name, _) in enumerate(SIGNATURES)]
)
def test_it_says_what_stands_there_and_make_never_writes_over_it(
    expected: str, prepare: Callable[[Path], object], make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(320)
    prepare(device)
    look = filesystems.look(device, deadline)
    assert (look.device, look.size_bytes, look.signature) == (device, 320 * MIB, expected)
    if not expected:
        return
    before = fingerprint(device)
    for fs_type in FS_TYPES:
        with pytest.raises(DataLoss, match="not formatted"):
            make_fs(filesystems, device, fs_type, deadline)
    assert fingerprint(device) == before


def test_a_superblock_with_a_wrong_checksum_is_still_something(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    """libblkid 2.41 checks it, 2.38 does not and finds the filesystem."""
    device = make_disk(64)
    make_fs(filesystems, device, "ext4", deadline)
    write(device, 1024 + 120, b"changed")
    assert filesystems.look(device, deadline).signature in ("ext4", "?ext4 with a damaged superblock")


@pytest.mark.parametrize(("fs_type", "place"), [("xfs", 4), ("btrfs", 65536 + 0x90), ("ext4", 1024 + 32)])
def test_a_superblock_whose_fields_make_no_sense_is_still_something(
    fs_type: str, place: int, make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(320)
    make_fs(filesystems, device, fs_type, deadline)
    write(device, place, b"\xff\xff\xff\xff")
    found = filesystems.look(device, deadline).signature
    assert found == f"?{fs_type} with a damaged superblock" or (fs_type != "xfs" and found == fs_type)


def test_a_missing_device_is_not_blank(tmp_path: Path, filesystems: Filesystems, deadline: Deadline) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    for device in (tmp_path / "none", Path("/dev/loop-none"), tmp_path / "file", Path("/dev/null"), tmp_path):
        with pytest.raises(Unavailable, match="attached"):
            filesystems.look(device, deadline)


def test_a_device_that_is_detached_is_not_blank(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(1)
    grow_disk(device, 0)
    with pytest.raises(Unavailable, match="size of 0 bytes"):
        filesystems.look(device, deadline)


@pytest.mark.parametrize("left", [0, 1 * MIB, 63 * MIB, 64 * MIB - 4096])
def test_a_device_that_can_not_be_read_somewhere_is_not_blank(
    left: int, make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    """Its file was cut off under the loop device, so that reads fail at the start, in the middle, or at the end."""
    device = make_disk(64)
    os.truncate(backing_file(device), left)
    with pytest.raises(Unavailable, match=f"{device}: can't be read at byte .* then repeat"):
        filesystems.look(device, deadline)


@pytest.mark.parametrize("bad_byte", [0, 100_000, 16 * MIB, 32 * MIB - 100_000, 32 * MIB - 1])
def test_a_device_with_one_bad_place_is_not_blank(
    bad_byte: int, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_disk(32)
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= bad_byte < offset + len(buffers[0]):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(Unavailable, match="can't be read at byte"):
        look_helper.look(str(device))


def test_a_dead_device_whose_pages_are_cached_is_not_blank(
    make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline
) -> None:
    device = make_disk(32)
    with device.open("rb") as held:  # the last one to close it would drop the pages
        held.read()
        os.truncate(backing_file(device), 0)
        with pytest.raises(Unavailable, match="can't be read"):
            filesystems.look(device, deadline)


@contextmanager
def dead(device: Path) -> Iterator[None]:
    """All reads of the device fail for the time."""
    size_bytes = backing_file(device).stat().st_size
    os.truncate(backing_file(device), 0)
    yield
    os.truncate(backing_file(device), size_bytes)


def test_an_error_that_comes_and_goes_while_libblkid_looks_is_not_blank(
    make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is how live data gets formatted: blkid the program says 2 for it, which is what it says for blank."""
    device = make_disk(32)

    def probe(fd: int, path: str) -> str:
        with dead(device):
            return signature.probe(fd, path)

    monkeypatch.setattr(look_helper, "probe", probe)
    with device.open("rb") as held, pytest.raises(Unavailable, match=r"can't be read|can't tell"):
        held.read()  # what the page cache holds must not answer for the device
        look_helper.look(str(device))


def test_a_device_that_dies_when_libblkid_has_looked_is_not_blank(
    make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_disk(32)

    def probe(fd: int, path: str) -> str:
        found = signature.probe(fd, path)
        os.truncate(backing_file(device), 0)
        return found

    monkeypatch.setattr(look_helper, "probe", probe)
    with pytest.raises(Unavailable, match="can't be read at byte 0"):
        look_helper.look(str(device))


@pytest.mark.parametrize("refuses", ["open", "preadv"])
def test_a_device_that_refuses_direct_reads_is_read_without(
    refuses: str, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_disk(32)
    open_file, preadv = os.open, os.preadv
    direct: set[int] = set()

    def refuse_open(path: str, flags: int, *rest: int) -> int:
        if refuses == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = open_file(path, flags, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def refuse_read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)
    assert look_helper.look(str(device))["signature"] == ""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with device.open("rb") as held:
        held.read()
        os.truncate(backing_file(device), 0)
        disk = look_helper.Direct(str(device), 32 * MIB)
        with pytest.raises(Unavailable, match="can't be read at byte 0"):
            disk.check()
        disk.close()
        with pytest.raises(Unavailable, match="can't be read"):
            look_helper.look(str(device))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    "reply",
    [
        (0, "", ""),
        (0, "size_bytes=1048576\n", ""),
        (0, "size_bytes=1048576\nfs_bytes=0\nfs_block_bytes=0\nunfinished=0\n", ""),
        (0, "size_bytes=1048576\nsignature=\nfs_bytes=0\nfs_block_bytes=0\nunfinished=\n", ""),
        (0, "size_bytes=many\nsignature=\nfs_bytes=0\nfs_block_bytes=0\nunfinished=0\n", ""),
        (1, "size_bytes=1048576\nsignature=\nfs_bytes=0\nfs_block_bytes=0\nunfinished=0\n", "trouble"),
        (-11, "", ""),
        (127, "", "error while loading shared libraries"),
    ],
)
def test_half_an_answer_is_not_blank(reply: tuple[int, str, str], deadline: Deadline) -> None:
    class Answers(FakeRunner):
        def run(self, argv: Sequence[str], **options: object) -> Result:
            return Result(tuple(argv), *reply)

    with pytest.raises(Unavailable, match=r"/dev/x.*repeat"):
        Filesystems(Answers({})).look(Path("/dev/x"), deadline)


def test_a_look_that_hangs_is_ended_with_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time; time.sleep(60)")
    monkeypatch.setattr("csi.fs.look._LOOK", ("python3", str(hangs)))
    began = time.monotonic()
    with pytest.raises(Timeout):
        Filesystems(SubprocessRunner()).look(Path("/dev/x"), Deadline.after(1))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("fs_type", FS_TYPES)
def test_it_knows_whether_a_filesystem_fills_its_device(
    fs_type: str, make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    device = make_disk(320)
    grow_disk(device, 320 * MIB + 5 * 512)
    make_fs(filesystems, device, fs_type, deadline)
    look = filesystems.look(device, deadline)
    assert look.fills_device
    assert 0 <= look.size_bytes - look.fs_bytes < 4096
    if fs_type == "ext4":
        assert f"Block count:              {look.fs_bytes // look.fs_block_bytes}\n" in tool(
            "dumpe2fs", "-h", str(device)
        )
    grow_disk(device, 321 * MIB)
    assert not filesystems.look(device, deadline).fills_device
    if fs_type == "ext4":
        tool("e2fsck", "-f", "-p", str(device))
        tool("resize2fs", str(device))
    else:
        (scratch / "m").mkdir()
        mounts.mount(device, scratch / "m", fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
        filesystems.grow(device, fs_type=fs_type, mount_point=scratch / "m", deadline=deadline)
        mounts.unmount_all(scratch / "m", deadline)
    assert filesystems.look(device, deadline).fills_device


def test_it_changes_nothing_and_starts_one_process(
    make_disk: MakeDisk, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_disk(64)
    tool("blockdev", "--setro", str(device))
    before = fingerprint(device)
    started: list[str] = []
    run = SubprocessRunner.run

    def count(self: SubprocessRunner, argv: Sequence[str], **options: object) -> Result:
        started.append(argv[0])
        assert options["read_only"]
        return run(self, argv, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SubprocessRunner, "run", count)
    assert Filesystems(SubprocessRunner()).look(device, deadline).signature == ""
    assert len(started) == 1
    assert fingerprint(device) == before
