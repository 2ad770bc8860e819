"""Disks that take a minute to fill, such as those with container images: filled once by a guest, and kept in .cache."""

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .disk import Disk
from .guest import Guest
from .kernel import PROJECT
from .lab import Lab

_SIZE = "6G"
#: A guest that boots again opens its disk anew, so those that may still be in use stay.
_KEPT = 3


def get_filled_disk(kind: str, content: Sequence[str], fill: Callable[[Guest, str], None], *, memory: str) -> Path:
    """The disk, filled first if it is not in the cache. Guests use it by Disk(base=…), which leaves it as it is.

    kind: its folder in .cache. content: words that change when what is on it does. fill: gets a guest with this memory
    and the device, and leaves it unmounted. Safe to call from several processes at once.
    """
    cache = PROJECT / ".cache" / kind
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\0".join([_SIZE, *content]).encode())
    path = cache / f"disk-{digest.hexdigest()[:16]}.img"
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob("disk-*.new"):
            left.unlink()  # of a run that was killed
        if not path.exists():
            began = time.monotonic()
            print(f"filling the disk of the lab's {kind} nodes, about a minute", file=sys.stderr, flush=True)
            _make(path, fill, memory)
            print(f"filled in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        # Not touch(): a guest that boots again refuses a base whose time of change is not that of its first boot.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        for old in sorted(cache.glob("disk-*.img"), key=lambda disk: disk.stat().st_atime)[:-_KEPT]:
            old.unlink()
    return path


def _make(path: Path, fill: Callable[[Guest, str], None], memory: str) -> None:
    with Lab() as lab:
        disk = Disk(_SIZE)
        guest = lab.guest("images", memory=memory, disks=[disk])
        guest.boot()
        fill(guest, disk.device)
        guest.off(60)
        fresh = path.with_suffix(".new")
        subprocess.run(["cp", "--sparse=always", "--", str(disk.image), str(fresh)], check=True)
        fresh.rename(path)
