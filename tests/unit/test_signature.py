"""The look at a device: real tools make what is to be found; in doubt it is never "nothing"."""

import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from csi import signature
from csi.errors import Unavailable
from csi.signature import holds_data, look, probe
from tests.unit.backends.rig import MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(320 * MIB)
    return path


def gpt(path: Path) -> None:
    """An empty GUID partition table with its copy at the end, and the protective MBR."""
    sectors = path.stat().st_size // 512
    entries = bytes(128 * 128)

    def header(here: int, there: int, table: int) -> bytes:
        fields = struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, here, there, 34, sectors - 34,
            bytes(range(16)), table, 128, 128, zlib.crc32(entries),
        )  # fmt: skip
        return fields[:16] + struct.pack("<I", zlib.crc32(fields)) + fields[20:]

    with path.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, sectors - 1))
        file.seek(510)
        file.write(b"\x55\xaa" + header(1, sectors - 1, 2) + entries)
        file.seek((sectors - 33) * 512)
        file.write(entries + header(sectors - 1, 1, sectors - 33))


def test_nothing(image: Path) -> None:
    assert look(image) == ""
    with image.open("r+b") as file:
        file.write(os.urandom(4096).replace(b"\x55\xaa", b"\0\0"))
        file.seek(100 * MIB)
        file.write(b"data without a signature")
    assert look(image) == ""


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["mkfs.ext4", "-q"], "ext4"),
        (["mkfs.xfs", "-q"], "xfs"),
        (["mkfs.btrfs", "-q"], "btrfs"),
        (["mkswap"], "swap"),
    ],
)
def test_made_by_real_tools(image: Path, argv: list[str], found: str) -> None:
    subprocess.run([*argv, str(image)], check=True, capture_output=True)
    assert look(image) == found


@pytest.mark.root
def test_lvm_disk_on_a_loop_device(image: Path) -> None:
    done = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    disk = done.stdout.strip()
    try:
        assert look(Path(disk)) == ""
        config = f'devices{{filter=["a|^{disk}$|","r|.*|"] use_devicesfile=0}} backup{{backup=0 archive=0}}'
        pvcreate = ["pvcreate", "--driverloaded", "n", "--config", config, "--yes", disk]
        subprocess.run(pvcreate, check=True, capture_output=True)
        assert look(Path(disk)) == "LVM2_member"
        link = image.parent / "link"
        link.symlink_to(disk)  # as /dev/VG/LV is
        assert look(link) == "LVM2_member"
    finally:
        subprocess.run(["losetup", "--detach", disk], check=True)


@pytest.mark.parametrize("wiped", [None, (0, 512), (0, 4096)])
def test_partition_table_even_without_its_beginning(image: Path, wiped: tuple[int, int] | None) -> None:
    gpt(image)
    if wiped:
        with image.open("r+b") as file:
            file.seek(wiped[0])
            file.write(bytes(wiped[1]))
    assert look(image) == "a partition table (gpt)"


def test_contradicting_signatures(image: Path, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    other = tmp_path / "xfs"
    with other.open("wb") as file:
        file.truncate(320 * MIB)
    subprocess.run(["mkfs.xfs", "-q", str(other)], check=True, capture_output=True)
    with image.open("r+b") as file:
        file.write(other.read_bytes()[:512])
    assert look(image) == "signatures that contradict each other (xfs, ext4)"


def test_superblock_with_a_wrong_checksum_is_still_a_sign(image: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    with image.open("r+b") as file:
        file.seek(1024 + 0x64)
        file.write(b"\xff\xff\xff\xff")
    assert look(image) in ("ext4", "ext4 with a damaged superblock")  # 2.38 does not check it, 2.41 does


def test_superblock_whose_fields_make_no_sense_is_still_a_sign(image: Path) -> None:
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, capture_output=True)
    with image.open("r+b") as file:
        file.seek(4)
        file.write(b"\xff\xff\xff\xff")
    assert look(image) == "xfs with a damaged superblock"


def test_an_xfs_whose_mkfs_never_ended_holds_no_data(image: Path) -> None:
    assert not holds_data(image)
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, capture_output=True)
    assert holds_data(image)
    unfinished = ["xfs_db", "-x", "-c", "sb 0", "-c", "write inprogress 1", str(image)]
    subprocess.run(unfinished, check=True, capture_output=True)
    assert look(image) == "xfs"
    assert not holds_data(image)


