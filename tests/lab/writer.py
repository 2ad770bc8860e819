#!/usr/bin/python3
"""Runs in a guest: writes numbered records to a file or device, and prints a record's number only after its fsync.

    writer.py write PATH STAMP [SECONDS_BETWEEN]     endlessly; a line "ack N" for each record that is durable
    writer.py check PATH                             prints "STAMP N" for each valid record, "bad N REASON" for others

A record is one block of 512 bytes at N * 512: magic, stamp (who wrote it for which volume), number, SHA-256 of these.
PATH is a file on a mounted volume, or the device of a raw block volume.
"""

import hashlib
import os
import sys
import time

BLOCK = 512
MAGIC = b"SNODEREC"
# Records go round in so many blocks, so that a writer can run for ever.
ROUND = 4096


def block_of(stamp: str, number: int) -> bytes:
    """One record."""
    body = MAGIC + stamp.encode().ljust(64, b"\0") + number.to_bytes(8, "big")
    return (body + hashlib.sha256(body).digest()).ljust(BLOCK, b"\0")


def parse(block: bytes) -> tuple[str, int] | None:
    """Stamp and number of a record, or None if the block is no valid record."""
    body, digest = block[:80], block[80:112]
    if body[:8] != MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    return body[8:72].rstrip(b"\0").decode(), int.from_bytes(body[72:80], "big")


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
    """Print what every block holds."""
    fd = os.open(path, os.O_RDONLY)
    for place in range(ROUND):
        block = os.pread(fd, BLOCK, place * BLOCK)
        if not block.strip(b"\0"):
            continue
        found = parse(block)
        if found is None or found[1] % ROUND != place:
            print(f"bad {place} {'no valid record' if found is None else f'record {found[1]} of {found[0]}'}")
        else:
            print(f"{found[0]} {found[1]}")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], sys.argv[3], float(sys.argv[4]) if len(sys.argv) > 4 else 0.01)
    else:
        check(sys.argv[2])
