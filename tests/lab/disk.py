"""Disks of guests: sparse files of the host, kept over a guest's reboots and power cuts as long as the lab lives."""

from dataclasses import dataclass, field
from pathlib import Path

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_of(text: str) -> int:
    """Bytes of "512M", "4G" and the like."""
    unit = _UNITS.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


@dataclass
class Disk:
    """A disk of `size`; with `base`, what the guest writes goes to a file of its own and `base` is only read.

    A power cut of the guest loses what it did not write out itself, but never what it did: the host's page cache
    stands for a disk without a volatile cache.
    """

    size: str = "4G"
    base: Path | None = None
    image: Path = field(default=Path(), init=False)
    device: str = field(default="", init=False)

    def create(self, image: Path, number: int) -> None:
        """Called by the lab: makes the sparse file of the guest's disk `number` (0 is /dev/ubda)."""
        self.image, self.device = image, f"/dev/ubd{chr(97 + number)}"
        if self.base is None:  # else the kernel makes the file
            with image.open("xb") as file:
                file.truncate(size_of(self.size))

    @property
    def argument(self) -> str:
        """The kernel's argument for this disk."""
        images = str(self.image) if self.base is None else f"{self.image},{self.base}"
        return f"{self.device.removeprefix('/dev/')}={images}"
