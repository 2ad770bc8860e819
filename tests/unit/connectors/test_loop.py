"""With real loop devices, mkfs and mount; needs root."""

import dataclasses
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi.connectors.loop import LoopConnector
from csi.deadline import Deadline
from csi.errors import DataLoss, InUse, Invalid, NotFound, Timeout, Unavailable, Unsupported
from csi.model import Attachment, Device
from csi.run import Result, SubprocessRunner
from tests.fakes.crash import Crash, CrashAt
from tests.fakes.runner import FakeRunner

V = "v-" + "l" * 26
OTHER = "v-" + "k" * 26
SIZE = 32 << 20

pytestmark = pytest.mark.root


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "pool"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "--recursive", tmp_path / "mnt"], capture_output=True)
    for line in tool("losetup", "--list", "--noheadings", "--output=NAME,BACK-FILE").splitlines():
        name, _, file = line.partition(" ")
        if file.strip().startswith(str(tmp_path)):
            subprocess.run(["losetup", "--detach", name], check=True)


def tool(*argv: str | Path) -> str:
    return subprocess.run([*argv], capture_output=True, text=True, check=True).stdout


def make(root: Path, volume_id: str = V, *, size_bytes: int = SIZE) -> Attachment:
    file = root / f"{volume_id}.img"
    with file.open("wb") as opened:
        opened.truncate(size_bytes)
    return Attachment(
        volume_id=volume_id,
        protocol="loop",
        generation="0123456789abcdef",
        size_bytes=size_bytes,
        readonly=False,
        may_format=True,
        file=file,
    )


def connector(root: Path) -> LoopConnector:
    return LoopConnector(SubprocessRunner(), roots=[root])


def mount(device: Device, where: Path, *options: str) -> None:
    where.mkdir(exist_ok=True)
    tool("mkfs.ext4", "-q", device.path)
    tool("mount", *options, device.path, where)


def test_the_whole_way(root: Path, tmp_path: Path, deadline: Deadline) -> None:
    attachment, loop = make(root), connector(root)
    device = loop.connect(attachment, deadline)
    assert device.size_bytes == SIZE and device.path.is_block_device() and device.generation == ""
    assert loop.connect(attachment, deadline) == device == connector(root).find(V)
    assert loop.find(OTHER) is None
    mount(device, tmp_path / "mnt")
    (tmp_path / "mnt" / "data").write_text("kept")
    os.truncate(root / f"{V}.img", 2 * SIZE)
    assert loop.rescan(V, size_bytes=2 * SIZE, deadline=deadline).size_bytes == 2 * SIZE
    with pytest.raises(InUse, match=f"mounted on {tmp_path / 'mnt'}"):
        loop.disconnect(V, deadline)
    tool("umount", tmp_path / "mnt")
    loop.disconnect(V, deadline)
    loop.disconnect(V, deadline)
    assert loop.find(V) is None
    device = loop.connect(dataclasses.replace(attachment, size_bytes=2 * SIZE), deadline)
    tool("mount", device.path, tmp_path / "mnt")
    assert (tmp_path / "mnt" / "data").read_text() == "kept"


