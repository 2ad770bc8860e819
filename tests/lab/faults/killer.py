#!/usr/bin/python3
"""Runs in a guest: waits for the next process of a name, and kills it (-9) after a random time.

killer.py NAME LONGEST_SECONDS SEED     prints "ready", and then "killed PID" or "too late PID"; ends after one
"""

import os
import random
import sys
import time
from pathlib import Path


def find(name: str) -> set[int]:
    """The processes of this name."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.add(int(path.parent.name))
        except OSError:
            continue  # it ended
    return found


def main(name: str, longest: float, seed: int) -> None:
    """See the module."""
    patience = random.Random(seed).uniform(0, longest)
    print("ready", flush=True)
    while not (pids := find(name)):
        time.sleep(0.002)
    time.sleep(patience)
    for pid in pids:
        try:
            os.kill(pid, 9)
            print(f"killed {pid}", flush=True)
        except ProcessLookupError:
            print(f"too late {pid}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
