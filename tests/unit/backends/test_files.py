"""Sparse files in a real directory."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.backends.files import FilesBackend
from csi.errors import Busy, DataLoss, InUse, NoSpace, NotFound, OutOfRange, Unavailable
from csi.model import Volume, volume_id_of
from csi.run import Boundary, no_boundary
from tests.fakes.crash import Crash, CrashAt
from tests.unit.backends.rig import MIB, soon


class Folder:
    """`start` makes the backend anew from what is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = path / "pool"
        self.start()

    def start(self, *, boundary: Boundary = no_boundary, ratio: float = 1.0) -> FilesBackend:
        self.backend = FilesBackend(
            "files",
            directory=self.directory,
            state=self.path / "state",
            boundary=boundary,
            overcommit_ratio=ratio,
        )
        return self.backend

    def create(
        self, name: str = "one", *, size_bytes: int = 8 * MIB, parameters: dict[str, str] | None = None
    ) -> Volume:
        volume_id = volume_id_of(name)
        found = self.backend.find(volume_id, soon())
        return found or self.backend.create(
            volume_id,
            name=name,
            size_bytes=self.backend.round_size(size_bytes),
            parameters=parameters or {},
            deadline=soon(),
        )

    def delete(self, name: str = "one") -> None:
        volume = self.backend.find(volume_id_of(name), soon())
        if volume is not None:
            self.backend.delete(volume, soon())

    def names(self) -> list[str]:
        """What is in the directory beside the pool's own record."""
        return sorted(path.name for path in self.directory.iterdir() if path.name != "pool.json")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Folder]:
    """A filesystem of its own, of 64 MiB."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", mounted], check=True)
    try:
        yield Folder(mounted)
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.mark.parametrize("name", ["pvc-1", "ü" * 64, "../../etc/passwd", "a\0b\n", "-" * 128])
def test_create_find_list_delete(folder: Folder, name: str) -> None:
    volume = folder.create(name, size_bytes=8 * MIB + 1, parameters={"pool": "files", "ü": "ß"})
    volume_id = volume_id_of(name)
    assert volume == Volume(
        volume_id=volume_id,
        name=name,
        pool="files",
        size_bytes=9 * MIB,
        device=folder.directory / f"{volume_id}.img",
        blank=True,
        parameters={"pool": "files", "ü": "ß"},
    )
    facts = volume.device.stat()
    assert (facts.st_size, facts.st_blocks, facts.st_mode & 0o777) == (9 * MIB, 0, 0o600)
    assert folder.directory.stat().st_mode & 0o777 == 0o700
    folder.start()
    assert folder.create(name) == volume
    assert folder.backend.list_volumes(soon()) == [volume]
    assert folder.backend.open_for_export(volume, soon()) == volume
    folder.delete(name)
    folder.delete(name)
    assert folder.names() == [] and folder.backend.list_volumes(soon()) == []


def test_crash_at_each_step_of_create_and_delete(folder: Folder) -> None:
    ends = 0
    for step in range(1, 30):
        for act in ("create", "delete"):
            if act == "delete":
                folder.create()
            folder.start(boundary=CrashAt(step))
            try:
                folder.create() if act == "create" else folder.delete()
                ends += 1
            except Crash:
                pass
            folder.start()
            folder.backend.tend(soon())
            left = folder.names()
            volume_id = volume_id_of("one")
            assert left in ([], [f"{volume_id}.img", f"{volume_id}.json"]), f"{act} at {step}: {left}"
            volume = folder.create()
            assert volume.size_bytes == 8 * MIB and folder.backend.open_for_export(volume, soon()).blank
            folder.delete()
            assert folder.names() == []
        if ends >= 2:
            assert step > 5
            return
    pytest.fail("no end")


def test_retry_without_a_sweep(folder: Folder) -> None:
    """The same process goes on after a failure at any step."""
    for step in range(1, 12):
        folder.start(boundary=CrashAt(step))
        for _ in range(2):
            try:
                folder.create()
                folder.delete()
            except Crash:
                continue
        folder.create()
        folder.delete()
        assert [name for name in folder.names() if not name.startswith(".")] == []
    folder.start()
    folder.backend.tend(soon())
    assert folder.names() == []


def test_same_id_of_another_kind(folder: Folder) -> None:
    volume = folder.create()
    with pytest.raises(Busy):
        folder.backend.create(volume.volume_id, name="one", size_bytes=MIB, parameters={}, deadline=soon())
    with pytest.raises(ValueError, match="not a volume id"):
        folder.backend.create("../x", name="one", size_bytes=MIB, parameters={}, deadline=soon())
    assert folder.backend.find("../x", soon()) is None


def test_grow(folder: Folder) -> None:
    volume = folder.create()
    volume.device.write_bytes(b"data".ljust(8 * MIB, b"\1"))
    grown = folder.backend.grow(volume, size_bytes=12 * MIB, deadline=soon())
    assert grown.size_bytes == 12 * MIB == folder.create().size_bytes
    assert folder.backend.grow(volume, size_bytes=8 * MIB, deadline=soon()) == grown
    data = volume.device.read_bytes()
    assert data.startswith(b"data") and not data[8 * MIB :].strip(b"\0")


def test_blank_is_lost_for_good(folder: Folder) -> None:
    volume = folder.create(size_bytes=64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", volume.device], check=True)
    assert not folder.backend.open_for_export(volume, soon()).blank
    folder.backend.mark_used(volume)
    folder.backend.mark_used(volume)
    with volume.device.open("r+b") as file:
        file.write(bytes(1 << 20))
    folder.start()
    assert not folder.backend.open_for_export(volume, soon()).blank
    folder.delete()
    assert folder.create().blank


def test_room_is_what_can_really_be_filled(small: Folder) -> None:
    room = small.backend.capacity(soon()).available_bytes
    assert 60 * MIB < room < 64 * MIB
    volume = small.create(size_bytes=40 * MIB)
    assert small.backend.capacity(soon()).available_bytes == room - 40 * MIB
    volume.device.write_bytes(b"\1" * (40 * MIB))
    assert abs(small.backend.capacity(soon()).available_bytes - (room - 40 * MIB)) <= MIB, "filled or not is all one"
    with pytest.raises(NoSpace, match=r"30 MiB .*can still be promised"):
        small.create("two", size_bytes=30 * MIB)
    with pytest.raises(NoSpace):
        small.backend.grow(volume, size_bytes=70 * MIB, deadline=soon())
    (small.path / "somebody else").write_bytes(b"\1" * (20 * MIB))
    assert small.backend.capacity(soon()).available_bytes <= 4 * MIB
    small.start(ratio=2.0)
    small.create("two", size_bytes=30 * MIB)


def test_full_filesystem(small: Folder) -> None:
    volume = small.create(size_bytes=4 * MIB)
    with (small.path / "fill").open("wb") as file, pytest.raises(OSError):
        while True:
            file.write(b"\1" * MIB)
            file.flush()
    before = small.names()
    with pytest.raises(NoSpace):
        small.create("two", size_bytes=MIB)
    small.start(ratio=100.0)
    with pytest.raises(NoSpace):
        small.create("two", size_bytes=MIB)
    assert small.names() == before
    small.delete()
    assert small.backend.find(volume.volume_id, soon()) is None


def test_larger_than_the_filesystem_can_hold(folder: Folder) -> None:
    folder.start(ratio=1e12)
    with pytest.raises(OutOfRange, match="can't hold a file of that size"):
        folder.create(size_bytes=1 << 62)
    folder.start().tend(soon())
    assert folder.names() == []


def test_links_and_strangers_are_not_volumes(folder: Folder, tmp_path: Path) -> None:
    volume_id = volume_id_of("one")
    precious = tmp_path / "precious"
    precious.write_text("data")
    (folder.directory / f"{volume_id}.img").symlink_to(precious)
    (folder.directory / "README").touch()
    (folder.directory / "v-short.img").touch()
    (folder.directory / ".trash-x").touch()
    assert folder.backend.list_volumes(soon()) == []
    volume = folder.create()
    assert volume.device.is_file() and not volume.device.is_symlink()
    folder.backend.tend(soon())
    folder.delete()
    assert precious.read_text() == "data"
    assert folder.names() == [".trash-x", "README", "v-short.img"]


def test_image_without_its_record_is_kept(folder: Folder) -> None:
    volume = folder.create()
    volume.device.with_suffix(".json").unlink()
    folder.start()
    folder.backend.tend(soon())
    assert folder.backend.list_volumes(soon()) == []
    with pytest.raises(DataLoss, match="restore that file"):
        folder.backend.find(volume.volume_id, soon())
    assert volume.device.exists()


def test_record_of_a_used_volume_without_its_image_is_kept(folder: Folder) -> None:
    volume = folder.create()
    folder.backend.mark_used(volume)
    volume.device.unlink()
    folder.start()
    folder.backend.tend(soon())
    assert folder.names() == [f"{volume.volume_id}.json"]
    with pytest.raises(NotFound):
        folder.backend.open_for_export(volume, soon())


def test_an_empty_mount_point_is_not_the_pool(folder: Folder) -> None:
    folder.create()
    folder.directory.rename(folder.path / "elsewhere")
    folder.start()
    (problem,) = folder.backend.problems(soon())
    assert "is its filesystem mounted?" in problem
    folder.directory.mkdir()
    for backend in (folder.backend, folder.start()):
        (problem,) = backend.problems(soon())
        assert "not the directory that this pool was made in" in problem
        with pytest.raises(Unavailable):
            folder.create("two")
    folder.directory.rmdir()
    (folder.path / "elsewhere").rename(folder.directory)
    assert folder.backend.problems(soon()) == []
    assert len(folder.backend.list_volumes(soon())) == 1


def test_a_directory_is_of_one_pool(folder: Folder) -> None:
    volume = folder.create()
    other = FilesBackend("other", directory=folder.directory, state=folder.path / "other")
    (problem,) = other.problems(soon())
    assert problem.startswith(f"pool other: {folder.directory} holds the volumes of pool files -> give each pool")
    for act in (
        lambda: other.find(volume.volume_id, soon()),
        lambda: other.list_volumes(soon()),
        lambda: other.delete(volume, soon()),
        lambda: other.tend(soon()),
    ):
        with pytest.raises(Unavailable, match="holds the volumes of pool files"):
            act()
    folder.start()
    assert folder.backend.list_volumes(soon()) == [volume] and folder.backend.problems(soon()) == []


def test_directory_that_others_may_write(folder: Folder) -> None:
    folder.create()
    folder.directory.chmod(0o777)
    (problem,) = folder.backend.problems(soon())
    assert "chmod 0700" in problem


def test_read_only_filesystem(small: Folder) -> None:
    small.create(size_bytes=MIB)
    subprocess.run(["mount", "-o", "remount,ro", small.path], check=True)
    (problem,) = small.backend.problems(soon())
    assert "read-only" in problem
    with pytest.raises(Unavailable, match="Read-only"):
        small.create("two", size_bytes=MIB)
    with pytest.raises(Unavailable, match="Read-only"):
        small.delete()
    subprocess.run(["mount", "-o", "remount,rw", small.path], check=True)


@pytest.mark.root
def test_delete_while_a_loop_device_has_it(folder: Folder) -> None:
    volume = folder.create()
    done = subprocess.run(["losetup", "--find", "--show", volume.device], check=True, capture_output=True, text=True)
    try:
        with pytest.raises(InUse, match="still attached as /dev/loop"):
            folder.delete()
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)
    folder.delete()
    assert folder.names() == []


def test_sizes() -> None:
    backend = FilesBackend.round_size
    assert [backend(None, size) for size in (0, 1, MIB, MIB + 1)] == [MIB, MIB, MIB, 2 * MIB]  # type: ignore[arg-type]


def test_no_descriptor_is_left_open(folder: Folder) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(10):
        folder.create(f"n{number}", size_bytes=MIB)
        folder.backend.capacity(soon())
        folder.delete(f"n{number}")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
