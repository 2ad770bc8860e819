"""The disk with containerd's store and all images that Kubernetes' nodes boot on; made once, nodes write beside it."""

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.tools.build import tool_path

from .disk_cache import get_filled_disk
from .errors import LabError
from .guest import Guest
from .images import make_image
from .kernel import PROJECT
from .kubernetes_node import BUSYBOX, start_containerd, stop_containerd
from .product_image import PRODUCT, product_image

CACHE = PROJECT / ".cache" / "kubernetes"
SIDECARS = ("csi-provisioner", "csi-attacher", "csi-resizer")


def image_of(name: str) -> str:
    """The reference of an image in the lab, by its name: snode-csi, busybox, or a sidecar's."""
    return f"localhost/{name}:1"


def get_disk() -> Path:
    """The disk, made first if it is not in the cache. Safe to call from several processes at once."""
    archives = _archives()

    def fill(guest: Guest, device: str) -> None:
        guest.sh(f"mkfs.ext4 -qF -E lazy_itable_init=1,nodiscard {device}", 120)
        containerd = start_containerd(guest, device)
        for reference, archive in archives.items():
            guest.sh(["ctr", "-n", "k8s.io", "images", "import", "--local", str(archive)], 300)
            if reference not in guest.sh("ctr -n k8s.io images ls -q"):
                raise LabError(f"{archive} does not hold the image {reference}")
        stop_containerd(guest, containerd)

    content = [f"{reference} {archive.name}" for reference, archive in sorted(archives.items())]
    return get_filled_disk("kubernetes", content, fill, memory="2G")


def _archives() -> Mapping[str, Path]:
    """All images by their references, as archives whose names tell their content."""
    CACHE.mkdir(parents=True, exist_ok=True)
    archives = {BUSYBOX: _kept("busybox", lambda path: make_image(path, BUSYBOX))}
    for name in SIDECARS:
        archives[image_of(name)] = _kept(name, partial(_wrap, name))
    archives[PRODUCT] = product_image()
    return archives


def _wrap(name: str, path: Path) -> None:
    """Write an image of one static program, which it starts with the container's arguments."""
    make_image(path, image_of(name), files={f"/{name}": tool_path(name)}, entrypoint=[f"/{name}"])


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """An archive in the cache, made anew: that is quick, and only its content tells whether it is another one."""
    fresh = CACHE / f"{name}.{os.getpid()}"
    make(fresh)
    with fresh.open("rb") as file:
        path = CACHE / f"{name}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.tar"
    fresh.rename(path)
    for old in CACHE.glob(f"{name}-*.tar"):
        if old != path:
            old.unlink(missing_ok=True)  # another process does the same
    return path
