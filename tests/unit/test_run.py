"""The Runner on real processes."""

import os
import signal
import time
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import CommandFailed, Timeout, Unavailable
from csi.run import SubprocessRunner


@pytest.fixture
def runner() -> SubprocessRunner:
    return SubprocessRunner()


def test_output_and_environment(runner: SubprocessRunner) -> None:
    result = runner.run(["env"], deadline=Deadline.after(5), read_only=True)
    names = {line.split("=")[0] for line in result.stdout.splitlines()}
    assert names == {"PATH", "LC_ALL", "LVM_SUPPRESS_FD_WARNINGS", "LIBMOUNT_FORCE_MOUNT2"}


def test_stdin_is_closed_unless_input_is_given(runner: SubprocessRunner) -> None:
    assert runner.run(["cat"], deadline=Deadline.after(5)).stdout == ""
    assert runner.run(["cat"], deadline=Deadline.after(5), input="secret").stdout == "secret"


def test_unexpected_exit_code_names_the_command_and_its_words(runner: SubprocessRunner) -> None:
    with pytest.raises(CommandFailed, match=r"ls --no-such-option.*ended with 2.*unrecognized option"):
        runner.run(["ls", "--no-such-option"], deadline=Deadline.after(5))
    assert runner.run(["false"], deadline=Deadline.after(5), ok=frozenset({1})).returncode == 1
    assert runner.run(["false"], deadline=Deadline.after(5), ok=None).returncode == 1


def test_missing_program_is_unavailable_and_named(runner: SubprocessRunner) -> None:
    with pytest.raises(Unavailable, match="no-such-program"):
        runner.run(["no-such-program"], deadline=Deadline.after(5))


def test_a_program_is_looked_for_where_it_would_be_run_from(runner: SubprocessRunner) -> None:
    assert runner.has("env")
    assert not runner.has("no-such-program")


def test_read_only_command_ends_with_its_grandchildren(runner: SubprocessRunner, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {pid_file}; wait"
    began = time.monotonic()
    with pytest.raises(Timeout, match="sh did not end"):
        runner.run(["sh", "-c", script], deadline=Deadline.after(0.5), read_only=True)
    assert time.monotonic() - began < 5
    pid = int(pid_file.read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the grandchild outlived the command")


def test_changing_command_outlives_the_deadline(runner: SubprocessRunner, tmp_path: Path) -> None:
    done = tmp_path / "done"
    runner.run(["sh", "-c", f"sleep 0.4; touch {done}"], deadline=Deadline.after(0.1))
    assert done.exists()


def test_changing_command_is_not_begun_without_time(runner: SubprocessRunner, tmp_path: Path) -> None:
    with pytest.raises(Timeout):
        runner.run(["touch", str(tmp_path / "done")], deadline=Deadline.after(0))
    assert not (tmp_path / "done").exists()


def test_changing_command_ends_by_its_own_timeout(runner: SubprocessRunner) -> None:
    with pytest.raises(Timeout, match="was killed"):
        runner.run(["sleep", "60"], deadline=Deadline.after(60), timeout=0.2)


def test_boundaries_are_passed_around_changing_commands_only() -> None:
    seen: list[str] = []
    runner = SubprocessRunner(boundary=seen.append)
    runner.run(["true"], deadline=Deadline.after(5), read_only=True)
    assert seen == []
    runner.run(["/bin/true"], deadline=Deadline.after(5))
    assert seen == ["true:before", "true:after"]


def test_chatty_streams_do_not_block(runner: SubprocessRunner) -> None:
    script = "head -c 300000 /dev/zero | tr '\\0' e >&2; head -c 300000 /dev/zero | tr '\\0' o"
    result = runner.run(["sh", "-c", script], deadline=Deadline.after(20))
    assert (len(result.stdout), len(result.stderr)) == (300000, 300000)
