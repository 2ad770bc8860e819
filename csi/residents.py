"""Helper processes that stay: a bare Python is started once, and then does one small piece of work after another.

What may hang in the kernel (a look at a device, an unmount, a write to sysfs) is done by a process of its own, since a
thread of the service that hangs would keep it from ending. To start an interpreter for each takes much longer than the
work. So a resident is used again; one that hangs is killed and given up, and another takes its place.
"""

import array
import json
import socket
import subprocess  # noqa: TID251 - for the type; run.py starts them
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

#: Without site-packages, so that it starts fast, and without what the environment says.
_PYTHON = (sys.executable, "-I", "-S")
_MOST_BYTES = 1 << 20
#: How many stay while there is nothing to do.
_MOST_IDLE = 2

#: Starts a program with this socket as its standard input.
Start = Callable[[Sequence[str], socket.socket], "subprocess.Popen[bytes]"]


def helper(beside: str, name: str) -> tuple[str, ...]:
    """The command of a helper program of ours, `name` in the folder of the file `beside`; arguments go after it."""
    return (*_PYTHON, str(Path(beside).with_name(name)))


def is_helper(argv: Sequence[str]) -> bool:
    """Whether this is a command that `helper` made, which a resident can do."""
    return tuple(argv[: len(_PYTHON)]) == _PYTHON


_PROGRAM = helper(__file__, "resident_helper.py")


class Resident:
    """One helper process. Does one thing at a time."""

    def __init__(self, start: Start) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = start(_PROGRAM, theirs)

    @property
    def group(self) -> int:
        """Its process group."""
        return self._process.pid

    def send(self, argv: Sequence[str], input: str, fds: Sequence[int]) -> None:
        """Ask for a command. Raises BrokenPipeError when the process is gone, so that nothing was done."""
        data = json.dumps({"argv": list(argv[len(_PYTHON) :]), "input": input, "fds": list(fds)}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([data], rights)

    def receive(self, seconds: float) -> tuple[int, str, str]:
        """Exit code, stdout and stderr. Raises TimeoutError when it takes longer, EOFError when the process ended."""
        self._socket.settimeout(max(0.001, seconds))
        try:
            data = self._socket.recv(_MOST_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        answer = json.loads(data)
        return answer["returncode"], answer["stdout"], answer["stderr"]

    def end(self) -> int:
        """Let go of it and wait for its end; returns its exit code, negative if a signal ended it."""
        self._socket.close()
        return self._process.wait()


class Residents:
    """The residents of one runner; started when they are needed."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._guard = threading.Lock()
        self._idle: list[Resident] = []
        weakref.finalize(self, _end_all, self._idle)

    def begin(self, argv: Sequence[str], input: str, fds: Sequence[int]) -> Resident:
        """Hand a command to a resident. It comes back with `give_back`, or is ended by the caller."""
        while True:
            with self._guard:
                resident = self._idle.pop() if self._idle else None
            new = resident is None
            resident = resident or Resident(self._start)
            try:
                resident.send(argv, input, fds)
                return resident
            except BrokenPipeError:
                resident.end()  # somebody killed it while it was idle
                if new:
                    raise

    def give_back(self, resident: Resident) -> None:
        """It has answered; it stays for the next command, or ends if there are enough."""
        with self._guard:
            if len(self._idle) < _MOST_IDLE:
                self._idle.append(resident)
                return
        resident.end()


def _end_all(idle: list[Resident]) -> None:
    while idle:
        with suppress(OSError):
            idle.pop().end()
