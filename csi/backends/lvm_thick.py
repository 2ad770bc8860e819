"""Where a thick volume's extents come from: linear, striped, or a RAID level over the group's disks."""

from dataclasses import replace

from csi.backends.lvm_report import Lv, Report
from csi.errors import Invalid, NoSpace
from csi.figures import figure

#: Layouts, with the least and the usual number of data stripes (0 = none to choose).
_STRIPES = {"linear": (0, 0), "striped": (2, 2), "raid1": (0, 0), "raid5": (2, 2), "raid6": (3, 3), "raid10": (2, 2)}
_MIRRORED = frozenset({"raid1", "raid10"})
_PARITY = {"raid5": 1, "raid6": 2}

_HEALTH = {
    "partial": "a disk of the volume is missing -> bring it back, or replace it and run `lvconvert --repair`",
    "refresh needed": "a disk of the volume had errors -> `lvchange --refresh`, or replace it and `lvconvert --repair`",
    "mismatches exist": "the RAID copies differ -> run `lvchange --syncaction repair`",
}


class Thick:
    """All extents are taken at creation, so the volume can be filled whatever the others do."""

    #: Freed extents go to other volumes as they are: the data must be overwritten first.
    wipes = True

    def __init__(self, layout: str = "linear", *, stripes: int = 0, mirrors: int = 0) -> None:
        """layout: linear, striped, raid1, raid5, raid6 or raid10. stripes: disks with data; mirrors: further copies.

        0 = the usual number. Raises Invalid for a combination that does not exist.
        """
        if layout not in _STRIPES:
            raise Invalid(f"layout {layout!r}: choose one of {', '.join(_STRIPES)}")
        least, usual = _STRIPES[layout]
        if stripes and (not least or stripes < least):
            raise Invalid(f"stripes {stripes}: layout {layout} takes " + (f"at least {least}" if least else "none"))
        if mirrors and layout not in _MIRRORED:
            raise Invalid(f"mirrors {mirrors}: layout {layout} takes none")
        if mirrors < 0:
            raise Invalid(f"mirrors {mirrors}: negative")
        self._layout = layout
        self._stripes = stripes or usual
        self._copies = (mirrors or 1) + 1 if layout in _MIRRORED else 1
        self._data_legs = self._stripes or 1
        self._legs = self._data_legs * self._copies + _PARITY.get(layout, 0)
        self._meta_extents = 1 if layout.startswith("raid") else 0

    # -- size ----------------------------------------------------------------------------------------------------

    def unit_bytes(self, report: Report) -> int:
        """Sizes are multiples of this: an extent on each disk with data."""
        return report.extent_bytes * self._data_legs

    def shape(self, report: Report, size_bytes: int) -> list[str]:
        """The arguments of lvcreate. Zeroed at its start and free of old signatures, so it needs activation."""
        extents = size_bytes // report.extent_bytes
        argv = ["--wipesignatures=y", "--zero=y", f"--type={self._layout}", f"--extents={extents}"]
        if self._stripes:
            argv.append(f"--stripes={self._stripes}")
        if self._copies > 1:
            argv.append(f"--mirrors={self._copies - 1}")
        return argv

    def made(self, lv: Lv) -> Lv:
        """A volume made by `shape`, as the next report will show it."""
        return replace(lv, layout=frozenset({self._layout}))

    def owns(self, lv: Lv) -> bool:
        """Whether a volume of the group may be of this pool."""
        return "thin" not in lv.layout

    # -- space ---------------------------------------------------------------------------------------------------

    def check(self, report: Report, lv: Lv | None, size_bytes: int) -> None:
        """Raise NoSpace if a new volume (lv None), or the growth of `lv`, to size_bytes does not fit."""
        extra = size_bytes - (lv.size_bytes if lv else 0)
        leg = -(-extra // self.unit_bytes(report)) + (0 if lv else self._meta_extents)
        if leg <= self._room(report):
            return
        needed, free = leg * self._legs * report.extent_bytes, sum(_free(report)) * report.extent_bytes
        disks = f" on {self._legs} different disks" if self._legs > 1 else ""
        raise NoSpace(
            f"volume group {report.vg}: {figure(extra)} as {self._layout} takes {figure(needed)}{disks}; "
            f"{figure(free)} is free on {len(_free(report))} disks, room for {figure(self.available(report))}; "
            "delete volumes, wait for wipes to end, or add a disk (vgextend)"
        )

    def available(self, report: Report) -> int:
        """The largest new volume in bytes."""
        return max(0, self._room(report) - self._meta_extents) * self.unit_bytes(report)

    def _room(self, report: Report) -> int:
        """How many extents every leg finds, at no position two legs on one disk. Counted as LVM takes them, which may
        be fewer than possible: from the disks with most room as much as all of them have, and so on with the rest.
        """
        free, room = _free(report), 0
        while len(free) >= self._legs:
            free.sort(reverse=True)
            step = free[self._legs - 1]
            room += step
            free = [left for left in [*(extents - step for extents in free[: self._legs]), *free[self._legs :]] if left]
        return room

    def inactive(self, report: Report) -> str:
        """Nothing has to be active before the numbers are known."""
        return ""

    # -- health --------------------------------------------------------------------------------------------------

    def health(self, report: Report, lv: Lv) -> str:
        """ "ok", or what is wrong with a volume."""
        if lv.health:
            return _HEALTH.get(lv.health, f"LVM says of the volume: {lv.health} -> see `lvs -a -o +devices`")
        if lv.sync_percent is not None and lv.sync_percent < 100:
            return f"the RAID copies are not in step yet ({lv.sync_percent:.0f} %); until then no disk may fail"
        return "ok"

    def problems(self, report: Report) -> list[str]:
        """Nothing makes a group that is there useless."""
        return []

    def warnings(self, report: Report) -> list[str]:
        """What is wrong with the group for this layout."""
        disks = sum(pv.allocatable for pv in report.pvs)
        if disks >= self._legs:
            return []
        problem = f"layout {self._layout} needs {self._legs} disks, it has {disks}"
        return [f"volume group {report.vg}: {problem} -> add disks (vgextend) or choose another layout"]


def _free(report: Report) -> list[int]:
    """Free extents of each disk that has some."""
    return [pv.free_bytes // report.extent_bytes for pv in report.pvs if pv.allocatable and pv.free_bytes]
