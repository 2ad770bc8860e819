"""A program, not a module: runs one small helper after another, as often as it is asked to, and ends with its caller.

Its standard input is a socket of kind SOCK_SEQPACKET. A request is {"argv", "input", "fds"} with those descriptors
beside it, which get the numbers that the caller knows them by; argv is a
program's file and its arguments. The answer is {"returncode", "stdout", "stderr"}.
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
from collections.abc import Sequence

#: The longest request and the longest stream of an answer, in bytes.
MOST_BYTES = 64 << 10
_MOST_FDS = 8
# Where descriptors wait while they are put in place: above this and above every number that they are to get.
_PARKED = 512


class Programs:
    """Python files that are run as if each were started anew, but compiled once."""

    def __init__(self) -> None:
        self._codes: dict[str, types.CodeType] = {}

    def run(self, argv: Sequence[str], text: str) -> int:
        """Run a file with arguments and `text` as its standard input; returns what it ends with."""
        path = argv[0]
        if path not in self._codes:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib takes longer to load than to use
                self._codes[path] = compile(file.read(), path, "exec")
        before = sys.argv, sys.stdin, list(sys.path)
        sys.argv, sys.stdin = list(argv), io.StringIO(text)
        try:
            exec(self._codes[path], {"__name__": "__main__", "__file__": path})  # noqa: S102 - our own helpers
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv, sys.stdin, sys.path[:] = before
        return 0


def answer(programs: Programs, argv: Sequence[str], text: str) -> dict[str, object]:
    """Do what is asked; whatever goes wrong is an answer."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = programs.run(argv, text)
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
