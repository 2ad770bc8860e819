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
        volume_ids = set(self._records.volume_ids())
        for connector in self._connectors:
            try:
                volume_ids.update(connector.left_over())
            except DriverError as error:
                failed[connector.protocol] = str(error)
        for volume_id in sorted(volume_ids):
            if problem := self._detach(volume_id, deadline):
                failed[volume_id] = problem
        self._tell(failed)
        self._done = not failed
        self._due = time.monotonic() + self._seconds
        self._seconds = min(2 * self._seconds, _MOST_SECONDS)

    def _detach(self, volume_id: str, deadline: Deadline) -> str:
        """Detach a volume unless it is staged and attached; returns what went wrong, or "".

        Staged on record but not attached is what a reboot leaves: then the record and the initiator's go too.
        """
        try:
            with self._locks.hold(volume_id, background=True):
                attached = any(connector.find(volume_id) is not None for connector in self._connectors)
                if attached and volume_id in self._records.volume_ids():
                    return ""
                for connector in self._connectors:
                    connector.disconnect(volume_id, deadline)
                self._records.try_remove(volume_id)
                self._log.info("removed what an earlier life left", volume_id=volume_id)
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
