"""A volume group with one cached report, kept true by our own changes and thrown away after any failure."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from csi.backends.device_nodes import DeviceNodes, Node
from csi.backends.lvm_cli import Lvm
from csi.backends.lvm_report import Lv, Report
from csi.deadline import Deadline, wait_until
from csi.errors import CommandFailed, DataLoss, DriverError, Timeout, Unavailable
from csi.locks import ResourceLock

_NODE_SECONDS = 10.0


class Group:
    """The volume group of one pool. Whatever may start a process wants the `lock` held; `cached` and `seen` do not."""

    def __init__(self, lvm: Lvm, nodes: DeviceNodes, *, pool: str) -> None:
        self.lvm = lvm
        self.lock = ResourceLock(f"pool {pool}")
        self._nodes = nodes
        self._report: Report | None = None
        self._read_at = 0.0
        self._guessed = False

    @property
    def vg(self) -> str:
        """The name of the group."""
        return self.lvm.vg

    # -- look ----------------------------------------------------------------------------------------------------

    def cached(self, *, max_age: float = float("inf")) -> Report | None:
        """The cached report if it is valid and at most `max_age` seconds old. Starts no process."""
        report = self._report
        return report if report is not None and time.monotonic() - self._read_at <= max_age else None

    @property
    def guessed(self) -> bool:
        """True if the cached report has changes of ours, but free space and fill levels from before them."""
        return self._guessed

    def report(self, deadline: Deadline, *, max_age: float) -> Report:
        """The cached report, or a new one."""
        return self.cached(max_age=max_age) or self.reread(deadline)

    def reread(self, deadline: Deadline) -> Report:
        """A new report."""
        began = time.monotonic()
        try:
            report = self.lvm.report(deadline)
        except BaseException:
            self._report = None
            raise
        self._report, self._read_at, self._guessed = report, began, False
        return report

    def seen(self, report: Report, lv: Lv) -> Node | None:
        """The device of a volume if it is active and surely this volume's: uuid and size. Starts no process."""
        node = self._nodes.look(self.vg, lv.name)
        if node is None or node.suspended or node.size_bytes != lv.size_bytes:
            return None
        return node if _is_of(node, report, lv) else None

    # -- change --------------------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        *,
        tags: Sequence[str],
        shape: Sequence[str],
        size_bytes: int,
        made: Callable[[Lv], Lv],
        deadline: Deadline,
    ) -> Report:
        """Create a volume; `made` completes what the tags and the device do not say of it."""

        def seen(before: Report) -> Report | None:
            node = self._new_node(name, size_bytes=size_bytes, deadline=deadline)
            prefix = f"LVM-{before.vg_uuid}"
            if node is None or not node.dm_uuid.startswith(prefix):
                return None
            return before.with_lv(made(Lv(name, node.dm_uuid.removeprefix(prefix), size_bytes, tags=tuple(tags))))

        return self._change(
            lambda: self.lvm.create(name, tags=tags, shape=shape, deadline=deadline),
            seen=seen,
            done=lambda after: name in after.lvs and set(tags) <= set(after.lvs[name].tags),
            deadline=deadline,
        )

    def extend(self, lv: Lv, *, size_bytes: int, extent_bytes: int, deadline: Deadline) -> Report:
        """Enlarge a volume to size_bytes."""
        grown = replace(lv, size_bytes=size_bytes)
        return self._change(
            lambda: self.lvm.extend(lv.name, extents=size_bytes // extent_bytes, deadline=deadline),
            seen=lambda before: before.with_lv(grown) if self.seen(before, grown) else None,
            done=lambda after: lv.name in after.lvs and after.lvs[lv.name].size_bytes >= size_bytes,
            deadline=deadline,
        )

    def rename(self, lv: Lv, new_name: str, deadline: Deadline) -> Report:
        """Rename a volume."""
        renamed = replace(lv, name=new_name)

        def seen(before: Report) -> Report | None:
            if not self._is_gone(lv.name) or self.seen(before, renamed) is None:
                return None
            return before.without_lv(lv.name).with_lv(renamed)

        return self._change(
            lambda: self.lvm.rename(lv.name, new_name, deadline),
            seen=seen,
            done=lambda after: lv.name not in after.lvs,
            deadline=deadline,
        )

    def remove(self, report: Report, lv: Lv, deadline: Deadline) -> Report:
        """Remove a volume. Raises InUse while something has it open."""
        return self._change(
            lambda: self._repairing(report, lv, lambda: self.lvm.remove(lv.name, deadline), deadline),
            seen=lambda before: before.without_lv(lv.name) if self._is_gone(lv.name) else None,
            done=lambda after: lv.name not in after.lvs,
            deadline=deadline,
        )

    def remove_tag(self, lv: Lv, tag: str, deadline: Deadline) -> Report:
        """Remove a tag of a volume."""
        return self._change(
            lambda: self.lvm.remove_tag(lv.name, tag, deadline),
            seen=lambda _before: None,  # no device shows a tag
            done=lambda after: lv.name not in after.lvs or tag not in after.lvs[lv.name].tags,
            deadline=deadline,
        )

    def activate(self, report: Report, name: str, deadline: Deadline) -> Report:
        """Activate a volume, or a thin pool, and read the group anew."""
        self._repairing(report, report.lvs[name], lambda: self.lvm.activate(name, deadline), deadline)
        return self.reread(deadline)

    def _change(
        self,
        act: Callable[[], None],
        *,
        seen: Callable[[Report], Report | None],
        done: Callable[[Report], bool],
        deadline: Deadline,
    ) -> Report:
        """Do `act`, and judge it by what is there afterwards, never by its exit code.

        seen: given the report of before, looks at the device nodes and returns the report of now if they show the
        change; else a new report is read. done: whether that one shows it. Raises what `act` raised, or Unavailable.
        """
        before = self._report
        failure: DriverError | None = None
        try:
            act()
            after = seen(before) if before is not None else None
        except DriverError as error:
            failure, after = error, None
        except BaseException:
            self._report = None  # nothing is known any more
            raise
        if after is not None:
            self._report, self._guessed = after, True
            return after
        try:
            report = self.reread(deadline)
        except DriverError as error:
            raise failure or error from error
        if not done(report):
            raise failure or Unavailable(f"volume group {self.vg}: LVM reports success but changed nothing; repeat")
        return report

    def _new_node(self, name: str, *, size_bytes: int, deadline: Deadline) -> Node | None:
        """The device of a volume that was created just now; udev may make its node a little later."""

        def look() -> Node | None:
            node = self._nodes.look(self.vg, name)
            return node if node is not None and node.size_bytes == size_bytes and not node.suspended else None

        try:
            return wait_until(look, deadline.within(2.0), what=f"the device of {self.vg}/{name}")
        except (Timeout, Unavailable):
            return None

    def _is_gone(self, name: str) -> bool:
        """True if no device node of this name is left."""
        try:
            return self._nodes.look(self.vg, name) is None
        except Unavailable:
            return False

    def device(self, report: Report, lv: Lv, deadline: Deadline) -> Node:
        """The device of a volume: activated if it is not, repaired if a killed command left it half changed.

        Raises Unavailable when it can't be had, DataLoss when what has its name is another volume.
        """
        node = self.seen(report, lv)
        if node is not None:
            return node
        found = self._nodes.look(self.vg, lv.name)
        if found is None or found.size_bytes == 0:
            self._repairing(report, lv, lambda: self.lvm.activate(lv.name, deadline), deadline)
            self._await_node(lv.name, deadline)
        elif found.suspended or found.size_bytes != lv.size_bytes:
            self.lvm.refresh(lv.name, deadline)
        node = self.seen(report, lv)
        if node is not None:
            return node
        found = self._nodes.look(self.vg, lv.name)
        if found is not None and not _is_of(found, report, lv):
            raise DataLoss(
                f"{found.path}: is device {found.dm_uuid or 'unknown'}, not volume {lv.name} (uuid {lv.uuid}); "
                f"nothing is done with it; see `dmsetup info -c` and `lvs -o +uuid {self.vg}`"
            )
        raise Unavailable(
            f"{self.vg}/{lv.name}: its device is not there as LVM says ({lv.size_bytes} bytes; found: "
            f"{found or 'none'}); see `lvs -a {self.vg}`"
        )

    def _repairing(self, report: Report, lv: Lv, act: Callable[[], None], deadline: Deadline) -> None:
        """Do `act`; if it fails, remove what a killed activation left of the volume's parts, and do it again.

        LVM itself refuses such a volume or thin pool for ever ("prohibited while … is active"). Nobody can be using
        these parts: the kernel refuses to remove a used one.
        """
        try:
            act()
        except CommandFailed:
            names = [lv.name, *([lv.pool_lv] if lv.pool_lv else [])]
            parts = self.lvm.parts(report, names, deadline)
            if not parts or not self._removed(parts, deadline):
                raise
            act()

    def _removed(self, parts: Sequence[str], deadline: Deadline) -> bool:
        try:
            for part in parts:
                self.lvm.remove_part(part, deadline)
        except CommandFailed:
            return False  # in use, so it was something else
        return True

    def _await_node(self, name: str, deadline: Deadline) -> None:
        def look() -> bool:
            return self._nodes.look(self.vg, name) is not None

        wait_until(look, deadline.within(_NODE_SECONDS), what=f"the device node of {self.vg}/{name}")


def _is_of(node: Node, report: Report, lv: Lv) -> bool:
    """Whether a device is this volume. Without a uuid from sysfs nothing is proved, and that is not enough."""
    if not lv.uuid:
        return node.dm_uuid.startswith(f"LVM-{report.vg_uuid}")
    return node.dm_uuid == f"LVM-{report.vg_uuid}{lv.uuid}"
