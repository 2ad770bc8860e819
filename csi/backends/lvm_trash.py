"""Deleted thick volumes on their way back to the pool: renamed, then zeroed, then removed.

The list of them is the group itself, so a restart resumes. How far the zeros reach is noted in the state folder after
they are on the disk; what was zeroed after the last note is zeroed again.

A RAID volume takes zeros as long as one leg takes them. A leg that fell out meanwhile keeps the old data, and its
extents would go to the next tenant with it. So the volume is removed only when all its legs are seen alive and in step
after the last zero; before that a note of zeros is worth nothing once a leg was seen to be missing.
"""

import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from csi.backends.again import Backoff
from csi.backends.lvm_group import Group
from csi.backends.lvm_report import Lv, Report
from csi.backends.wipe import check_zero, wipe_step
from csi.deadline import Deadline
from csi.errors import Busy, DataLoss, DriverError
from csi.log import get_logger
from csi.records import RecordStore
from csi.run import Boundary

_NAME = re.compile(r"trash-[0-9a-f]{16}")
#: How much longer than its time a step is waited for; after that it goes on beside us.
_PATIENCE_SECONDS = 2.0
_HANGS_SECONDS = 60.0
#: Most steps that may go on beside us. Where so many disks hang, no further one is begun.
_MOST_BESIDE = 4


def new_name() -> str:
    """A name for a deleted volume that no other ever had."""
    return f"trash-{secrets.token_hex(8)}"


class _Zeroing:
    """A step of zeroing in a thread of its own: a disk that hangs keeps that thread, and nothing else."""

    def __init__(self, path: Path, *, start: int, size_bytes: int, seconds: float, boundary: Boundary) -> None:
        self._boundary = boundary
        self._path = path
        self._start = start
        self._size_bytes = size_bytes
        self._seconds = seconds
        self._offset = start
        self._error: BaseException | None = None
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"wipe {path.name}", daemon=True)
        self._thread.start()

    @property
    def age_seconds(self) -> float:
        """How long ago it began."""
        return time.monotonic() - self._began

    def ended(self, *, wait_seconds: float) -> bool:
        """Whether it ended, now or within so many seconds."""
        self._thread.join(max(0.0, wait_seconds))
        return not self._thread.is_alive()

    def offset(self) -> int:
        """Up to where zeros are on the disk. Raises what the step raised."""
        if self._error is not None:
            raise self._error
        return self._offset

    def _run(self) -> None:
        try:
            offset = wipe_step(
                self._path,
                start=self._start,
                size_bytes=self._size_bytes,
                seconds=self._seconds,
                boundary=self._boundary,
            )
            if offset >= self._size_bytes:
                check_zero(self._path, size_bytes=self._size_bytes)
            self._offset = offset
        except BaseException as error:  # noqa: BLE001 - raised again by `offset`, in the thread that asked
            self._error = error


