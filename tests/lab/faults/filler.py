#!/usr/bin/python3
"""Runs in a guest: fills a device with numbered blocks past every cache of its kernel, and looks at them.

filler.py write DEVICE FIRST COUNT   blocks of 256 KiB until an error; prints how many were acknowledged, and the error
filler.py check DEVICE COUNT         prints how many of the first COUNT blocks are not as they were written
filler.py thins POOL FIRST COUNT     makes empty thin volumes in a device-mapper pool; prints how many, and the error
"""

import fcntl
import mmap
import os
import struct
import sys

BLOCK = 256 << 10
#: Request of device-mapper: a message to a target. _IOWR(0xfd, 14, 312 bytes).
_DM_TARGET_MSG = 0xC138FD0E


def block_of(number: int) -> bytes:
    """What is written as block `number`."""
    return number.to_bytes(8, "big") * (BLOCK // 8)


def write(device: str, first: int, count: int) -> None:
    """See the module."""
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, BLOCK)
    done, error = 0, "none"
    try:
        for number in range(first, first + count):
            page[:] = block_of(number)
            if os.pwrite(fd, page, number * BLOCK) < BLOCK:
                error = "short"
                break
            done += 1
    except OSError as problem:
        error = os.strerror(problem.errno or 0)
    print(done, error)


def check(device: str, count: int) -> None:
    """See the module."""
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    page = mmap.mmap(-1, BLOCK)
    wrong = 0
    for number in range(count):
        wrong += os.preadv(fd, [page], number * BLOCK) != BLOCK or page[:] != block_of(number)
    print(wrong)


def thins(pool: str, first: int, count: int) -> None:
    """See the module. Their numbers are beyond those that LVM gives."""
    control = os.open("/dev/mapper/control", os.O_RDWR)
    done, error = 0, "none"
    try:
        for number in range(first, first + count):
            message = f"create_thin {100_000 + number}".encode() + b"\0"
            size = 312 + 8 + len(message)
            head = struct.pack("=3I7IQ128s129s7x", 4, 0, 0, size, 312, 0, 0, 0, 0, 0, 0, pool.encode(), b"")
            fcntl.ioctl(control, _DM_TARGET_MSG, bytearray(head + bytes(8) + message))
            done += 1
    except OSError as problem:
        error = os.strerror(problem.errno or 0)
    print(done, error)


if __name__ == "__main__":
    first, *more = map(int, sys.argv[3:])
    if sys.argv[1] == "write":
        write(sys.argv[2], first, more[0])
    elif sys.argv[1] == "check":
        check(sys.argv[2], first)
    else:
        thins(sys.argv[2], first, more[0])
