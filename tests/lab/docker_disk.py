"""A disk for /var/lib/docker with images on it, made once: loading them in each guest is what would take its time."""

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .disk import Disk
from .docker_host import start_dockerd
from .kernel import PROJECT
from .lab import Lab

CACHE = PROJECT / ".cache" / "docker"
_SIZE = "6G"
_KEPT = 3


def get_docker_disk(archives: Sequence[Path]) -> Path:
    """The disk, made first if it is not in the cache. Guests use it by Disk(base=…), which leaves it as it is.

    archives: for `docker load`, with names that tell their content. Safe to call from several processes at once.
    """
    digest = hashlib.sha256("\0".join([_SIZE, *(archive.name for archive in archives)]).encode())
    path = CACHE / f"docker-{digest.hexdigest()[:16]}.img"
    with _locked():
        if not path.exists():
            began = time.monotonic()
            print("making the disk of the Docker hosts, about a minute", file=sys.stderr, flush=True)
            _make(path, archives)
            print(f"made in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        path.touch()
    return path


def _make(path: Path, archives: Sequence[Path]) -> None:
    # A guest that boots again opens its disk anew, so those that may still be in use stay.
    for old in sorted(CACHE.glob("docker-*.img"), key=lambda disk: disk.stat().st_mtime)[:-_KEPT]:
        old.unlink()
    with Lab() as lab:
        disk = Disk(_SIZE)
        guest = lab.guest("images", memory="1G", disks=[disk])
        guest.boot()
        dockerd = start_dockerd(guest, disk.device)
        for archive in archives:
            guest.sh(["docker", "load", "-qi", str(archive)], 300)
        dockerd.signal(15)
        dockerd.wait(30)
        guest.sh("umount /var/lib/docker")
        guest.off(60)
        fresh = path.with_suffix(f".{os.getpid()}")
        subprocess.run(["cp", "--sparse=always", "--", str(disk.image), str(fresh)], check=True)
        fresh.rename(path)


@contextmanager
def _locked() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
