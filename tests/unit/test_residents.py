"""Helper programs in a process that stays: as if each were a process of its own, only sooner."""

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi.connectors import iscsi
from csi.deadline import Deadline
from csi.errors import CommandFailed, Timeout
from csi.residents import helper
from csi.run import Result, SubprocessRunner

_TELL = "import os, sys; print(os.getpid(), *sys.argv[1:]); sys.stderr.write('words'); sys.exit(int(sys.argv[1]))"


class Helpers:
    """Helper programs in a folder, and a runner for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.runner = SubprocessRunner()

    def run(
        self, text: str, *arguments: str, fds: Sequence[int] = (), timeout: float = 20, changes: bool = True
    ) -> Result:
        program = self._folder / f"{abs(hash(text))}_helper.py"
        program.write_text(text)
        argv = [sys.executable, "-I", "-S", str(program), *arguments]
        return self.runner.run(
            argv, deadline=Deadline.after(20), ok=None, read_only=not changes, pass_fds=fds, timeout=timeout
        )

    def pid(self) -> int:
        return int(self.run(_TELL, "0").stdout.split()[0])


@pytest.fixture
def helpers(tmp_path: Path) -> Helpers:
    return Helpers(tmp_path)


def test_a_helper_gets_its_arguments_and_gives_its_words_and_code(helpers: Helpers) -> None:
    result = helpers.run(_TELL, "3", "a b")
    assert (result.returncode, result.stdout.split()[1:], result.stderr) == (3, ["3", "a", "b"], "words")


def test_the_process_stays(helpers: Helpers) -> None:
    assert helpers.pid() == helpers.pid() != os.getpid()


def test_an_error_of_a_helper_is_told_and_the_process_stays(helpers: Helpers) -> None:
    before = helpers.pid()
    result = helpers.run("raise RuntimeError('broken')")
    assert result.returncode == 1 and "RuntimeError: broken" in result.stderr
    assert helpers.run("import sys; sys.exit('no')").returncode == 1
    assert helpers.run("pass").returncode == 0
    assert helpers.pid() == before


def test_descriptors_have_the_numbers_that_the_caller_knows(helpers: Helpers, tmp_path: Path) -> None:
    """As paths below /proc/self/fd demand; several, in any order, and closed again afterwards."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    fds = [os.open(tmp_path / name, os.O_PATH) for name in ("two", "one")]
    text = "import sys; print(*(open(f'/proc/self/fd/{fd}/file').read() for fd in sys.argv[1:]))"
    count = "import os; print(len(os.listdir('/proc/self/fd')))"
    try:
        before = helpers.run(count).stdout
        for order in (fds, fds[::-1]):
            result = helpers.run(text, *map(str, order), fds=order)
            assert result.stdout.split() == ["two", "one"][:: 1 if order is fds else -1], result.stderr
        assert helpers.run(count).stdout == before
    finally:
        for fd in fds:
            os.close(fd)


def test_descriptors_of_high_numbers_are_not_mixed_up(helpers: Helpers, tmp_path: Path) -> None:
    fds: list[int] = []
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        with (tmp_path / name).open() as file:
            fds.append(fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 513 + len(fds)))
    try:
        text = "import os, sys; print(*(os.pread(int(fd), 9, 0).decode() for fd in sys.argv[1:]))"
        for order in (fds, fds[::-1]):
            said = helpers.run(text, *map(str, fds), fds=order).stdout.strip()
            assert said == "one two"
    finally:
        for fd in fds:
            os.close(fd)


def test_one_that_hangs_is_killed_and_another_takes_its_place(helpers: Helpers) -> None:
    before = helpers.pid()
    began = time.monotonic()
    with pytest.raises(Timeout, match="was killed"):
        helpers.run("import time; time.sleep(60)", timeout=0.2)
    assert time.monotonic() - began < 5
    assert helpers.pid() != before and not Path(f"/proc/{before}").exists()


def test_one_that_was_killed_while_idle_costs_nothing(helpers: Helpers) -> None:
    os.kill(helpers.pid(), signal.SIGKILL)
    time.sleep(0.1)
    assert helpers.run(_TELL, "0").returncode == 0


def test_one_that_dies_at_work_ends_as_its_process_would(helpers: Helpers) -> None:
    result = helpers.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode == -signal.SIGKILL
    assert helpers.run("pass").returncode == 0


def test_the_end_of_the_service_ends_a_look(helpers: Helpers) -> None:
    helpers.pid()
    ending = threading.Timer(0.3, helpers.runner.end_read_only)
    ending.start()
    began = time.monotonic()
    assert helpers.run("import time; time.sleep(60)", changes=False).returncode == -signal.SIGKILL
    assert time.monotonic() - began < 10
    ending.join()


def test_several_at_once_do_not_wait_for_each_other(helpers: Helpers) -> None:
    text = "import os, time; time.sleep(0.5); print(os.getpid())"
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        pids = {job.result().stdout for job in [pool.submit(helpers.run, text) for _ in range(4)]}
    assert len(pids) == 4 and time.monotonic() - began < 2.0 + 2.0


def test_residents_end_with_their_runner(helpers: Helpers) -> None:
    pid = helpers.pid()
    helpers.runner = SubprocessRunner()
    assert not Path(f"/proc/{pid}").exists()


def test_what_the_caller_hands_in_is_standard_input(helpers: Helpers, tmp_path: Path) -> None:
    """Of the driver's own program for sysfs: it makes no file, and says which one is not there."""
    attribute = tmp_path / "attribute"
    attribute.write_text("something long")
    write = helper(iscsi.__file__, "attribute_helper.py")

    def run(path: Path) -> Result:
        return helpers.runner.run([*write, str(path)], deadline=Deadline.after(5), input="1\n")

    run(attribute)
    assert attribute.read_text() == "1\n"
    with pytest.raises(CommandFailed, match=f"attribute_helper {tmp_path}/none .*No such file"):
        run(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_can_not_be_flushed_is_told(helpers: Helpers, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flush = helper(iscsi.__file__, "flush_helper.py")
    with pytest.raises(CommandFailed, match=r"flush_helper .*file: Inappropriate ioctl"):
        helpers.runner.run([*flush, str(tmp_path / "file")], deadline=Deadline.after(5))
