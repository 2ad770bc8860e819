"""Running the host's tools: the only place where the driver starts processes.

No shell, no preexec_fn (deadly beside gRPC threads), a process group for each child so that grandchildren end with it,
stdin closed, a minimal environment. Secrets are never in argv: they go through `input` or files.
"""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from csi.deadline import Deadline
from csi.errors import CommandFailed, Timeout, Unavailable
from csi.first_process import divided
from csi.log import get_logger
from csi.residents import Residents, is_helper

#: Called with a name before and after each step that changes the world; tests stop the process there.
Boundary = Callable[[str], None]

#: Where programs are looked for, whatever PATH the driver was started with.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KILL_AFTER_SECONDS = 5.0
#: The host's root folder, as a container with the host's process namespace sees it.
HOST_ROOT = Path("/proc/1/root")
#: The host's tools need its mounts, LVM's semaphores (ipc) and iscsid's socket, which is in no folder (net).
_ENTER_HOST = ("nsenter", "--target=1", "--mount", "--ipc", "--net", "--")
_ENVIRONMENT = {
    "PATH": SEARCH_PATH,
    "LC_ALL": "C",
    "LVM_SUPPRESS_FD_WARNINGS": "1",
    # mount(8) of util-linux 2.39 and later uses system calls that do not follow /proc/self/fd/N, which targets are
    # mounted by so that nobody can swap their path; the older mount(2) does.
    "LIBMOUNT_FORCE_MOUNT2": "always",
}


def no_boundary(_name: str) -> None:
    """The boundary of production: nothing happens."""


@contextmanager
def step(boundary: Boundary, name: str) -> Iterator[None]:
    """Around one change of the world: passes the boundary before it, and after it unless it failed."""
    boundary(f"{name}:before")
    yield
    boundary(f"{name}:after")


def step_name(argv: Sequence[str]) -> str:
    """What a command's boundaries are called: the program, or the name of our own helper that Python runs."""
    return Path(argv[3]).stem if is_helper(argv) else Path(argv[0]).name


