"""The seam inside the LVM backend: thick or thin."""

from typing import Protocol

from csi.backends.lvm_report import Lv, Report


class Space(Protocol):
    """Where the bytes come from: `Thick` or `Thin`."""

    @property
    def wipes(self) -> bool:
        """True if deleted data has to be overwritten before its space is given on."""
        ...

    def unit_bytes(self, report: Report) -> int:
        """Sizes are multiples of this."""
        ...

    def shape(self, report: Report, size_bytes: int) -> list[str]:
        """The arguments of lvcreate."""
        ...

    def made(self, lv: Lv) -> Lv:
        """A volume made by `shape`, as the next report will show it."""
        ...

    def owns(self, lv: Lv) -> bool:
        """Whether a volume of the group may be of this pool."""
        ...

    def check(self, report: Report, lv: Lv | None, size_bytes: int) -> None:
        """Raise NoSpace or Unavailable if a new volume, or the growth of `lv`, to size_bytes is not possible."""
        ...

    def available(self, report: Report) -> int:
        """Size in bytes of the largest volume that can be made."""
        ...

    def inactive(self, report: Report) -> str:
        """The name of what must be activated before the numbers are known, or ""."""
        ...

    def health(self, report: Report, lv: Lv) -> str:
        """ "ok", or a sentence."""
        ...

    def problems(self, report: Report) -> list[str]:
        """What makes the pool useless, each as `what is wrong -> the repair`."""
        ...

    def warnings(self, report: Report) -> list[str]:
        """What stops new volumes, or will, while those that exist are served; in the same form."""
        ...
