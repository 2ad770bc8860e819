import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.connectors.block_device import KernelBlockDevices, naa_names
from csi.errors import Unavailable

#: What tgtd 1.0.85 answers for scsi_id=60000000000000000000000000000abc.
PAGE = bytes.fromhex(
    "008300480201002436303030303030303030303030303030303030303030303030303030306162630000000001030008"
    "3000000500000001010300106000000000000000000000000000" + "0abc"
)


def test_names_of_a_real_page() -> None:
    assert naa_names(PAGE) == {"naa.3000000500000001", "naa.60000000000000000000000000000abc"}


def test_damaged_pages_give_no_name_and_no_error() -> None:
    for length in range(len(PAGE)):
        assert naa_names(PAGE[:length]) <= {"naa.3000000500000001"}
    assert naa_names(b"") == naa_names(bytes(100)) == naa_names(b"\0\x80" + PAGE[2:]) == frozenset()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    with image.open("wb") as opened:
        opened.truncate(16 << 20)
    argv = ["losetup", "--find", "--show", "--", str(image)]
    name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(name)
    subprocess.run(["umount", tmp_path / "mnt"], capture_output=True)
    subprocess.run(["losetup", "--detach", name], check=True)


@pytest.mark.root
def test_held_while_mounted(device: Path, tmp_path: Path) -> None:
    block = KernelBlockDevices()
    assert not block.held(device)
    with device.open("rb"):
        assert not block.held(device)
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", device, tmp_path / "mnt"], check=True)
    assert block.held(device)
    subprocess.run(["umount", tmp_path / "mnt"], check=True)
    assert not block.held(device)
    assert not block.held(tmp_path / "gone")


@pytest.mark.root
def test_device_that_is_no_scsi_disk_has_no_identity(device: Path, tmp_path: Path) -> None:
    for path in (device, tmp_path / "gone", Path(os.devnull)):
        with pytest.raises(Unavailable, match="does not say what it is"):
            KernelBlockDevices().names(path)


def test_disk_that_can_not_be_opened_yet_is_asked_again(tmp_path: Path) -> None:
    """What the kernel answers for a disk that it is about to show, a socket answers too: ENXIO."""
    path = tmp_path / "sda"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        with pytest.raises(Unavailable, match="No such device or address"):
            KernelBlockDevices().names(path)
        (tmp_path / "there").touch()
        threading.Timer(0.2, lambda: (tmp_path / "there").rename(path)).start()
        with pytest.raises(Unavailable, match="Inappropriate ioctl"):
            KernelBlockDevices().names(path)