@dataclass(frozen=True)
class Result:
    """What a finished command left behind."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


class Runner(Protocol):
    """Runs one command to its end."""

    def run(
        self,
        argv: Sequence[str],
        *,
        deadline: Deadline,
        read_only: bool = False,
        ok: frozenset[int] | None = frozenset({0}),
        input: str | None = None,
        timeout: float = 60.0,
        pass_fds: Sequence[int] = (),
    ) -> Result:
        """Run `argv` and return its Result.

        read_only: the command changes nothing, so it is killed when the deadline comes. A changing command is started
        only while there is time, and then ends by itself or by its own `timeout` in seconds.
        ok: the exit codes that mean success; None accepts all.
        Raises CommandFailed for another exit code, Timeout when the command had to be killed, Unavailable when the
        program is missing.
        """
        ...

    def has(self, program: str) -> bool:
        """Whether the program is there. Starts no process."""
        ...


class SubprocessRunner:
    """The Runner of production."""

    def __init__(self, *, boundary: Boundary = no_boundary, host_tools: bool = False) -> None:
        """host_tools: in a container, run the host's tools among the host's mounts, not the image's.

        They match the host's kernel, udev and iscsid, and wait for each other by its semaphores and locks.
        """
        self._boundary = boundary
        self._host_tools = host_tools
        self._log = get_logger("run")
        self._read_only: set[int] = set()  # process groups
        self._guard = threading.Lock()
        self._residents = Residents(_start_resident)

    def run(
        self,
        argv: Sequence[str],
        *,
        deadline: Deadline,
        read_only: bool = False,
        ok: frozenset[int] | None = frozenset({0}),
        input: str | None = None,
        timeout: float = 60.0,
        pass_fds: Sequence[int] = (),
    ) -> Result:
        """See Runner.run."""
        name = step_name(argv)
        deadline.check(f"run {name}")
        if not read_only:
            self._boundary(f"{name}:before")
        began = time.monotonic()
        limit = min(timeout, deadline.remaining()) if read_only else timeout
        if is_helper(argv):
            result, killed = self._run_resident(argv, input, limit, pass_fds, read_only=read_only)
        else:
            result, killed = self._run_process(argv, input, limit, pass_fds, read_only=read_only)
        if not read_only:
            self._boundary(f"{name}:after")
        self._log.debug("command", argv=list(argv), rc=result.returncode, ms=round((time.monotonic() - began) * 1000))
        if killed:
            raise Timeout(f"{name} did not end within {limit:.0f} s and was killed; the request can be repeated")
        if ok is not None and result.returncode not in ok:
            raise failed(result)
        return result

    def _run_process(
        self, argv: Sequence[str], input: str | None, limit: float, pass_fds: Sequence[int], *, read_only: bool
    ) -> tuple[Result, bool]:
        process = self._start(argv, input is not None, pass_fds)
        with self._endable(process.pid, read_only=read_only):
            out, err, killed = _finish(process, input, limit)
        return Result(tuple(argv), process.returncode, out, err), killed

    def _run_resident(
        self, argv: Sequence[str], input: str | None, limit: float, pass_fds: Sequence[int], *, read_only: bool
    ) -> tuple[Result, bool]:
        """As a process of its own would: a resident that hangs is killed, and its end is waited for."""
        resident = self._residents.begin(argv, input or "", pass_fds)
        killed = False
        with self._endable(resident.group, read_only=read_only):
            try:
                result = Result(tuple(argv), *resident.receive(limit))
            except (TimeoutError, EOFError) as error:
                killed = isinstance(error, TimeoutError)
                if killed:
                    _signal_group(resident.group, signal.SIGKILL)
                return Result(tuple(argv), resident.end(), "", ""), killed
            except BaseException:
                # Nobody may go on while it may still be at work.
                _signal_group(resident.group, signal.SIGKILL)
                resident.end()
                raise
        self._residents.give_back(resident)
        return result, killed

    @contextmanager
    def _endable(self, group: int, *, read_only: bool) -> Iterator[None]:
        """While the block lasts, `end_read_only` finds this process group if it is one that changes nothing."""
        if read_only:
            with self._guard:
                self._read_only.add(group)
        try:
            yield
        finally:
            with self._guard:
                self._read_only.discard(group)

    def has(self, program: str) -> bool:
        """See Runner.has."""
        return _which(program, host=self._host_tools) is not None

    def end_read_only(self) -> None:
        """End the running commands that change nothing; called when the service stops."""
        with self._guard:
            for group in self._read_only:
                _signal_group(group, signal.SIGKILL)

    def _command(self, argv: Sequence[str]) -> list[str]:
        """What is really started. Programs of our own, which are given by their path, stay in the container."""
        if not self._host_tools or "/" in argv[0]:
            return [find_program(argv[0]), *argv[1:]]
        return [find_program(_ENTER_HOST[0]), *_ENTER_HOST[1:], find_program(argv[0], host=True), *argv[1:]]

    def _start(self, argv: Sequence[str], has_input: bool, pass_fds: Sequence[int]) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self._command(argv),
            stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=_ENVIRONMENT,
            cwd="/",
            process_group=0,
            pass_fds=tuple(pass_fds),
        )


def find_program(name: str, *, host: bool = False) -> str:
    """The path of a program, on the host if that is asked for. Raises Unavailable when it is missing."""
    program = _which(name, host=host)
    if program is None:
        where = " on the host" if host else ""
        raise Unavailable(
            f"{name}: program not found{where}; install the package that has it (snode doctor says which)"
        )
    return program


def _which(name: str, *, host: bool) -> str | None:
    if not host or "/" in name:
        return shutil.which(name, path=SEARCH_PATH)
    # The link itself counts: where it leads is for the host to say, and an absolute one leads elsewhere from here.
    places = (Path(folder) / name for folder in SEARCH_PATH.split(":"))
    return next((str(place) for place in places if os.path.lexists(HOST_ROOT / place.relative_to("/"))), None)


def host_problem() -> str:
    """Why the host's tools can't be run from here, as `what -> the repair`; "" when they can."""
    if divided():
        return (
            "tools = host: process 1 is this driver itself, so the container has a process namespace of its own -> "
            'hostPID: true (Kubernetes), pid_mode = "host" (Nomad), --pid=host (docker)'
        )
    try:
        Path("/proc/1/ns/mnt").stat()
    except OSError as error:
        return f"tools = host: /proc/1/ns/mnt can't be reached ({error.strerror}) -> run the container privileged"
    return ""


def failed(result: Result) -> CommandFailed:
    """The error for a command that ended with an exit code nobody expected."""
    words = (result.stderr.strip() or result.stdout.strip() or "no output")[-1000:]
    arguments = result.argv[4:6] if is_helper(result.argv) else result.argv[1:3]
    return CommandFailed(f"{' '.join((step_name(result.argv), *arguments))} … ended with {result.returncode}: {words}")


def _finish(process: "subprocess.Popen[str]", input: str | None, limit: float) -> tuple[str, str, bool]:
    """Wait for the end; kill the group when `limit` seconds are over. Returns stdout, stderr, killed.

    A child in uninterruptible sleep does not die: the wait then lasts until the kernel lets go, on purpose, since the
    caller's volume lock must outlive the child (an umount that completes later must not hit a new mount).
    """
    try:
        out, err = process.communicate(input, timeout=limit)
        return out, err, False
    except subprocess.TimeoutExpired:
        _signal_group(process.pid, signal.SIGTERM)
    try:
        out, err = process.communicate(timeout=_KILL_AFTER_SECONDS)
    except subprocess.TimeoutExpired:
        _signal_group(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return out, err, True


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it ended by itself in this moment
        os.killpg(group, number)


def _start_resident(argv: Sequence[str], connection: socket.socket) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        list(argv),
        stdin=connection.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT,
        cwd="/",
        process_group=0,
    )
