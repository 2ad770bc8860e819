"""A disk for /var/lib/docker with images on it: loading them in each guest is what would take its time."""

from collections.abc import Sequence
from pathlib import Path

from .disk_cache import get_filled_disk
from .docker_host import start_dockerd
from .guest import Guest


def get_docker_disk(archives: Sequence[Path]) -> Path:
    """The disk. archives: for `docker load`, with names that tell their content."""

    def fill(guest: Guest, device: str) -> None:
        dockerd = start_dockerd(guest, device)
        for archive in archives:
            guest.sh(["docker", "load", "-qi", str(archive)], 300)
        dockerd.signal(15)
        dockerd.wait(30)
        guest.sh("umount /var/lib/docker")

    return get_filled_disk("docker", [archive.name for archive in archives], fill, memory="1G")