def test_unreadable_missing_empty(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        look(tmp_path / "nosuch")
    (tmp_path / "empty").touch()
    with pytest.raises(Unavailable, match="no size"):
        look(tmp_path / "empty")
    with pytest.raises(Unavailable):
        look(tmp_path)


def test_links_to_files_are_not_followed(image: Path) -> None:
    link = image.parent / "link"
    link.symlink_to(image)
    with pytest.raises(Unavailable, match="does not lead to a block device"):
        look(link)


@pytest.mark.root
def test_a_device_whose_backing_fails_is_unavailable(image: Path) -> None:
    """The file below the loop device is cut: reads beyond its end fail, as on a dying disk."""
    done = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    disk = Path(done.stdout.strip())
    try:
        for cut in (310 * MIB, 100 * MIB, 0):
            os.truncate(image, cut)
            with pytest.raises(Unavailable, match="can't be read at byte"):
                look(disk)
    finally:
        subprocess.run(["losetup", "--detach", disk], check=True)


@pytest.mark.root
def test_libblkid_alone_tells_an_error_from_nothing(image: Path) -> None:
    """Wherever its reads begin to fail: at each place where one kind of signature or another may be."""
    ends = [0, 512, 4096, 8192, *(1 << shift for shift in range(14, 25)), 160 * MIB, 319 * MIB, 320 * MIB - 65536]
    done = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    disk = Path(done.stdout.strip())
    try:
        for end in [*ends, 320 * MIB - 4096, 320 * MIB - 512]:
            os.truncate(image, end)
            fd = os.open(disk, os.O_RDONLY)
            try:
                with pytest.raises(Unavailable, match="can't"):
                    probe(fd, disk)
            finally:
                os.close(fd)
    finally:
        subprocess.run(["losetup", "--detach", disk], check=True)


class Answers:
    """libblkid, with other answers than its own: of its safe probe, and what it lists before it ends with a code."""

    def __init__(self, safe: int, listed: list[str], end: int) -> None:
        self._safe, self._listed, self._end = safe, list(listed), end
        self._real = signature._library()
        self._current = b""

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def blkid_do_safeprobe(self, probe: int) -> int:
        return self._safe

    def blkid_do_probe(self, probe: int) -> int:
        if not self._listed:
            return self._end
        self._current = self._listed.pop(0).encode()
        return 0

    def blkid_probe_lookup_value(self, probe: int, name: bytes, data: Any, length: None) -> int:
        data._obj.value = self._current
        return 0 if name == b"TYPE" else -1


@pytest.mark.parametrize(
    ("safe", "listed", "end", "expected"),
    [
        (1, [], 1, ""),
        (1, ["zfs_member"], 1, "?traces of zfs_member"),
        (-2, ["ext4", "btrfs"], 1, "?signatures that contradict each other (ext4, btrfs)"),
        (-1, ["ext4", "btrfs"], 1, "?signatures that contradict each other (ext4, btrfs)"),  # 2.41
        (-2, [], 1, "?signatures that contradict each other (libblkid lists none)"),
        (1, [], -5, None),
        (1, [], -1, None),
        (1, ["ext4"], -1, None),
        (-1, [], 1, None),
        (-1, ["ext4"], 1, None),
        (-5, [], 1, None),
        (-5, [], -5, None),
        (-1, ["ext4", "btrfs"], -1, None),
        (7, [], 1, None),
    ],
)
def test_what_each_answer_of_libblkid_means(
    safe: int, listed: list[str], end: int, expected: str | None, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(safe, listed, end)
    monkeypatch.setattr(signature, "_library", lambda: answers)
    fd = os.open(image, os.O_RDONLY)
    try:
        if expected is not None:
            assert probe(fd, image) == expected
            return
        with pytest.raises(Unavailable, match="answer"):
            probe(fd, image)
    finally:
        os.close(fd)


def test_no_descriptor_is_left_open(image: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        look(image)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
