"""`snode demo` as a user runs it: every step, on this machine's own kernel, and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver import PROJECT
from tests.leftovers import all_below

STEPS = ["start", "create", "publish", "stage", "mount", "write", "read", "grow", "grow fs", "unmount", "unstage",
         "unpublish", "delete"]  # fmt: skip


def _demo(**changes: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "csi", "demo"],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **changes},
        timeout=120,
        check=False,
    )


@pytest.mark.timeout(180)
def test_demo_walks_every_step_and_leaves_nothing() -> None:
    before = set(Path("/var/tmp").glob("snode-demo-*"))
    done = _demo()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " s " in line and line.strip()[0].isdigit()]
    assert [line[9:19].strip() for line in lines] == STEPS
    assert "left behind: nothing" in done.stdout
    assert done.stderr == ""
    assert set(Path("/var/tmp").glob("snode-demo-*")) == before
    assert not [left for left in all_below(Path("/var/tmp")) if "snode-demo-" in left]


def test_demo_without_root_says_so() -> None:
    code = "import os; from csi.demo import main; os.setuid(65534); raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "snode demo: needs root, since it makes devices and mounts; run it with sudo."


def test_demo_without_a_tool_names_it(tmp_path: Path) -> None:
    code = (
        "import csi.run; csi.run.SEARCH_PATH = '/nonexistent'\n"
        "from csi.demo import main; raise SystemExit(main())"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "program not found" in done.stderr


def test_demo_without_loop_devices_says_so(tmp_path: Path) -> None:
    before = set(Path("/var/tmp").glob("snode-demo-*"))
    (tmp_path / "null").touch()
    hide = f"mount --bind /dev/null {tmp_path}/null && mount --rbind {tmp_path} /dev"
    argv = ["unshare", "--mount", "--", "sh", "-c", f"{hide} && exec {sys.executable} -m csi demo"]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("snode demo: /dev/loop-control is missing: no loop devices")
    assert len(done.stderr.splitlines()) == 1
    assert set(Path("/var/tmp").glob("snode-demo-*")) == before
