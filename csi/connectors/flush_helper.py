"""A program, not a module: writes what the kernel still has in memory for a block device down to it, and forgets it.

The device is its only argument. It runs as a process of its own because it sleeps for as long as the device is dead,
and a thread that does would keep the service from ending.
"""

import fcntl
import os
import sys

_BLKFLSBUF = 0x1261  # linux/fs.h


def main(device: str) -> int:
    """Flush; returns what the program ends with."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _BLKFLSBUF, 0)
        finally:
            os.close(fd)
    except OSError as error:
        sys.stderr.write(f"{device}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
