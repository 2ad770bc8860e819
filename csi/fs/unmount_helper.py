"""A program, not a module: unmounts the path that is its only argument, without following a link in its last component.

umount(8) follows one when root calls it; umount2(UMOUNT_NOFOLLOW) does not. It runs as a process of its own because an
unmount sleeps uninterruptibly while the device is dead, and a thread that does would keep the service from ending.
Ends with 0, or with the errno of umount2 and its text on stderr.
"""

import ctypes
import os
import sys

_UMOUNT_NOFOLLOW = 8


def main(path: str) -> int:
    """Unmount the path; returns what the program ends with."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW) == 0:
        return 0
    number = ctypes.get_errno()
    sys.stderr.write(f"umount2: {os.strerror(number)}\n")
    return min(number, 125)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
