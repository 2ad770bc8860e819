#!/usr/bin/python3
"""Runs in a guest: writes numbered records to a file or device, and prints a record's number only after its fsync.

    writer.py write PATH STAMP [SECONDS_BETWEEN]     endlessly; a line "ack N" for each record that is durable
    writer.py check PATH                             prints "STAMP N" for each valid record, "bad N REASON" for others

A record is one block of 512 bytes at N * 512: magic, stamp (who wrote it for which volume), number, SHA-256 of these.
PATH is a file on a mounted volume, or the device of a raw block volume.
"""

import hashlib
import mmap
import os
import stat
import sys
import time

BLOCK = 512
MAGIC = b"SNODEREC"
# Records go round in so many blocks, so that a writer can run for ever.
ROUND = 4096


def block_of(stamp: str, number: int) -> bytes:
    """One record. A stamp has at most 64 bytes."""
    body = MAGIC + stamp.encode().ljust(64, b"\0") + number.to_bytes(8, "big")
    return (body + hashlib.sha256(body).digest()).ljust(BLOCK, b"\0")


def parse(block: bytes) -> tuple[str, int] | None:
    """Stamp and number of a record, or None if the block is no valid record to its last byte."""
    number, stamp = int.from_bytes(block[72:80], "big"), block[8:72].rstrip(b"\0")
    try:
        return (stamp.decode(), number) if block == block_of(stamp.decode(), number) else None
    except UnicodeDecodeError:
        return None


def write(path: str, stamp: str, pause: float) -> None:
    """Write for ever; an I/O error ends it with a line "error ERRNO"."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    number = 0
    try:
        while True:
            number += 1
            os.pwrite(fd, block_of(stamp, number), number % ROUND * BLOCK)
            os.fdatasync(fd)
            print(f"ack {number}", flush=True)
            time.sleep(pause)
    except OSError as error:
        print(f"error {error.errno} {error.strerror}", flush=True)


def check(path: str) -> None:
    """Print what every block holds on the disk: this machine's memory would only tell what it wrote itself."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size > ROUND * BLOCK:
        print(f"bad {ROUND} the file has {status.st_size} bytes")
    piece = mmap.mmap(-1, 64 << 10)  # aligned, as direct reads demand
    for start in range(0, ROUND, len(piece) // BLOCK):
        length = os.preadv(fd, [piece], start * BLOCK)
        for place in range(start, start + length // BLOCK):
            block = piece[(place - start) * BLOCK :][:BLOCK]
            if not block.strip(b"\0"):
                continue
            found = parse(block)
            if found is None or found[1] % ROUND != place:
                print(f"bad {place} {'no valid record' if found is None else f'record {found[1]} of {found[0]}'}")
            else:
                print(f"{found[0]} {found[1]}")
        if length < len(piece):
            if length % BLOCK:
                print(f"bad {start + length // BLOCK} the file ends within a record")
            return


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], sys.argv[3], float(sys.argv[4]) if len(sys.argv) > 4 else 0.01)
    else:
        check(sys.argv[2])
