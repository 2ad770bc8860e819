"""What a CNODE remembers: how each volume was staged and published, and what it has formatted.

Not what is attached and mounted: that is read from sysfs and mountinfo. So a record that is lost or damaged costs
nothing but the comparison of a repeated request with the first one, and never keeps a volume attached.
"""

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from csi.errors import DataLoss, DriverError
from csi.log import get_logger
from csi.model import VOLUME_ID, AccessMode, Capability
from csi.records import RecordStore


@dataclass(frozen=True)
class Asked:
    """What a NodeStageVolume or NodePublishVolume asked for."""

    capability: Capability
    readonly: bool

    def __str__(self) -> str:
        capability = self.capability
        words = [capability.access_mode.value, "block" if capability.block else capability.fs_type or "filesystem"]
        words += capability.mount_flags
        return " ".join([*words, "read-only" if self.readonly else "writable"])

    def fits(self, other: "Asked") -> bool:
        """Whether the second of two requests for one path asks for the same."""
        return self.readonly == other.readonly and self.same_capability(other)

    def same_capability(self, other: "Asked") -> bool:
        """Whether two requests use the volume in the same way. The order of flags says nothing, nor does no fs_type."""
        return self.capability.access_mode == other.capability.access_mode and self.same_mount(other)

    def same_mount(self, other: "Asked") -> bool:
        """The same without the access mode, of which a mount shows nothing."""
        ours, theirs = self.capability, other.capability
        return (
            ours.block == theirs.block
            and set(ours.mount_flags) == set(theirs.mount_flags)
            and (ours.fs_type == theirs.fs_type or not ours.fs_type or not theirs.fs_type)
        )


@dataclass(frozen=True)
class StageRecord:
    """One volume. Not all of the paths need be mounted still."""

    staged: Mapping[Path, Asked] = field(default_factory=dict)
    targets: Mapping[Path, Asked] = field(default_factory=dict)
    complete: bool = False  # False: an earlier record was lost, so there may be other paths

    def with_staged(self, path: Path, asked: Asked) -> "StageRecord":
        """The record with one more staging path."""
        return replace(self, staged={**self.staged, path: asked})

    def with_target(self, path: Path, asked: Asked) -> "StageRecord":
        """The record with one more target path."""
        return replace(self, targets={**self.targets, path: asked})

    def without_target(self, path: Path) -> "StageRecord":
        """The record without a target path."""
        return replace(self, targets={other: asked for other, asked in self.targets.items() if other != path})


class StageRecords:
    """The records of all volumes on this node. Callers hold the volume's lock."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self._log = get_logger("stage records")

    def read(self, volume_id: str) -> StageRecord | None:
        """The record, or None when there is none. One that can't be read is an empty one, and a warning."""
        try:
            fields = self._records.read(volume_id)
            return None if fields is None else _from_fields(fields)
        except (DriverError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._log.warning(
                "record can't be read; the kernel's tables decide alone", volume_id=volume_id, error=str(error)
            )
            return StageRecord()

    def write(self, volume_id: str, record: StageRecord) -> None:
        """Write or replace a record. Raises NoSpace or Unavailable; see RecordStore.write."""
        self._records.write(volume_id, _fields(record))

    def try_write(self, volume_id: str, record: StageRecord) -> None:
        """Write where what stands on disk does no harm: after an unmount, which a full disk must not hold up."""
        try:
            self.write(volume_id, record)
        except DriverError as error:
            self._log.warning("record not updated", volume_id=volume_id, error=str(error))

    def try_remove(self, volume_id: str) -> None:
        """Remove the record of what is not attached any more; likewise."""
        try:
            self._records.remove(volume_id)
        except DriverError as error:
            self._log.warning("record not removed", volume_id=volume_id, error=str(error))

    def volume_ids(self) -> list[str]:
        """The volumes that have a record, readable or not."""
        return [name for name in self._records.names() if VOLUME_ID.fullmatch(name)]


class Formatted:
    """The publications whose device this node has formatted, or found in use, so that it never formats it again.

    It has to outlive the stage: the same publication may be staged again after an unstage. One bounded record for all,
    since the node is never told that a publication has ended. Once a filesystem was there for some seconds the SNODE
    knows as well, so an entry that falls out at the far end is not missed.
    """

    _RECORD = "formatted"
    _MOST = 1000

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self._lock = threading.Lock()
        self._log = get_logger("stage records")

    def __contains__(self, generation: str) -> bool:
        """Raises DataLoss when the record is damaged: then nothing may be formatted."""
        return generation in self._generations()

    def add(self, generation: str) -> None:
        """Remember, durably. A damaged record is left as it is: it forbids more than one more entry would."""
        with self._lock:
            try:
                known = self._generations()
            except DataLoss as error:
                self._log.warning("nothing can be formatted", error=str(error))
                return
            if generation not in known:
                self._records.write(self._RECORD, {"generations": [*known, generation][-self._MOST :]})

    def _generations(self) -> list[str]:
        record = self._records.read(self._RECORD) or {"generations": []}
        try:
            return [str(generation) for generation in record["generations"]]
        except (KeyError, TypeError) as error:
            raise DataLoss(f"record {self._RECORD}: damaged ({error!r}); restore it, or move it away") from error


def _fields(record: StageRecord) -> dict[str, Any]:
    return {
        "complete": record.complete,
        "staged": {str(path): _asked_fields(asked) for path, asked in record.staged.items()},
        "targets": {str(path): _asked_fields(asked) for path, asked in record.targets.items()},
    }


def _asked_fields(asked: Asked) -> dict[str, Any]:
    capability = {**asdict(asked.capability), "access_mode": asked.capability.access_mode.value}
    return {**capability, "readonly": asked.readonly}


def _from_fields(fields: Mapping[str, Any]) -> StageRecord:
    return StageRecord(
        staged={Path(path): _asked(asked) for path, asked in fields["staged"].items()},
        targets={Path(path): _asked(asked) for path, asked in fields["targets"].items()},
        complete=bool(fields["complete"]),
    )


def _asked(fields: Mapping[str, Any]) -> Asked:
    capability = Capability(
        access_mode=AccessMode(fields["access_mode"]),
        block=bool(fields["block"]),
        fs_type=str(fields["fs_type"]),
        mount_flags=tuple(str(flag) for flag in fields["mount_flags"]),
    )
    return Asked(capability, readonly=bool(fields["readonly"]))
