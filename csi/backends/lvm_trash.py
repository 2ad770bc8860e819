"""Deleted thick volumes on their way back to the pool: renamed, then zeroed, then removed.

The list of them is the group itself, so a restart resumes. How far the zeros reach is noted in the state folder after
they are on the disk; what was zeroed after the last note is zeroed again.
"""

import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from csi.backends.backoff import Backoff
from csi.backends.lvm_group import Group
from csi.backends.lvm_report import Lv, Report
from csi.backends.wipe import check_zero, wipe_step
from csi.deadline import Deadline
from csi.errors import DataLoss, DriverError
from csi.log import get_logger
from csi.records import RecordStore

_NAME = re.compile(r"trash-[0-9a-f]{16}")


def new_name() -> str:
    """A name for a deleted volume that no other ever had."""
    return f"trash-{secrets.token_hex(8)}"


class Trash:
    """The wiper of one pool. `step` is called again and again and does a little each time."""

    def __init__(self, group: Group, *, mine: Callable[[Lv], bool], notes: RecordStore, seconds: float) -> None:
        """mine: whether a volume of the group is this pool's. seconds: about how long one step zeroes."""
        self._group = group
        self._mine = mine
        self._notes = notes
        self._seconds = seconds
        self._backoff = Backoff()
        self._log = get_logger("wipe")

    def of(self, report: Report) -> list[Lv]:
        """The deleted volumes of this pool that still have their space."""
        return [lv for name, lv in sorted(report.lvs.items()) if _NAME.fullmatch(name) and self._mine(lv)]

    def step(self, report: Report, deadline: Deadline) -> None:
        """Zero for about the given seconds, and remove what is zero to its end."""
        trash = self.of(report)
        self._drop_notes({lv.name for lv in trash})
        end = time.monotonic() + min(self._seconds, deadline.remaining())
        for lv in trash:
            if deadline.stopping:
                return
            if not self._backoff.due(lv.name):
                continue
            try:
                self._wipe(report, lv, end, deadline)
            except DriverError as error:
                self._backoff.failed(lv.name)
                self._log.warning("can't wipe a deleted volume, its space stays taken", lv=lv.name, error=str(error))
            if time.monotonic() >= end:
                return

    def _wipe(self, report: Report, lv: Lv, end: float, deadline: Deadline) -> None:
        if lv.health == "partial":
            raise DataLoss("one of its disks is missing and would keep the data; bring it back, or remove the volume")
        offset = self._noted(lv)
        if offset < lv.size_bytes:
            path = self._device(report, lv, deadline)
            offset = wipe_step(path, start=offset, size_bytes=lv.size_bytes, seconds=end - time.monotonic())
            if offset >= lv.size_bytes:
                self._check(path, lv)
            self._notes.write(lv.name, {"uuid": lv.uuid, "zeroed_bytes": offset})
        if offset >= lv.size_bytes:
            self._remove(report, lv, deadline)

    def _noted(self, lv: Lv) -> int:
        note = self._notes.read(lv.name)
        return int(note["zeroed_bytes"]) if note and note.get("uuid") == lv.uuid else 0

    def _device(self, report: Report, lv: Lv, deadline: Deadline) -> Path:
        """The device, proved to be this deleted volume: zeros go nowhere else."""
        node = self._group.seen(report, lv) if lv.uuid else None
        if node is None:
            with self._group.lock.hold(deadline):
                report = self._group.reread(deadline)
                if lv.name not in report.lvs:
                    raise DataLoss("it vanished while it was being wiped")
                node = self._group.device(report, report.lvs[lv.name], deadline)
        return node.path

    def _check(self, path: Path, lv: Lv) -> None:
        try:
            check_zero(path, size_bytes=lv.size_bytes)
        except DataLoss:
            self._notes.remove(lv.name)  # from the start, at the next try
            raise

    def _remove(self, report: Report, lv: Lv, deadline: Deadline) -> None:
        with self._group.lock.hold(deadline):
            self._group.remove(report, lv, deadline)
        self._backoff.done(lv.name)
        self._notes.remove(lv.name)
        self._log.info("deleted volume wiped, its space is free again", lv=lv.name, size_bytes=lv.size_bytes)

    def _drop_notes(self, names: set[str]) -> None:
        for name in set(self._notes.names()) - names:
            self._notes.remove(name)
