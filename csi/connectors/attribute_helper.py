"""A program, not a module: writes its standard input into the sysfs file that is its only argument.

It runs as a process of its own because the kernel may hold the writer until a dead session is given up, and a thread
that is held would keep the service from ending. It makes no file: an attribute that is gone is an error.
"""

import os
import sys


def main(path: str) -> int:
    """Write; returns what the program ends with."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, sys.stdin.read().encode())
        finally:
            os.close(fd)
    except OSError as error:
        sys.stderr.write(f"{path}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
