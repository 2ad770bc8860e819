"""What a killed test leaves is swept by the next one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.leftovers import all_below, loops_below, mounts_below
from tests.scratch_folder import scratch_folder, sweep

_PROJECT = Path(__file__).resolve().parents[2]
_OWNER = """
import subprocess, sys, time
from pathlib import Path
from tests.scratch_folder import scratch_folder
with scratch_folder("owner", base=Path(sys.argv[1])) as folder:
    image, point = folder / "image", folder / "mounted"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    (point / "file").touch()
    subprocess.run(["losetup", "--find", image], check=True)
    print(folder, flush=True)
    time.sleep(600)
"""


@contextmanager
def _owner(base: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that has a folder, with a filesystem mounted and another loop device."""
    argv = [sys.executable, "-c", _OWNER, os.fspath(base)]
    with subprocess.Popen(argv, cwd=_PROJECT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            folder = Path(process.stdout.readline().strip())
            assert mounts_below(folder) and len(loops_below(folder)) == 2
            yield process, folder
        finally:
            process.kill()


def test_the_next_one_sweeps_what_a_killed_owner_left(tmp_path: Path) -> None:
    with _owner(tmp_path) as (owner, folder):
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert folder.exists() and all_below(folder)
    with scratch_folder("next", base=tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]
        assert not all_below(folder)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_living_owner_stays(tmp_path: Path) -> None:
    with _owner(tmp_path) as (_, folder):
        assert sweep(tmp_path) == []
        with scratch_folder("own", base=tmp_path):
            assert sweep(tmp_path) == []
        assert (folder / "mounted/file").exists()
    assert sweep(tmp_path) == [folder]


def test_what_is_still_in_use_waits_for_a_later_sweep(tmp_path: Path) -> None:
    with _owner(tmp_path) as (_, folder):
        pass
    with (folder / "mounted/file").open():
        assert sweep(tmp_path) == []
        assert (folder / "image").exists()
    assert sweep(tmp_path) == [folder]
    assert not all_below(folder)


def test_what_is_not_a_folder_of_ours_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (tmp_path / "snode-test-link").symlink_to(elsewhere)
    (tmp_path / "snode-test-file").touch()
    stranger = tmp_path / "snode-test-stranger"
    stranger.mkdir()
    os.chown(stranger, 12345, 12345)
    assert sweep(tmp_path) == []
    assert stranger.exists() and (elsewhere / "file").exists() and (tmp_path / "snode-test-link").is_symlink()