class Trash:
    """The wiper of one pool. `step` is called again and again and does a little each time."""

    def __init__(
        self, group: Group, *, mine: Callable[[Lv], bool], notes: RecordStore, seconds: float, boundary: Boundary
    ) -> None:
        """mine: whether a volume of the group is this pool's. seconds: about how long one step zeroes."""
        self._group = group
        self._mine = mine
        self._notes = notes
        self._seconds = seconds
        self._boundary = boundary
        self._backoff = Backoff()
        self._zeroing: dict[str, _Zeroing] = {}
        self._stuck: dict[str, str] = {}
        self._log = get_logger("wipe")

    def stuck(self, report: Report) -> list[str]:
        """The deleted volumes whose space can't be given on, with the reason and the repair."""
        return stuck(report, mine=self._mine, reasons=self._stuck)

    def step(self, report: Report, deadline: Deadline) -> None:
        """Zero for about the given seconds, and remove what is zero to its end. The lock is not held by the caller."""
        trash = _trash(report, self._mine)
        self._forget_others({lv.name for lv in trash})
        end = time.monotonic() + min(self._seconds, deadline.remaining())
        for lv in trash:
            if deadline.stopping:
                return
            if not self._backoff.due(lv.name):
                continue
            try:
                self._advance(report, lv, end, deadline)
            except DriverError as error:
                if isinstance(error, DataLoss):
                    self._notes.remove(lv.name)  # from the start, at the next try
                self._backoff.failed(lv.name)
                self._stuck[lv.name] = str(error)
            if time.monotonic() >= end:
                return

    def _advance(self, report: Report, lv: Lv, end: float, deadline: Deadline) -> None:
        zeroing, wait_seconds = self._zeroing.get(lv.name), 0.0
        if zeroing is None:
            zeroing = self._begin(report, lv, end, deadline)
            wait_seconds = min(end + _PATIENCE_SECONDS - time.monotonic(), deadline.remaining())
        if zeroing is not None:
            if not zeroing.ended(wait_seconds=wait_seconds):
                if zeroing.age_seconds > _HANGS_SECONDS:
                    self._stuck[lv.name] = "zeroing it hangs; see the kernel log for its disks"
                return
            del self._zeroing[lv.name]
            offset = zeroing.offset()
            self._notes.write(lv.name, {"uuid": lv.uuid, "zeroed_bytes": offset})
            if offset < lv.size_bytes:
                self._stuck.pop(lv.name, None)
                return
        elif self._noted(lv) < lv.size_bytes:
            return  # too many hang
        self._remove(lv, deadline)

    def _begin(self, report: Report, lv: Lv, end: float, deadline: Deadline) -> _Zeroing | None:
        """Begin a step; None if all is zero already, or too many steps hang."""
        self._check_whole(report, lv, deadline)
        path = self._device(report, lv, deadline)
        offset = self._noted(lv)
        if offset >= lv.size_bytes or len(self._zeroing) >= _MOST_BESIDE:
            return None
        seconds = max(0.0, end - time.monotonic())
        zeroing = _Zeroing(path, start=offset, size_bytes=lv.size_bytes, seconds=seconds, boundary=self._boundary)
        self._zeroing[lv.name] = zeroing
        return zeroing

    def _noted(self, lv: Lv) -> int:
        note = self._notes.read(lv.name)
        return int(note["zeroed_bytes"]) if note and note.get("uuid") == lv.uuid else 0

    def _device(self, report: Report, lv: Lv, deadline: Deadline) -> Path:
        """The device, proved to be this deleted volume: zeros go nowhere else."""
        node = self._group.seen(report, lv) if lv.uuid else None
        if node is None:
            with self._group.lock.hold(deadline):
                report = self._group.reread(deadline)
                node = self._group.device(report, _now(report, lv), deadline)
        return node.path

    def _check_whole(self, report: Report, lv: Lv, deadline: Deadline) -> None:
        """Raise DataLoss unless every disk of the volume is there. A leg whose disk came back is taken in again."""
        if not sick(report, lv):
            return
        # The note goes first: whatever is found now, a leg may have missed the zeros that it tells of.
        self._notes.remove(lv.name)
        with self._group.lock.hold(deadline):
            report = self._group.reread(deadline)
            lv = _now(report, lv)
            if lv.health == "refresh needed" and not report.missing_pvs:
                self._group.lvm.refresh(lv.name, deadline)
                report = self._group.reread(deadline)
                lv = _now(report, lv)
        why = sick(report, lv)
        if why:
            raise DataLoss(why)

    def _remove(self, lv: Lv, deadline: Deadline) -> None:
        """Remove a volume whose zeros are complete, if they are so on every leg: looked at now, not in a report."""
        with self._group.lock.hold(deadline):
            report = self._group.reread(deadline)
            lv = _now(report, lv)
            why = sick(report, lv)
            if not why and _is_raid(lv):
                why = self._leg_problem(report, lv, deadline)
            if why:
                raise DataLoss(why)
            self._group.remove(report, lv, deadline)
        self._backoff.done(lv.name)
        self._stuck.pop(lv.name, None)
        self._notes.remove(lv.name)
        self._log.info("deleted volume wiped, its space is free again", lv=lv.name, size_bytes=lv.size_bytes)

    def _leg_problem(self, report: Report, lv: Lv, deadline: Deadline) -> str:
        """What the kernel says against this RAID volume. Raises Busy while the legs are only brought into step."""
        legs, in_step = self._group.lvm.raid_legs(lv.name, deadline)
        if not legs or legs.strip("Aa"):
            said = legs or "nothing"
            return f"not all of its RAID legs are alive (the kernel says {said}) -> {_repair(report, lv)}"
        if "a" in legs or not in_step:
            # New zeros reach all of them, and the old ones are copied.
            raise Busy("its RAID legs are being brought into step; it is removed afterwards")
        return ""

    def _forget_others(self, names: set[str]) -> None:
        for name in set(self._notes.names()) - names:
            self._notes.remove(name)
        for gone in self._stuck.keys() - names:
            del self._stuck[gone]
        for gone in self._zeroing.keys() - names:
            if self._zeroing[gone].ended(wait_seconds=0.0):
                del self._zeroing[gone]


def stuck(report: Report, *, mine: Callable[[Lv], bool], reasons: Mapping[str, str] | None = None) -> list[str]:
    """A sentence for each deleted volume whose space can't be given on. reasons: those that no report shows."""
    found = ((lv, (reasons or {}).get(lv.name) or sick(report, lv)) for lv in _trash(report, mine))
    return [f"deleted volume {report.vg}/{lv.name}: its space stays taken: {why}" for lv, why in found if why]


def _trash(report: Report, mine: Callable[[Lv], bool]) -> list[Lv]:
    """The deleted volumes of a pool that still have their space."""
    return [lv for name, lv in sorted(report.lvs.items()) if _NAME.fullmatch(name) and mine(lv)]


def _now(report: Report, lv: Lv) -> Lv:
    """The same deleted volume in a later report."""
    now = report.lvs.get(lv.name)
    if now is None or (lv.uuid and now.uuid != lv.uuid):
        raise Busy("it vanished while it was being wiped")
    return now


def _is_raid(lv: Lv) -> bool:
    return any(word.startswith("raid") for word in lv.layout)


def sick(report: Report, lv: Lv) -> str:
    """Why a part of a deleted volume's data might stay where no zero reaches it, with the repair; "" = nothing."""
    if report.missing_pvs or lv.health == "partial":
        return f"disks of the group are missing ({report.missing_pvs}) and would keep its data -> {_repair(report, lv)}"
    if lv.health == "refresh needed":
        return f"a RAID leg of it had errors and may keep its data -> {_repair(report, lv)}"
    if lv.health == "mismatches exist":
        return f"its RAID copies differ -> run `lvchange --syncaction repair {report.vg}/{lv.name}`"
    return f"LVM says of it: {lv.health} -> see `lvs -a {report.vg}`" if lv.health else ""


def _repair(report: Report, lv: Lv) -> str:
    """Tried: after vgreduce a RAID volume is still there, without the leg, until it is converted."""
    convert = "lvconvert --mirrors 0" if "raid1" in lv.layout else "lvconvert --repair"
    raid = f", then `{convert} {report.vg}/{lv.name}`" if _is_raid(lv) else ""
    return (
        "bring the disk back (`vgextend --restoremissing` if LVM goes on calling it missing); if it is lost for good: "
        f"`vgreduce --removemissing --force {report.vg}`, which drops what lies on that disk alone{raid}"
    )
