"""The disk with containerd's store and all images that Kubernetes' nodes boot on; made once, nodes write beside it."""

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.tools.build import tool_path

from .disk import Disk
from .errors import LabError
from .images import make_image
from .kernel import PROJECT
from .kubernetes_node import BUSYBOX, start_containerd, stop_containerd
from .lab import Lab
from .product_image import PRODUCT, product_image

CACHE = PROJECT / ".cache" / "kubernetes"
SIDECARS = ("csi-provisioner", "csi-attacher", "csi-resizer")
_SIZE = "6G"


def image_of(name: str) -> str:
    """The reference of an image in the lab, by its name: snode-csi, busybox, or a sidecar's."""
    return f"localhost/{name}:1"


def get_disk() -> Path:
    """The disk, made first if it is not in the cache; older ones go. Safe to call from several processes at once."""
    with _locked():
        archives = _archives()
        digest = hashlib.sha256(_SIZE.encode())
        for reference, archive in sorted(archives.items()):
            digest.update(f"\0{reference}\0".encode() + archive.name.encode())
        path = CACHE / f"node-{digest.hexdigest()[:16]}.img"
        if not path.exists():
            began = time.monotonic()
            print("making the disk of Kubernetes' nodes, about a minute", file=sys.stderr, flush=True)
            _make(path, archives)
            print(f"made in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return path


def _archives() -> Mapping[str, Path]:
    """All images by their references, as archives whose names tell their content."""
    archives = {BUSYBOX: _wrapped(BUSYBOX, "busybox", Path("/bin/busybox"))}
    for name in SIDECARS:
        archives[image_of(name)] = _wrapped(image_of(name), name, tool_path(name))
    archives[PRODUCT] = product_image()
    return archives


def _wrapped(reference: str, name: str, program: Path) -> Path:
    """An image of one static program, which it starts with the container's arguments (busybox: none)."""
    with program.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    path = CACHE / f"{name}-{content}.tar"
    if path.exists():
        return path
    for old in CACHE.glob(f"{name}-*.tar"):
        old.unlink()
    fresh = path.with_suffix(f".{os.getpid()}")
    if name == "busybox":
        make_image(fresh, reference)
    else:
        make_image(fresh, reference, files={f"/{name}": program}, entrypoint=[f"/{name}"])
    fresh.rename(path)
    return path


def _make(path: Path, archives: Mapping[str, Path]) -> None:
    for old in CACHE.glob("node-*.img"):
        old.unlink()  # guests that run on it keep it open
    with Lab() as lab:
        disk = Disk(_SIZE)
        guest = lab.guest("images", memory="2G", disks=[disk])
        guest.boot()
        guest.sh(f"mkfs.ext4 -qF -E lazy_itable_init=1,nodiscard {disk.device}", 120)
        containerd = start_containerd(guest, disk.device)
        for reference, archive in archives.items():
            guest.sh(["ctr", "-n", "k8s.io", "images", "import", "--local", str(archive)], 300)
            if reference not in guest.sh("ctr -n k8s.io images ls -q"):
                raise LabError(f"{archive} does not hold the image {reference}")
        stop_containerd(guest, containerd)
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
