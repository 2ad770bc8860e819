"""The LVM commands that the driver uses, on one volume group. No decision is made here.

Every command sees the group's own disks and nothing else: a guest may put a volume group into its volume, and LVM would
find it there. Success and failure are for the caller to read back: LVM has one exit code for everything that goes
wrong, and may be killed at any moment.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from csi.backends.lvm_report import SECTIONS, Report, parse, parse_rows
from csi.backends.volume_disks import is_on, volume_disks
from csi.deadline import Deadline
from csi.errors import CommandFailed, DriverError, InUse, Invalid, NoSpace, Unavailable
from csi.records import RecordStore
from csi.run import Result, Runner, failed

_VG_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,39}")
_LV_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,63}")
_DEVICE = re.compile(r"/dev/[A-Za-z0-9/_.:+@=,-]+")

_JSON = ("--reportformat=json", "--units=b", "--nosuffix")
# What we find our disks with. A device that is a volume of ours is not even opened: it may hang, and what is in it is a
# guest's. Only where there is one does this stand in for the machine's `filter`; its devices file and its
# `global_filter` hold always.
_SEARCH = 'devices{%sscan_lvs=0 hints="none"} backup{backup=0 archive=0}'

#: LVM's words (LC_ALL=C) for "does not fit", in lvcreate and lvextend.
_NO_SPACE = re.compile(
    r"[Ii]nsufficient (free space|suitable|number of devices)|Not enough (PVs|space)|must not exceed number of physical"
    r"|exceeds maximum metadata size|too large for circular buffer"
)
# What LVM appends to the name of a volume for its parts. In alphabetical order a part stands before those below it.
_PARTS = r"-tpool|_tdata|_tmeta|(_tdata|_tmeta)?_(rimage|rmeta)_[0-9]+"
_IN_USE = re.compile(r"in use\.")
#: LVM changes no group of which it sees a part; it says so before it has done anything.
_PART_SEEN = re.compile(r"Cannot change VG \S+ while PVs are missing")
_READ_SECONDS = 60.0
_CHANGE_SECONDS = 300.0
#: The record of the group's identity in the pool's state folder.
_IDENTITY = "vg"


class Lvm:
    """One volume group. Callers serialise the calls."""

    def __init__(
        self,
        vg: str,
        *,
        runner: Runner,
        state: RecordStore | None,
        devices: Sequence[Path] = (),
        udev: Path = Path("/run/udev/control"),
        sys: Path = Path("/sys"),
    ) -> None:
        """devices: the group's disks; empty = found by a search at the first use and again when one is missing.

        state keeps the group's uuid, so that another group of that name is never taken for it; None for a look only.
        udev: where it does not exist (a container), LVM makes the device nodes itself instead of waiting for udev.
        Raises Invalid for a name or path that LVM would misread.
        """
        if not _VG_NAME.fullmatch(vg) or vg in (".", ".."):
            raise Invalid(f"vg {vg!r}: not a name of a volume group (letters, digits and _.+-, at most 40)")
        for device in devices:
            if not _DEVICE.fullmatch(str(device)):
                raise Invalid(f"devices: {str(device)!r} is not a path below /dev that can stand in LVM's filter")
        self.vg = vg
        self._runner = runner
        self._state = state
        self._given = tuple(str(device) for device in devices)
        self._devices = self._given
        self._udev = udev
        self._sys = sys

    # -- look ----------------------------------------------------------------------------------------------------

    def report(self, deadline: Deadline) -> Report:
        """The group now. Raises Unavailable when it is not there, or is not the one that this pool was made on."""
        if not self._devices:
            self._devices = self._search(deadline)
        try:
            report = self._full_report(deadline)
            looked_good = report.missing_pvs == 0
        except Unavailable:
            if self._given:
                raise
            looked_good = False
        if not looked_good and not self._given:
            # A disk came, went or changed its name since the search.
            self._devices = self._search(deadline)
            report = self._full_report(deadline)
        self._check_identity(report)
        return report

    def _full_report(self, deadline: Deadline) -> Report:
        argv = ["lvm", "fullreport", self._config(), *_JSON]
        for section, options in SECTIONS.items():
            argv += [f"--configreport={section}", f"--options={options}"]
        result = self._runner.run(
            [*argv, "--", self.vg], deadline=deadline, read_only=True, ok=None, timeout=_READ_SECONDS
        )
        if result.returncode != 0:
            raise Unavailable(
                f"volume group {self.vg}: LVM can't report it: {_words(result)}; see `vgs {self.vg}` and the disks "
                f"{', '.join(self._devices)}"
            )
        return parse(result.stdout)

    def _search(self, deadline: Deadline) -> tuple[str, ...]:
        """The disks of the group, by name; by its uuid when several groups have that name."""
        rows, trouble = self._search_all(deadline)
        if not rows and (trouble or self._known_uuid()):
            # Never the advice to make it: it may well be there, with data.
            said = f" (LVM says: {trouble})" if trouble else ""
            raise Unavailable(
                f"volume group {self.vg}: not found on this machine{said} -> bring its disks back: see `pvs`"
            )
        if not rows:
            raise Unavailable(
                f"volume group {self.vg}: not found on this machine -> make it with `vgcreate --metadatasize=64m "
                f"{self.vg} DISK…`, or correct `vg` in the configuration"
            )
        uuids = {row["vg_uuid"].replace("-", "") for row in rows}
        if len(uuids) > 1:
            known = self._known_uuid()
            if known not in uuids:
                raise Unavailable(
                    f"volume group {self.vg}: {len(uuids)} groups have this name ({', '.join(sorted(uuids))}); rename "
                    f"one with `vgrename UUID NEWNAME`, or name the disks in `devices`"
                )
            uuids = {known}
        names = [str(row["pv_name"]) for row in rows if row["vg_uuid"].replace("-", "") in uuids]
        usable = [name for name in names if _DEVICE.fullmatch(name)]
        if not usable:
            raise Unavailable(f"volume group {self.vg}: none of its disks is there ({', '.join(names)})")
        return tuple(sorted(usable))

    def _search_all(self, deadline: Deadline) -> tuple[list[dict[str, str]], str]:
        """A row for each disk of a group of this name, and what LVM complained of if it failed."""
        rejected = ",".join(f'"r|^/dev/{disk}$|"' for disk in sorted(volume_disks(self._sys)))
        config = _SEARCH % (f"filter=[{rejected}] " if rejected else "")
        argv = ["pvs", f"--config={config}", *_JSON, "--options=pv_name,vg_name,vg_uuid"]
        result = self._runner.run(argv, deadline=deadline, read_only=True, ok=None, timeout=_READ_SECONDS)
        rows = [row for row in parse_rows(result.stdout or '{"report":[]}', "pv") if row["vg_name"] == self.vg]
        # Once more, for a volume that was attached meanwhile, and for machines whose LVM heeds no filter.
        volumes = volume_disks(self._sys)
        rows = [row for row in rows if not is_on(row["pv_name"], volumes)]
        return rows, _words(result) if result.returncode else ""

    def is_absent(self, deadline: Deadline) -> bool:
        """True only if LVM looked at every disk, whatever `devices` says, without trouble, and has no such group."""
        return self._search_all(deadline) == ([], "")

    def is_activated_at_boot(self, deadline: Deadline) -> bool:
        """Whether the machine activates the group by itself. False where LVM is too old to say (before 2.03.12)."""
        argv = ["lvm", "vgs", self._config(), *_JSON, "--options=vg_autoactivation", "--", self.vg]
        result = self._runner.run(argv, deadline=deadline, read_only=True, ok=None, timeout=_READ_SECONDS)
        rows = parse_rows(result.stdout, "vg") if result.returncode == 0 else []
        return any(row["vg_autoactivation"] == "enabled" for row in rows)

    def parts(self, report: Report, names: Sequence[str], deadline: Deadline) -> list[str]:
        """The kernel's devices of what RAID volumes or thin pools of these names consist of, those on top first.

        Asked of device-mapper itself: a device that never got a table, as a killed command leaves it, is not in sysfs.
        """
        argv = ["dmsetup", "info", "--columns", "--noheadings", "--separator=:", "--options=name,uuid"]
        result = self._runner.run(argv, deadline=deadline, read_only=True, timeout=_READ_SECONDS)
        stems = "|".join(re.escape(f"{_doubled(self.vg)}-{_doubled(name)}") for name in names)
        part = re.compile(rf"({stems})({_PARTS}):LVM-{report.vg_uuid}.*")
        return sorted(
            line.strip().partition(":")[0] for line in result.stdout.splitlines() if part.fullmatch(line.strip())
        )

    def raid_legs(self, name: str, deadline: Deadline) -> tuple[str, bool]:
        """The kernel's letter for each leg of an active RAID volume (A alive and in step, a not yet, D dead; "" when it
        says nothing), and whether nothing is left to be brought into step. LVM's report has this only in part.
        """
        argv = ["dmsetup", "status", "--noflush", "--", f"{_doubled(self.vg)}-{_doubled(name)}"]
        result = self._runner.run(argv, deadline=deadline, read_only=True, timeout=_READ_SECONDS)
        fields = result.stdout.split()  # start length raid TYPE COUNT LEGS DONE/ALL ACTION …
        if len(fields) < 7 or fields[2] != "raid":
            return "", False
        done, _, total = fields[6].partition("/")
        return fields[5], done == total

    def _known_uuid(self) -> str:
        fields = self._state.read(_IDENTITY) if self._state else None
        return str(fields["uuid"]) if fields else ""

    def _check_identity(self, report: Report) -> None:
        known = self._known_uuid()
        if self._state is None:
            return
        if not known:
            self._state.write(_IDENTITY, {"vg": self.vg, "uuid": report.vg_uuid})
        elif known != report.vg_uuid:
            raise Unavailable(
                f"volume group {self.vg}: has the uuid {report.vg_uuid}, but this pool was made on {known}; bring the "
                f"right disks back, or if the group was made anew, remove {_IDENTITY}.json from the pool's folder in "
                "the state directory"
            )

    # -- change --------------------------------------------------------------------------------------------------

    def create(self, name: str, *, tags: Sequence[str], shape: Sequence[str], deadline: Deadline) -> None:
        """Create and activate a logical volume of this shape (--type, size …), with all its tags."""
        _check_name(name)
        argv = [
            "lvcreate", self._config(), "--yes",
            # Only the driver activates its volumes, after a boot too. (--setautoactivation is refused for RAID and
            # thin volumes by LVM 2.03.16.)
            "--setactivationskip=y", "--ignoreactivationskip",
            *shape, *(f"--addtag={tag}" for tag in tags), f"--name={name}", "--", self.vg,
        ]  # fmt: skip
        self._change(argv, deadline)

    def extend(self, name: str, *, extents: int, deadline: Deadline) -> None:
        """Enlarge a logical volume to so many extents."""
        self._change(["lvextend", self._config(), "--yes", f"--extents={extents}", "--", self._path(name)], deadline)

    def rename(self, name: str, new_name: str, deadline: Deadline) -> None:
        """Rename a logical volume; an open one too."""
        _check_name(name)
        _check_name(new_name)
        self._change(["lvrename", self._config(), "--", self.vg, name, new_name], deadline)

    def remove(self, name: str, deadline: Deadline) -> None:
        """Remove a logical volume. Raises InUse when something has it open."""
        self._change(["lvremove", self._config(), "--yes", "--", self._path(name)], deadline)

    def activate(self, name: str, deadline: Deadline) -> None:
        """Activate a logical volume."""
        argv = ["lvchange", self._config(), "--activate=y", "--ignoreactivationskip", "--", self._path(name)]
        self._change(argv, deadline)

    def remove_part(self, part: str, deadline: Deadline) -> None:
        """Remove the kernel's device of a part of a volume; the kernel refuses it while the part is in use."""
        self._change(["dmsetup", "remove", "--", part], deadline)

    def refresh(self, name: str, deadline: Deadline) -> None:
        """Load the kernel's table of an active volume anew: a killed command left it suspended, or of an old size."""
        self._change(["lvchange", self._config(), "--refresh", "--", self._path(name)], deadline)

    def remove_tag(self, name: str, tag: str, deadline: Deadline) -> None:
        """Remove a tag of a logical volume; absent is fine."""
        self._change(["lvchange", self._config(), f"--deltag={tag}", "--", self._path(name)], deadline)

    def _change(self, argv: Sequence[str], deadline: Deadline) -> None:
        again: Sequence[str] | None = argv
        while again is not None:
            argv = again
            result = self._runner.run(argv, deadline=deadline, ok=None, timeout=_CHANGE_SECONDS)
            if result.returncode == 0:
                return
            again = self._with_all_disks(argv, result, deadline)
        raise _error(result, self.vg)

    def _with_all_disks(self, argv: Sequence[str], result: Result, deadline: Deadline) -> Sequence[str] | None:
        """A refused command for the disks that the group has now: one was added or replaced since the search.

        None if that is not why it was refused.
        """
        if self._given or not _PART_SEEN.search(result.stderr):
            return None
        before = self._config()
        self._devices = self._search(deadline)
        if self._config() == before:
            return None
        return [self._config() if word == before else word for word in argv]

    def _path(self, name: str) -> str:
        _check_name(name)
        return f"{self.vg}/{name}"

    def _config(self) -> str:
        accept = ",".join(f'"a|^{_escape(device)}$|"' for device in self._devices)
        text = (
            f'devices{{filter=[{accept},"r|.*|"] use_devicesfile=0 scan_lvs=0 hints="none"}} '
            "global{wait_for_locks=1} backup{backup=0 archive=0}"
        )
        if not self._udev.exists():
            text += " activation{udev_sync=0 udev_rules=0}"
        return f"--config={text}"


