"""Detaching what an earlier life of this node left, until nothing of it is left."""

import time
from collections.abc import Sequence

from csi.connectors.base import Connector
from csi.deadline import Deadline
from csi.errors import Busy, DriverError
from csi.locks import VolumeLocks
from csi.log import get_logger
from csi.stage_records import StageRecords

_BUSY = "busy"
_FIRST_SECONDS, _MOST_SECONDS = 2.0, 60.0


class Sweep:
    """Detaches volumes that nobody staged and nobody uses: a dead session is retried by iscsid for ever."""

    def __init__(self, connectors: Sequence[Connector], *, records: StageRecords, locks: VolumeLocks) -> None:
        self._connectors = tuple(connectors)
        self._records = records
        self._locks = locks
        self._done = False
        self._told: dict[str, str] = {}
        self._seconds = _FIRST_SECONDS
        self._due = 0.0
        self._log = get_logger("sweep")

    def turn(self, deadline: Deadline) -> None:
        """Sweep if it is due; after a turn in which nothing failed it never is again."""
        if self._done or time.monotonic() < self._due:
            return
        failed: dict[str, str] = {}
        for connector in self._connectors:
            try:
                volume_ids = connector.left_over()
            except DriverError as error:
                failed[connector.protocol] = str(error)
                continue
            for volume_id in volume_ids:
                if problem := self._detach(connector, volume_id, deadline):
                    failed[volume_id] = problem
        self._tell(failed)
        self._done = not failed
        self._due = time.monotonic() + self._seconds
        self._seconds = min(2 * self._seconds, _MOST_SECONDS)

    def _detach(self, connector: Connector, volume_id: str, deadline: Deadline) -> str:
        """Detach a volume without a record; returns what went wrong, or ""."""
        try:
            with self._locks.hold(volume_id, background=True):
                if volume_id in self._records.volume_ids():
                    return ""
                connector.disconnect(volume_id, deadline)
                self._log.info("detached what an earlier life left", volume_id=volume_id)
        except Busy:
            return _BUSY  # a request for it is under way
        except DriverError as error:
            return str(error)
        return ""

    def _tell(self, failed: dict[str, str]) -> None:
        for name, problem in failed.items():
            if problem != _BUSY and self._told.get(name) != problem:
                self._log.warning("left attached", of=name, error=problem)
        self._told = failed
