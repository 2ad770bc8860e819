"""What the state folder knows of logical volumes beyond their tags: creations under way, and volumes that hold data.

Both are records beside the group, because a tag costs a command: these cost an fsync.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from csi.backends import lvm_tags
from csi.backends.again import Backoff
from csi.backends.lvm_group import Group
from csi.backends.lvm_report import Lv, Report
from csi.deadline import Deadline
from csi.errors import DriverError
from csi.log import get_logger
from csi.records import RecordStore
from csi.run import Boundary


class Marks:
    """The records of one pool, by volume id."""

    def __init__(self, group: Group, *, state: Path, mine: Callable[[Lv], bool], boundary: Boundary) -> None:
        """state: the pool's folder in the state directory."""
        self._group = group
        self._mine = mine
        self._creating = RecordStore(state / "creating", boundary=boundary)
        self._used = RecordStore(state / "used", boundary=boundary)
        self._making: set[str] = set()
        self._backoff = Backoff()
        self._log = get_logger("lvm")

    @contextmanager
    def creation(self, volume_id: str) -> Iterator[None]:
        """While a request makes this volume, the background does not take it for what a killed creation left."""
        self._making.add(volume_id)
        try:
            yield
        finally:
            self._making.discard(volume_id)

    def begin(self, volume_id: str, *, nonce: str) -> None:
        """A creation begins; the volume it makes will have the nonce in its tags."""
        self._creating.write(volume_id, {"nonce": nonce})

    def is_incomplete(self, lv: Lv) -> bool:
        """True if the creation of this very volume began and never ended: it was not given to anybody yet.

        Believed only of a volume that never held data, so that a state folder from an old backup harms nobody.
        """
        fields = self._creating.read(lv.name)
        if fields is None or lvm_tags.made(str(fields.get("nonce"))) not in lv.tags:
            return False
        return lvm_tags.BLANK in lv.tags and not self.is_used(lv)

    def complete(self, volume_id: str) -> None:
        """The creation is over."""
        self._creating.remove(volume_id)

    def use(self, volume_id: str, *, uuid: str) -> None:
        """The volume holds data."""
        self._used.write(volume_id, {"uuid": uuid})

    def is_used(self, lv: Lv) -> bool:
        """Whether this very volume was marked, not an earlier one of its id."""
        fields = self._used.read(lv.name)
        return fields is not None and (not lv.uuid or fields.get("uuid") in ("", lv.uuid))

    def forget(self, volume_id: str) -> None:
        """The volume is deleted."""
        for store in (self._creating, self._used):
            if store.read(volume_id) is not None:
                store.remove(volume_id)

    def tend(self, report: Report, deadline: Deadline) -> None:
        """Remove what killed creations left; write marks into the tags, a volume a call. The pool is locked."""
        for volume_id in self._creating.names():
            if volume_id in self._making:
                continue
            lv = report.lvs.get(volume_id)
            if lv is not None and self.is_incomplete(lv):
                if self._backoff.due(volume_id):
                    self._remove_leftover(report, lv, deadline)
            else:
                self._creating.remove(volume_id)
        for volume_id in self._used.names():
            lv = report.lvs.get(volume_id)
            if lv is None or not self._mine(lv) or not self.is_used(lv) or lvm_tags.BLANK not in lv.tags:
                self._used.remove(volume_id)
            elif self._backoff.due(volume_id):
                self._write_tag(lv, deadline)
                return

    def _remove_leftover(self, report: Report, lv: Lv, deadline: Deadline) -> None:
        try:
            self._group.remove(report, lv, deadline)
            self._creating.remove(lv.name)
            self._backoff.done(lv.name)
            self._log.info("removed what a killed creation left", lv=lv.name)
        except DriverError as error:
            self._backoff.failed(lv.name)
            self._log.warning("can't remove what a killed creation left", lv=lv.name, error=str(error))

    def _write_tag(self, lv: Lv, deadline: Deadline) -> None:
        try:
            self._group.remove_tag(lv, lvm_tags.BLANK, deadline)
            self._used.remove(lv.name)
            self._backoff.done(lv.name)
        except DriverError as error:
            # Nothing is lost: the record says the same as the tag would.
            self._backoff.failed(lv.name)
            self._log.warning("can't write the mark of a used volume into its tags", lv=lv.name, error=str(error))
