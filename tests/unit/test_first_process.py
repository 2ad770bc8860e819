"""Process 1 of a real process namespace, as a container's is."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi.deadline import Deadline, wait_until
from tests.driver import PROJECT

pytestmark = pytest.mark.root

_START = "from csi.first_process import divide, divided; divide(); import os, signal, sys, time\n"
_ORPHANS = """
for _ in range(5):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.05)
        os._exit(0)
    os.wait()
states = lambda: [open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
                  for pid in os.listdir("/proc") if pid.isdigit()]
end = time.monotonic() + 10
while len(states()) > 2 and time.monotonic() < end:
    time.sleep(0.02)
print(states(), os.getppid(), divided(), flush=True)
"""


@contextmanager
def _first(*argv: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """`argv` as process 1: what started it, which ends as it does, and its process id here."""
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *argv]
    with subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as outer:
        try:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            wait_until(lambda: bool(children.read_text().split()), Deadline.after(10), what="process 1")
            yield outer, int(children.read_text().split()[0])
        finally:
            outer.kill()


def _python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", _START + code


def _said(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"{words!r} was not said, but {''.join(seen)}")


def test_its_exit_code_is_the_drivers() -> None:
    with _first(*_python("sys.exit(7)")) as (outer, _):
        assert outer.wait(10) == 7


def test_a_driver_that_is_killed_ends_it() -> None:
    with _first(*_python("os.kill(os.getpid(), 9)")) as (outer, _):
        assert outer.wait(10) == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_driver(number: signal.Signals) -> None:
    code = f"signal.signal({number}, lambda *_: sys.exit(3)); print('up', flush=True); time.sleep(60)"
    with _first(*_python(code)) as (outer, first):
        _said(outer, "up")
        subprocess.run(["kill", f"-{number}", str(first)], check=True)
        assert outer.wait(10) == 3


def test_a_driver_that_did_not_yet_ask_for_signals_ends_by_them() -> None:
    with _first(*_python("print('up', flush=True); time.sleep(60)")) as (outer, first):
        _said(outer, "up")
        subprocess.run(["kill", str(first)], check=True)
        assert outer.wait(10) == 128 + signal.SIGTERM


def test_orphans_are_taken_in() -> None:
    with _first(*_python(_ORPHANS)) as (outer, _):
        _said(outer, "['S', 'R'] 1 True")
        assert outer.wait(10) == 0


def test_other_processes_are_left_alone() -> None:
    code = _START + "print(os.getpid() == int(sys.argv[1] or 0), divided())"
    done = subprocess.run([sys.executable, "-c", code, ""], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


def test_the_driver_as_process_1_ends_cleanly(tmp_path: Path) -> None:
    (tmp_path / "snode.toml").write_text(
        f'state_dir = "{tmp_path}/state"\n[pools.p]\ntype = "files"\ndirectory = "{tmp_path}/pool"\n'
    )
    config = ["--config", str(tmp_path / "snode.toml"), "--endpoint", f"unix://{tmp_path}/csi.sock"]
    with _first(sys.executable, "-m", "csi", "all", *config) as (outer, first):
        _said(outer, "serving")
        probe = [sys.executable, "-m", "csi", "probe", *config]
        assert subprocess.run(probe, cwd=PROJECT, capture_output=True, text=True, check=True).stdout == "ready\n"
        subprocess.run(["kill", str(first)], check=True)
        _said(outer, "stopping")
        assert outer.wait(10) == 0


def test_the_hosts_tools_are_refused_to_process_1(tmp_path: Path) -> None:
    argv = ["env", "SNODE_TOOLS=host", sys.executable, "-m", "csi", "all", "--state-dir", f"{tmp_path}/state"]
    with _first(*argv, "--endpoint", f"unix://{tmp_path}/csi.sock") as (outer, _):
        _said(outer, "process 1 is this driver itself")
        assert outer.wait(10) == 1
