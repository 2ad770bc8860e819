import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import DriverError, InUse, Invalid
from csi.fs import paths
from tests.unit.fs.conftest import swapping


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("relative/path", "absolute"),
        ("", "absolute"),
        (".", "absolute"),
        ("-x", "absolute"),
        ("//double", "absolute"),
        ("/", "root folder"),
        ("/a/../etc", r"\.\."),
        ("/..", r"\.\."),
        ("/a/..", r"\.\."),
        ("/a\0b", "NUL"),
        ("/" + "x" * 256, "255"),
        ("/" + "x/" * 3000, "4095"),
        ("/\ud800", "Unicode"),
        ("/etc", "system"),
        ("/etc/cron.d", "system"),
        ("/proc/1/root/x", "system"),
        ("/sys/x", "system"),
        ("/dev/shm/x", "system"),
        ("/usr/local/x", "system"),
        ("/lib64/x", "system"),
        ("/boot", "system"),
        ("/./etc//x", "system"),
    ],
)
def test_a_path_that_is_no_target_is_refused(path: str, why: str) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        paths.check_target(Path(path))
    assert len(str(caught.value)) < 600


def test_a_path_must_lie_under_a_root_when_roots_are_given(tmp_path: Path) -> None:
    root = tmp_path / "kubelet"
    paths.check_target(root / "pods/a/mount", roots=[Path("/other"), root])
    for outside in (tmp_path / "kubelet2/x", tmp_path / "x", root):
        with pytest.raises(Invalid, match=r"node\.target_roots"):
            paths.check_target(outside, roots=[root])


def test_paths_that_do_not_exist_yet_are_fine(tmp_path: Path) -> None:
    paths.check_target(tmp_path / "not/yet/there")
    paths.check_target(tmp_path)


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_at_any_component_is_refused_by_everything(tmp_path: Path, depth: int, dangling: bool) -> None:
    names = ["a", "b", "c", "d"]
    elsewhere = tmp_path / "elsewhere"
    if not dangling:
        (elsewhere / "/".join(names[depth + 1 :])).mkdir(parents=True)
    link = tmp_path.joinpath("real", *names[: depth + 1])
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    path = tmp_path.joinpath("real", *names)
    before = sorted(tmp_path.rglob("*"))
    attempts: list[Callable[[Path], None]] = [
        paths.check_target,
        paths.ensure_directory,
        paths.ensure_file,
        paths.remove_target,
    ]
    for attempt in attempts:
        with pytest.raises(Invalid, match="symbolic link"):
            attempt(path)
    with pytest.raises(Invalid, match="symbolic link"), paths.opened(path):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_racing_swap_of_a_component_never_leads_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    pod = tmp_path / "pod"
    pod.mkdir()
    refused = made = 0
    with swapping(pod, victim):
        for number in range(3000):
            try:
                paths.ensure_directory(pod / f"t{number % 7}" / "mount")
                paths.ensure_file(pod / f"t{number % 7}" / "file")
                paths.remove_target(pod / f"t{number % 7}" / "file")
                paths.remove_target(pod / f"t{number % 7}" / "mount")
                made += 1
            except Invalid:
                refused += 1
            assert list(victim.iterdir()) == []
    assert made and refused


def test_ensure_directory_makes_parents_with_narrow_modes_and_repeats(tmp_path: Path) -> None:
    target = tmp_path / "a/b/c"
    for _ in range(2):
        paths.ensure_directory(target)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (target, target.parent)} == {0o750}
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(Invalid, match="not a folder"):
            paths.ensure_directory(path)


def test_ensure_file_makes_an_empty_file_and_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "a/b/device"
    for _ in range(2):
        paths.ensure_file(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    target.write_text("kept")
    paths.ensure_file(target)
    assert target.read_text() == "kept"
    with pytest.raises(Invalid, match="is a folder"):
        paths.ensure_file(tmp_path / "a")


def test_remove_target_takes_only_what_is_empty(tmp_path: Path) -> None:
    paths.ensure_directory(tmp_path / "a/folder")
    paths.ensure_file(tmp_path / "a/file")
    for name in ("folder", "file"):
        for _ in range(2):
            paths.remove_target(tmp_path / "a" / name)
        assert not (tmp_path / "a" / name).exists()
    paths.remove_target(tmp_path / "never/was/there")
    (tmp_path / "a/file").write_text("data")
    for path in (tmp_path / "a", tmp_path / "a/file"):
        with pytest.raises(InUse):
            paths.remove_target(path)
    assert (tmp_path / "a/file").read_text() == "data"


def test_remove_target_refuses_what_is_neither_folder_nor_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InUse):
        paths.remove_target(tmp_path / "pipe")


@given(st.text(max_size=80))
def test_any_text_is_taken_or_refused_with_an_error_of_ours(text: str) -> None:
    try:
        paths.check_target(Path("/nowhere") / text)
        paths.check_target(Path(text))
    except DriverError as error:
        assert isinstance(error, Invalid)
