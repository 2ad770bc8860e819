"""A program, not a module: unmounts the path that is its first argument; a link in its last component is not followed.

umount(8) follows one when root calls it; umount2(UMOUNT_NOFOLLOW) does not. It runs as a process of its own because an
unmount sleeps uninterruptibly while the device is dead, and a thread that does would keep the service from ending.
A second argument is the mount namespace to do it in (/proc/1/ns/mnt for the host's, from a container).
Ends with 0, or with the errno of the call that failed and its text on stderr.
"""

import ctypes
import os
import sys

_UMOUNT_NOFOLLOW = 8
_CLONE_NEWNS = 0x20000


def main(path: str, namespace: str = "") -> int:
    """Unmount the path; returns what the program ends with."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if namespace and not _enter(libc, namespace):
            return _failed("setns")
        code = 0 if libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW) == 0 else _failed("umount2")
        # The process may be a resident one, which does other work after this.
        if namespace and libc.setns(own, _CLONE_NEWNS):
            os._exit(_failed("setns"))
        return code
    finally:
        os.close(own)


def _enter(libc: ctypes.CDLL, namespace: str) -> bool:
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return bool(libc.setns(fd, _CLONE_NEWNS) == 0)
    finally:
        os.close(fd)


def _failed(call: str) -> int:
    number = ctypes.get_errno()
    sys.stderr.write(f"{call}: {os.strerror(number)}\n")
    return min(number, 125)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
