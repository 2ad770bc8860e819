"""Volumes as logical volumes of one volume group, thick or thin. The group itself is the database.

Creation is one lvcreate, with all metadata in tags. What a killed command leaves is judged by reading back. A creation
is noted in the state folder until it is complete, and until then the volume does not exist for anybody: LVM commits it
before it removes old signatures (a foreign filesystem would be taken for its data), and a RAID volume whose lvcreate
was killed refuses for ever to be activated. The next creation, or the background, removes such leftovers.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from csi.backends import lvm_tags, lvm_trash
from csi.backends.again import Told
from csi.backends.device_nodes import DeviceNodes, Node
from csi.backends.lvm_cli import Lvm
from csi.backends.lvm_group import Group
from csi.backends.lvm_marks import Marks
from csi.backends.lvm_report import Report
from csi.backends.lvm_space import Space
from csi.backends.lvm_view import View, is_of_pool, sick
from csi.backends.wipe import zero_ends
from csi.deadline import Deadline, wait_until
from csi.errors import Busy, CommandFailed, DataLoss, DriverError, InUse, NoSpace, Timeout
from csi.figures import figure
from csi.log import get_logger
from csi.model import VOLUME_ID, Capacity, Volume
from csi.records import RecordStore
from csi.run import Boundary, Runner, no_boundary
from csi.signature import glance, holds_data, look

#: Ages in seconds up to which a cached report will do.
_AGE_FOR_CHECKS = 30.0
_AGE_FOR_CAPACITY = 2.0
#: The background reads the group so much earlier than a request would have to that no request ever has to.
_AGE_IN_BACKGROUND = 15.0
#: Least share of the metadata area that must be free for a new volume: a full one can't even be given a tag.
_MDA_FREE = 0.10
_CLOSE_SECONDS = 3.0


class LvmBackend:
    """A pool in a volume group. Several pools may share a group: each volume carries its pool's name in a tag."""

    def __init__(
        self,
        pool: str,
        *,
        vg: str,
        space: Space,
        state: Path,
        runner: Runner,
        devices: Sequence[Path] = (),
        boundary: Boundary = no_boundary,
        nodes: DeviceNodes | None = None,
        wipe_seconds: float = 1.0,
    ) -> None:
        """vg: the group. state: the pool's own folder in the state directory. devices: its disks; empty = found.

        wipe_seconds: about how long one `tend` may zero deleted data. Starts no process.
        """
        self._pool = pool
        self._space = space
        lvm = Lvm(vg, runner=runner, state=RecordStore(state, boundary=boundary), devices=devices)
        self._nodes = nodes or DeviceNodes()
        self._group = Group(lvm, self._nodes, pool=pool)
        mine = partial(is_of_pool, pool=pool, space=space)
        self._marks = Marks(self._group, state=state, mine=mine, boundary=boundary)
        self._view = View(pool, space=space, nodes=self._nodes, marks=self._marks)
        notes = RecordStore(state / "wipes", boundary=boundary)
        self._trash = lvm_trash.Trash(self._group, mine=mine, notes=notes, seconds=wipe_seconds, boundary=boundary)
        self._boundary = boundary
        self._told = Told()
        self._log = get_logger("lvm")

    @property
    def pool(self) -> str:
        """See Backend.pool."""
        return self._pool

    def round_size(self, size_bytes: int) -> int:
        """See Backend.round_size. Reads the group if nothing is cached; raises Unavailable if that fails."""
        report = self._cached_or_read(Deadline.after(60))
        unit = self._space.unit_bytes(report)
        return max(1, -(-size_bytes // unit)) * unit

    # -- create, delete, grow ------------------------------------------------------------------------------------

    def create(
        self, volume_id: str, *, name: str, size_bytes: int, parameters: Mapping[str, str], deadline: Deadline
    ) -> Volume:
        """See Backend.create. One command, if the cached report is fresh. Raises Invalid for parameters too long."""
        if not VOLUME_ID.fullmatch(volume_id):
            raise ValueError(f"not a volume id: {volume_id!r}")
        nonce = secrets.token_hex(8)
        tags = lvm_tags.encode(pool=self._pool, name=name, parameters=parameters, nonce=nonce)
        with self._marks.creation(volume_id):
            with self._group.lock.hold(deadline):
                report, is_new = self._begin(volume_id, tags, nonce, size_bytes, parameters, deadline)
                node = self._group.device(report, report.lvs[volume_id], deadline) if is_new else None
            if node is not None:
                # Reads the device, so not under the pool's lock: a disk that hangs must not hang the pool.
                self._finish(volume_id, node)
        return self._view.get(report, volume_id)

    def _begin(
        self,
        volume_id: str,
        tags: Sequence[str],
        nonce: str,
        size_bytes: int,
        parameters: Mapping[str, str],
        deadline: Deadline,
    ) -> tuple[Report, bool]:
        """A report with the volume, and whether it was made now."""
        report = self._group.report(deadline, max_age=_AGE_FOR_CHECKS)
        if volume_id in report.lvs and not is_of_pool(report.lvs[volume_id], pool=self._pool, space=self._space):
            report = self._group.reread(deadline)  # another pool of the group may have deleted it since
        if volume_id in report.lvs and self._marks.is_incomplete(report.lvs[volume_id]):
            report = self._group.remove(report, report.lvs[volume_id], deadline)
        if volume_id in report.lvs:
            existing = self._view.get(report, volume_id)
            if existing.size_bytes == size_bytes and dict(existing.parameters) == dict(parameters):
                return report, False
            raise Busy(f"volume {volume_id}: it appeared in this moment, of another kind; repeat the request")
        report = self._checked(report, volume_id, size_bytes, deadline)
        self._marks.begin(volume_id, nonce=nonce)
        return self._make(report, volume_id, tags, size_bytes, deadline), True

    def _make(self, report: Report, volume_id: str, tags: Sequence[str], size_bytes: int, deadline: Deadline) -> Report:
        try:
            return self._group.create(
                volume_id,
                tags=tags,
                shape=self._space.shape(report, size_bytes),
                size_bytes=size_bytes,
                made=self._space.made,
                deadline=deadline,
            )
        except (NoSpace, CommandFailed) as error:
            after = self._group.cached()
            if after is not None and volume_id in after.lvs:
                raise Busy(f"volume {volume_id}: it appeared in this moment; repeat the request") from error
            if after is not None:
                self._space.check(after, None, size_bytes)  # says it in bytes, if it sees it too
            raise

    def delete(self, volume: Volume, deadline: Deadline) -> None:
        """See Backend.delete. Raises InUse while something on this machine has the device open."""
        name = volume.volume_id
        with self._group.lock.hold(deadline):
            report = self._cached_if_unused(name) or self._group.reread(deadline)
            lv = report.lvs.get(name)
            if lv is not None and is_of_pool(lv, pool=self._pool, space=self._space):
                if lv.is_open:
                    self._await_closed(name, deadline)
                if self._space.wipes:
                    self._group.rename(lv, lvm_trash.new_name(), deadline)
                else:
                    self._group.remove(report, lv, deadline)
            self._marks.forget(name)

    def _cached_if_unused(self, name: str) -> Report | None:
        """The cached report, corrected, if the volume's device is there as it says and nothing has it open."""
        report = self._group.cached()
        lv = report.lvs.get(name) if report is not None else None
        node = self._group.seen(report, lv) if report is not None and lv is not None else None
        if report is None or lv is None or node is None or not self._nodes.is_unused(node):
            return None
        return report.with_lv(replace(lv, is_open=False))

    def _await_closed(self, name: str, deadline: Deadline) -> None:
        """udev looks into a device for a moment after each close by a writer, so an open one gets a few seconds."""

        def closed() -> bool:
            report = self._group.report(deadline, max_age=0.2)
            return name not in report.lvs or not report.lvs[name].is_open

        try:
            wait_until(closed, deadline.within(_CLOSE_SECONDS), what=f"the end of all use of {name}", first=0.25)
        except Timeout as error:
            raise InUse(
                f"volume {name}: {self._nodes.path(self._group.vg, name)} is still open on this machine (an export, a "
                "mount, a copy); see `lsof` and `dmsetup info`, then repeat"
            ) from error

    def grow(self, volume: Volume, *, size_bytes: int, deadline: Deadline) -> Volume:
        """See Backend.grow."""
        name = volume.volume_id
        group = self._group
        with group.lock.hold(deadline):
            report = group.report(deadline, max_age=_AGE_FOR_CHECKS)
            self._view.get(report, name)
            if report.lvs[name].size_bytes < size_bytes:
                report = self._checked(report, name, size_bytes, deadline)
            if report.lvs[name].size_bytes < size_bytes:  # read anew, perhaps
                lv = report.lvs[name]
                report = group.extend(lv, size_bytes=size_bytes, extent_bytes=report.extent_bytes, deadline=deadline)
            group.device(report, report.lvs[name], deadline)
        return self._view.get(report, name)

    # -- find, open ----------------------------------------------------------------------------------------------

    def find(self, volume_id: str, deadline: Deadline) -> Volume | None:
        """See Backend.find. A known volume costs no process; an unknown one costs one if the report is old."""
        report = self._group.cached()
        if report is None or volume_id not in report.lvs:
            with self._group.lock.hold(deadline):
                report = self._group.report(deadline, max_age=_AGE_FOR_CHECKS)
        lv = report.lvs.get(volume_id)
        return self._view.volume(report, lv) if lv is not None else None

    def list_volumes(self, deadline: Deadline) -> list[Volume]:
        """See Backend.list_volumes."""
        with self._group.lock.hold(deadline):
            report = self._group.reread(deadline)
        found = []
        for lv in report.lvs.values():
            try:
                volume = self._view.volume(report, lv)
            except DataLoss as error:
                self._log.warning("volume left out", lv=lv.name, error=str(error))
                continue
            if volume is not None:
                found.append(volume)
        return found

    def open_for_export(self, volume: Volume, deadline: Deadline) -> Volume:
        """See Backend.open_for_export. Starts no process if the device is active and cached."""
        name = volume.volume_id
        report = self._group.cached()
        lv = report.lvs.get(name) if report is not None else None
        node = self._group.seen(report, lv) if report is not None and lv is not None else None
        if report is None or node is None:
            with self._group.lock.hold(deadline):
                report = self._group.reread(deadline)
                self._view.get(report, name)
                node = self._group.device(report, report.lvs[name], deadline)
        opened = self._view.get(report, name)
        return replace(opened, blank=opened.blank and not holds_data(node.path))

    def mark_used(self, volume: Volume) -> None:
        """See Backend.mark_used. The tag follows in the background."""
        report = self._group.cached()
        lv = report.lvs.get(volume.volume_id) if report is not None else None
        self._marks.use(volume.volume_id, uuid=lv.uuid if lv is not None else "")

    def _finish(self, volume_id: str, node: Node) -> None:
        """Complete a creation. What is found on a volume that nobody was ever given is not its data, and goes."""
        found = glance(node.path)
        if found:
            self._log.warning("old signature on a new volume, zeroing its ends", volume_id=volume_id, found=found)
            zero_ends(node.path, size_bytes=node.size_bytes, boundary=self._boundary)
            found = look(node.path)
            if found:
                raise DataLoss(f"volume {volume_id}: {found} is still seen on the new volume; delete it and repeat")
        self._marks.complete(volume_id)

    # -- pool ----------------------------------------------------------------------------------------------------

    def capacity(self, deadline: Deadline) -> Capacity:
        """See Backend.capacity."""
        with self._group.lock.hold(deadline):
            max_age = 0.0 if self._group.guessed else _AGE_FOR_CAPACITY
            report = self._active(self._group.report(deadline, max_age=max_age), deadline)
        available = 0 if report.missing_pvs or _mda_low(report) else self._space.available(report)
        return Capacity(available, available, self._space.unit_bytes(report))

    def problems(self, deadline: Deadline) -> list[str]:
        """See Backend.problems."""
        try:
            with self._group.lock.hold(deadline):
                report = self._group.report(deadline, max_age=_AGE_FOR_CHECKS)
        except DriverError as error:
            return [f"pool {self._pool}: {error}"]
        return [f"pool {self._pool}: {text}" for text in self._space.problems(report)]

    def warnings(self, deadline: Deadline) -> list[str]:
        """What needs care though the pool serves: of the pool, of volumes, of deleted ones; a sentence each."""
        with self._group.lock.hold(deadline):
            report = self._group.report(deadline, max_age=_AGE_FOR_CHECKS)
        return self._warnings(report)

    def _warnings(self, report: Report) -> list[str]:
        found = self._space.warnings(report)
        if report.missing_pvs:
            found.append(
                f"volume group {report.vg}: {report.missing_pvs} of its disks are missing, so nothing can be created "
                f"-> bring them back, or give them up with `vgreduce --removemissing {report.vg}`"
            )
        low = _mda_low(report)
        found += [low] if low else []
        found += sick(report, pool=self._pool, space=self._space, told=found)
        return [f"pool {self._pool}: {text}" for text in [*found, *self._trash.stuck(report)]]

    def tend(self, deadline: Deadline) -> None:
        """See Backend.tend. Wipes come last: what may wait for a disk holds up nothing but the next round."""
        try:
            with self._group.lock.hold(deadline.within(1.0)):
                report = self._group.report(deadline, max_age=_AGE_IN_BACKGROUND)
                self._marks.tend(report, deadline)
        except Timeout:
            return  # requests come first
        report = self._group.cached() or report
        self._trash.step(report, deadline)
        self._told.tell(self._warnings(self._group.cached() or report))

    # -- parts ---------------------------------------------------------------------------------------------------

    def _cached_or_read(self, deadline: Deadline) -> Report:
        report = self._group.cached()
        if report is None:
            with self._group.lock.hold(deadline):
                report = self._group.report(deadline, max_age=_AGE_FOR_CHECKS)
        return report

    def _checked(self, report: Report, volume_id: str, size_bytes: int, deadline: Deadline) -> Report:
        """A report by which the new volume, or the growth, is possible. An old report does not refuse anything."""
        try:
            self._check(report, volume_id, size_bytes)
        except DriverError:
            report = self._active(self._group.reread(deadline), deadline)
            self._check(report, volume_id, size_bytes)
        return report

    def _check(self, report: Report, volume_id: str, size_bytes: int) -> None:
        low = _mda_low(report)
        if low:
            raise NoSpace(low)
        self._space.check(report, report.lvs.get(volume_id), size_bytes)

    def _active(self, report: Report, deadline: Deadline) -> Report:
        """The report with all numbers known: after a boot a thin pool may not be active."""
        name = self._space.inactive(report)
        if not name:
            return report
        return self._group.activate(report, name, deadline)


def _mda_low(report: Report) -> str:
    """Why the group's metadata area takes no new volume, or ""."""
    if report.mda_free_bytes >= report.mda_size_bytes * _MDA_FREE:
        return ""
    return (
        f"volume group {report.vg}: {figure(report.mda_free_bytes)} of its metadata area of "
        f"{figure(report.mda_size_bytes)} are free, new volumes need {_MDA_FREE:.0%}; delete volumes, or make the next "
        "group with `vgcreate --metadatasize=64m` (the area can't be enlarged)"
    )