def test_parallel_connects(root: Path, deadline: Deadline) -> None:
    attachments = [make(root, f"v-{'l' * 25}{letter}") for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        devices = list(pool.map(lambda a: connector(root).connect(a, deadline), attachments))
    assert len({device.path for device in devices}) == 4
    for attachment, device in zip(attachments, devices, strict=True):
        backing = Path(f"/sys/block/{device.path.name}/loop/backing_file").read_text().strip()
        assert backing == str(attachment.file)


def test_read_only(root: Path, deadline: Deadline) -> None:
    attachment, loop = make(root), connector(root)
    device = loop.connect(dataclasses.replace(attachment, readonly=True), deadline)
    with pytest.raises(PermissionError), device.path.open("r+b", buffering=0) as opened:
        opened.write(b"x" * 512)
    device = loop.connect(attachment, deadline)
    assert tool("blockdev", "--getro", device.path).strip() == "0"


def test_read_only_while_mounted_is_not_changed(root: Path, tmp_path: Path, deadline: Deadline) -> None:
    attachment, loop = make(root), connector(root)
    mount(loop.connect(attachment, deadline), tmp_path / "mnt")
    with pytest.raises(InUse, match="attached in another way"):
        loop.connect(dataclasses.replace(attachment, readonly=True), deadline)


def test_mount_in_another_namespace_is_seen(root: Path, tmp_path: Path, deadline: Deadline) -> None:
    loop = connector(root)
    device = loop.connect(make(root), deadline)
    (tmp_path / "mnt").mkdir()
    tool("mkfs.ext4", "-q", device.path)
    script = 'mount "$0" "$1" && echo mounted && read -r line'
    argv = ["unshare", "--mount", "sh", "-c", script, str(device.path), str(tmp_path / "mnt")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "mounted\n"
        with pytest.raises(InUse, match="another mount namespace"):
            loop.disconnect(V, deadline)
        other.communicate("\n")
    loop.disconnect(V, deadline)


def test_detach_that_waits_for_an_opener_is_told(root: Path, deadline: Deadline) -> None:
    attachment, loop = make(root), connector(root)
    device = loop.connect(attachment, deadline)
    with device.path.open("rb"):
        with pytest.raises(InUse, match="still open"):
            loop.disconnect(V, Deadline.after(0.5))
        assert loop.find(V) == device
        with pytest.raises(InUse, match="still open"):
            loop.connect(attachment, Deadline.after(0.5))
    loop.connect(attachment, deadline)


def test_file_that_was_replaced_is_attached_anew(root: Path, deadline: Deadline) -> None:
    attachment, loop = make(root), connector(root)
    loop.connect(attachment, deadline)
    (root / f"{V}.img").unlink()
    assert loop.find(V) is not None
    with pytest.raises(NotFound, match="file is gone"):
        loop.connect(attachment, deadline)
    attachment = make(root)
    device = loop.connect(attachment, deadline)
    with device.path.open("r+b", buffering=0) as opened:
        opened.write(b"x" * 512)
        os.fsync(opened.fileno())
    assert (root / f"{V}.img").read_bytes()[:512] == b"x" * 512
    loop.disconnect(V, deadline)
    assert loop.find(V) is None


def test_deleted_file_that_is_mounted_stays(root: Path, tmp_path: Path, deadline: Deadline) -> None:
    attachment, loop = make(root), connector(root)
    mount(loop.connect(attachment, deadline), tmp_path / "mnt")
    (root / f"{V}.img").unlink()
    with pytest.raises(InUse):
        loop.connect(make(root), deadline)


def test_size_is_verified(root: Path, deadline: Deadline) -> None:
    attachment, loop = make(root), connector(root)
    with pytest.raises(DataLoss, match="bytes"):
        loop.connect(dataclasses.replace(attachment, size_bytes=SIZE + 512), deadline)
    assert loop.find(V) is None
    loop.connect(attachment, deadline)
    with pytest.raises(Timeout, match=f"not yet {2 * SIZE} bytes"):
        loop.rescan(V, size_bytes=2 * SIZE, deadline=Deadline.after(0.3))
    os.truncate(root / f"{V}.img", 2 * SIZE)
    assert loop.connect(attachment, deadline).size_bytes == SIZE
    assert loop.connect(dataclasses.replace(attachment, size_bytes=2 * SIZE), deadline).size_bytes == 2 * SIZE
    with pytest.raises(NotFound, match="stage it first"):
        loop.rescan(OTHER, size_bytes=1, deadline=deadline)


@pytest.mark.parametrize("kind", ["outside", "link", "folder link", "other name", "dots", "device", "none", "missing"])
def test_only_a_volumes_file_below_a_root(root: Path, tmp_path: Path, deadline: Deadline, kind: str) -> None:
    attachment = make(root)
    file, error = root / f"{V}.img", {"missing": NotFound, "device": Unsupported}.get(kind, Invalid)
    path: Path | None = file
    if kind == "outside":
        path = tmp_path / f"{V}.img"
        file.rename(path)
    elif kind == "link":
        file.rename(tmp_path / f"{V}.img")
        file.symlink_to(tmp_path / f"{V}.img")
    elif kind == "folder link":
        (tmp_path / "outer").mkdir()
        file.rename(tmp_path / "outer" / f"{V}.img")
        (root / "inner").symlink_to(tmp_path / "outer")
        path = root / "inner" / f"{V}.img"
    elif kind == "other name":
        path = root / f"{OTHER}.img"
        file.rename(path)
    elif kind == "dots":
        file.rename(tmp_path / f"{V}.img")
        path = root / ".." / f"{V}.img"
    elif kind == "device":
        file.unlink()
        os.mknod(file, 0o020600, os.makedev(1, 3))
    elif kind == "none":
        path = None
    else:
        file.unlink()
    with pytest.raises(error):
        connector(root).connect(dataclasses.replace(attachment, file=path), deadline)
    assert connector(root).find(V) is None


class _Refusing(SubprocessRunner):
    """A file system that refuses direct I/O."""

    def run(self, argv: Sequence[str], **options: object) -> Result:
        if "--direct-io=on" in argv:
            return Result(tuple(argv), 1, "", "losetup: failed to set direct io: Invalid argument")
        return super().run(argv, **options)  # type: ignore[arg-type]


def test_without_direct_io(root: Path, deadline: Deadline) -> None:
    assert LoopConnector(_Refusing(), roots=[root]).connect(make(root), deadline).size_bytes == SIZE


def test_no_loop_device(root: Path, tmp_path: Path, deadline: Deadline) -> None:
    runner = FakeRunner({"losetup": lambda argv, _: (1, "", "losetup: cannot find an unused loop device")})
    loop = LoopConnector(runner, roots=[root])
    with pytest.raises(Unavailable, match="max_loop"):
        loop.connect(make(root), deadline)
    empty = tmp_path / "dev"
    empty.mkdir()
    loop = LoopConnector(runner, roots=[root], dev=empty)
    with pytest.raises(Unavailable, match="modprobe loop"):
        loop.connect(make(root), deadline)
    (problem,) = LoopConnector(SubprocessRunner(), roots=[root], dev=empty).problems(deadline)
    assert "modprobe loop" in problem.partition(" -> ")[2]
    (problem,) = LoopConnector(FakeRunner({}), roots=[root]).problems(deadline)
    assert problem == "losetup is missing -> install the package mount (util-linux)"
    calls = FakeRunner({"losetup": lambda argv, _: (1, "", "")})
    assert LoopConnector(calls, roots=[root]).problems(deadline) == []
    assert calls.calls == [], "an idle service starts no process"
    assert connector(root).problems(deadline) == []


def test_left_over(root: Path, deadline: Deadline) -> None:
    loop = connector(root)
    assert loop.left_over() == []
    loop.connect(make(root), deadline)
    loop.connect(make(root, OTHER), deadline)
    assert loop.left_over() == sorted([V, OTHER])
    loop.disconnect(V, deadline)
    assert loop.left_over() == [OTHER]


def test_kill_at_every_step_then_repeat(root: Path, deadline: Deadline) -> None:
    step = 0
    while True:
        step += 1
        attachment, boundary = make(root), CrashAt(step)
        loop = LoopConnector(SubprocessRunner(boundary=boundary), roots=[root])
        try:
            loop.connect(attachment, deadline)
            loop.disconnect(V, deadline)
            break
        except Crash:
            pass
        connector(root).connect(attachment, deadline)
        assert len(tool("losetup", "--associated", root / f"{V}.img").splitlines()) == 1
        connector(root).disconnect(V, deadline)
        assert tool("losetup", "--associated", root / f"{V}.img") == ""
    assert step > 5