def _error(result: Result, vg: str) -> DriverError:
    words = _words(result)
    program = Path(result.argv[0]).name
    if _NO_SPACE.search(words):
        return NoSpace(f"volume group {vg}: {program}: {words}; free space or add a disk (vgextend)")
    if _PART_SEEN.search(words):
        return Unavailable(
            f"volume group {vg}: {program}: {words}; bring the missing disk back, or take it out with "
            f"`vgreduce --removemissing {vg}`"
        )
    if _IN_USE.search(words):
        return InUse(f"volume group {vg}: {program}: {words}")
    return CommandFailed(str(failed(result)))


def _words(result: Result) -> str:
    """What LVM said of the failure, without its warnings."""
    lines = [line.strip() for line in result.stderr.splitlines()]
    said = [line for line in lines if line and not line.startswith("WARNING")] or [line for line in lines if line]
    return " ".join(said)[-800:] or "no reason given"


def _check_name(name: str) -> None:
    if not _LV_NAME.fullmatch(name):
        raise ValueError(f"not a name of a logical volume: {name!r}")


def _doubled(name: str) -> str:
    """How device-mapper writes a name that LVM joins with hyphens."""
    return name.replace("-", "--")


def _escape(device: str) -> str:
    return device.replace(".", "[.]").replace("+", "[+]")
