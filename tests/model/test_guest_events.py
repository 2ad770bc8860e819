"""What the model does to commands on real kernels, tried on processes of this machine."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import csi
from tests.model.guest_events import KILL_CHILDREN

#: A driver that has one idle helper process, a zombie, and maybe a command.
_DRIVER = """
import subprocess, sys, time
from csi.residents import Resident
idle = Resident(lambda argv, theirs: subprocess.Popen(list(argv), stdin=theirs.fileno()))
zombie = subprocess.Popen(["true"])
others = [subprocess.Popen(argv.split()) for argv in sys.argv[1:]]
time.sleep(0.5)
print(idle.group, zombie.pid, *(other.pid for other in others), flush=True)
print(*(other.wait() for other in others), flush=True)
sys.stdin.read()
idle.send([*"123", "/dev/null"], "", [])  # still there
print(*idle.receive(60)[:1], flush=True)
"""


@contextmanager
def _driver(*commands: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, *commands],
        cwd=Path(csi.__file__).parents[1], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def _strike(driver: "subprocess.Popen[str]") -> tuple[int, str]:
    line = f"driver={driver.pid}\n{KILL_CHILDREN}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def test_a_command_dies_and_the_helpers_that_stay_do_not() -> None:
    with _driver("sleep 60", "sleep 61") as driver:
        assert driver.stdin and driver.stdout
        driver.stdout.readline()
        assert _strike(driver) == (0, "sleep 60\nsleep 61\n")
        assert driver.stdout.readline() == "-9 -9\n"
        driver.stdin.close()
        assert driver.stdout.readline() == "0\n"


def test_where_no_command_runs_nothing_dies_and_that_is_told() -> None:
    with _driver() as driver:
        assert driver.stdin and driver.stdout
        driver.stdout.readline()
        began = time.monotonic()
        assert _strike(driver) == (1, "")
        assert time.monotonic() - began > 0.4  # one that comes soon would have died
        driver.stdout.readline()
        driver.stdin.close()
        assert driver.stdout.readline() == "0\n"
