"""Records survive crashes, refuse what they do not understand, and leave nothing."""

import errno
import os
from pathlib import Path

import pytest

from csi.errors import DataLoss, NoSpace
from csi.records import RecordStore
from tests.fakes.crash import Crash, CrashAt


def test_write_read_remove(tmp_path: Path) -> None:
    records = RecordStore(tmp_path / "r")
    assert records.read("v-a") is None
    records.write("v-a", {"x": "ä"})
    records.write("v-a", {"x": 2})
    assert records.read("v-a") == {"format": 1, "x": 2}
    assert records.names() == ["v-a"]
    records.remove("v-a")
    records.remove("v-a")
    assert list((tmp_path / "r").iterdir()) == []


def test_only_root_reads_them(tmp_path: Path) -> None:
    records = RecordStore(tmp_path / "r")
    records.write("v-a", {})
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "r" / "v-a.json").stat().st_mode & 0o777 == 0o600


def test_crash_at_every_point_leaves_the_old_or_the_new_record(tmp_path: Path) -> None:
    count = CrashAt()
    (tmp_path / "count").mkdir()
    RecordStore(tmp_path / "count", boundary=count).write("v-a", {"x": 1})
    steps = len(count.names)
    assert count.names == [f"record:{at}" for at in ("before", "written", "synced", "renamed", "after")]
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        RecordStore(folder).write("v-a", {"x": "old"})
        with pytest.raises(Crash):
            RecordStore(folder, boundary=CrashAt(step)).write("v-a", {"x": "new"})
        record = RecordStore(folder).read("v-a")
        assert record is not None
        assert record["x"] == ("new" if step >= steps - 1 else "old")
        assert [path.name for path in folder.iterdir()] == ["v-a.json"]


def test_full_disk_is_no_space_and_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = RecordStore(tmp_path)
    records.write("v-a", {"x": "old"})

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match=r"v-a\.json"):
        records.write("v-a", {"x": "new"})
    assert records.read("v-a") == {"format": 1, "x": "old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x":1}', b'{"format":"1"}', b'{"format":2}', b"\xff"])
def test_damaged_or_newer_record_is_data_loss_and_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v-a.json").write_bytes(content)
    with pytest.raises(DataLoss, match=r"v-a\.json"):
        RecordStore(tmp_path).read("v-a")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "A", "a\0b", "x" * 200])
def test_names_that_are_not_ours_never_become_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="record name"):
        RecordStore(tmp_path).write(name, {})
