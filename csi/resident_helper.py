"""A program, not a module: runs one small helper after another, as often as it is asked to, and ends with its caller.

Its standard input is a socket of kind SOCK_SEQPACKET. A request is {"argv", "input", "fds"} with those descriptors
beside it, which get the numbers that the caller knows them by; the answer is {"returncode", "stdout", "stderr"}.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence

#: The longest request and the longest stream of an answer, in bytes.
MOST_BYTES = 64 << 10
_MOST_FDS = 8
# Where descriptors wait while they are put in place: above this and above every number that they are to get.
_PARKED = 512
_BLKFLSBUF = 0x1261


def tee(argv: Sequence[str], text: str) -> int:
    """`tee -- FILE`: write to a file that is there."""
    fd = os.open(argv[2], os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    return 0


def blockdev(argv: Sequence[str], _text: str) -> int:
    """`blockdev --flushbufs DEVICE`."""
    fd = os.open(argv[2], os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BLKFLSBUF, 0)
    finally:
        os.close(fd)
    return 0


#: Forms of commands that are done here as the command would do them.
COMMANDS: Mapping[tuple[str, str], Callable[[Sequence[str], str], int]] = {
    ("tee", "--"): tee,
    ("blockdev", "--flushbufs"): blockdev,
}


class Programs:
    """Python files that are run as if each were started anew, but compiled once."""

    def __init__(self) -> None:
        self._codes: dict[str, types.CodeType] = {}

    def run(self, argv: Sequence[str]) -> int:
        """Run a file with arguments; returns what it ends with."""
        path = argv[0]
        if path not in self._codes:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib takes longer to load than to use
                self._codes[path] = compile(file.read(), path, "exec")
        before = sys.argv, list(sys.path)
        sys.argv = list(argv)
        try:
            exec(self._codes[path], {"__name__": "__main__", "__file__": path})  # noqa: S102 - our own helpers
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv, sys.path[:] = before
        return 0


def answer(programs: Programs, argv: Sequence[str], text: str) -> dict[str, object]:
    """Do what is asked; whatever goes wrong is an answer."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command = COMMANDS.get((argv[0], argv[1]))
            code = command(argv, text) if command else programs.run(argv[3:])
        except OSError as error:
            sys.stderr.write(f"{argv[0]}: {argv[-1]}: {error.strerror}\n")
            code = 1
        except Exception:  # noqa: BLE001 - the process that it stands for would have ended so
            traceback.print_exc()
            code = 1
    return {"returncode": code, "stdout": out.getvalue()[:MOST_BYTES], "stderr": err.getvalue()[-MOST_BYTES:]}


def place(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Give descriptors their numbers."""
    free = max([_PARKED, *numbers]) + 1
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, number in zip(parked, numbers, strict=True):
        os.dup2(fd, number, inheritable=False)
        os.close(fd)


def main() -> None:
    """Answer until the other end is closed."""
    connection, programs = socket.socket(fileno=0), Programs()
    while True:
        data, fds, _, _ = socket.recv_fds(connection, MOST_BYTES * 2, _MOST_FDS)
        if not data:
            return
        request = json.loads(data)
        place(fds, request["fds"])
        reply = answer(programs, request["argv"], request["input"])
        for number in request["fds"]:
            os.close(number)
        connection.send(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
