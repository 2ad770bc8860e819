"""The publications of a SNODE: records on disk, kept in memory too, since one controller owns them."""

import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from csi.errors import DataLoss, DriverError, NoSpace, Unavailable
from csi.log import get_logger
from csi.model import TARGET_PREFIX, AccessMode, Capability, Chap, Publication
from csi.records import RecordStore


class Publications:
    """All publications by volume. A record is on disk before its target exists, and goes after its target is gone."""

    def __init__(self, records: RecordStore) -> None:
        """Reads every record. A damaged one is kept aside (`damaged`): its volume is refused, the others serve."""
        self._records = records
        self._guard = threading.Lock()
        self._known: dict[str, dict[str, Publication]] = {}
        self.damaged: dict[str, str] = {}
        for name in records.names():
            try:
                fields = records.read(name)
                if fields is not None:
                    self._keep(_from_fields(fields))
            except (DriverError, KeyError, TypeError, ValueError) as error:
                self.damaged[name] = str(error)
                get_logger("publications").error("damaged publication record", record=name, error=str(error))

    def all(self) -> list[Publication]:
        """Every publication, in no order."""
        with self._guard:
            return [publication for by_nonce in self._known.values() for publication in by_nonce.values()]

    def of(self, volume_id: str) -> list[Publication]:
        """The publications of one volume. Raises DataLoss when a record of it can't be read."""
        for name in self.damaged_of(volume_id):
            raise DataLoss(
                f"volume {volume_id}: its publication record is damaged: {self.damaged[name]}. Unpublish the volume, "
                "which fences whatever node it was published to"
            )
        return self.readable_of(volume_id)

    def readable_of(self, volume_id: str) -> list[Publication]:
        """The publications of one volume as far as their records can be read."""
        with self._guard:
            return list(self._known.get(volume_id, {}).values())

    def damaged_of(self, volume_id: str) -> list[str]:
        """The names of the records of one volume that can't be read."""
        return [name for name in self.damaged if name.startswith(f"{volume_id}.")]

    def damaged_targets(self) -> set[str]:
        """The targets that the damaged records spoke of: a record's name has the volume and the nonce."""
        return {f"{TARGET_PREFIX}:{name.replace('.', ':', 1)}" for name in self.damaged}

    def write(self, publication: Publication) -> None:
        """Put a publication on disk, new or changed. After an error the memory holds what the disk holds."""
        fields: dict[str, Any] = asdict(publication)
        fields["device"] = str(publication.device)
        fields["capability"]["access_mode"] = publication.capability.access_mode.value
        try:
            self._records.write(_name(publication), fields)
        except DriverError:
            # The rename may have come about although the sync of its folder failed.
            self._read_back(_name(publication))
            raise
        with self._guard:
            self._keep(publication)

    def revoke(self, publication: Publication) -> Publication:
        """Mark a publication as being fenced; nothing restores its target any more.

        A disk that takes no record must not keep a node attached: the mark then is in memory only. Should this process
        end before the fence does, the caller has had no answer and repeats.
        """
        revoked = replace(publication, revoked=True)
        try:
            self.write(revoked)
        except (NoSpace, Unavailable) as error:
            get_logger("publications").warning("revoked in memory only", record=_name(publication), error=str(error))
            with self._guard:
                self._keep(revoked)
        return revoked

    def forget_damaged(self, name: str) -> None:
        """Set a damaged record aside, once what it spoke of is fenced."""
        self._records.set_aside(name)
        self.damaged.pop(name, None)

    def _read_back(self, name: str) -> None:
        with suppress(DriverError, KeyError, TypeError, ValueError):
            fields = self._records.read(name)
            if fields is not None:
                with self._guard:
                    self._keep(_from_fields(fields))

    def remove(self, publication: Publication) -> None:
        """Forget a publication whose export is gone."""
        self._records.remove(_name(publication))
        with self._guard:
            by_nonce = self._known.get(publication.volume_id, {})
            by_nonce.pop(publication.nonce, None)
            if not by_nonce:
                self._known.pop(publication.volume_id, None)

    def _keep(self, publication: Publication) -> None:
        self._known.setdefault(publication.volume_id, {})[publication.nonce] = publication


def _name(publication: Publication) -> str:
    return f"{publication.volume_id}.{publication.nonce}"


def _from_fields(fields: dict[str, Any]) -> Publication:
    capability = fields["capability"]
    return Publication(
        volume_id=fields["volume_id"],
        pool=fields["pool"],
        node_id=fields["node_id"],
        protocol=fields["protocol"],
        nonce=fields["nonce"],
        tid=fields["tid"],
        device=Path(fields["device"]),
        size_bytes=fields["size_bytes"],
        readonly=fields["readonly"],
        capability=Capability(
            access_mode=AccessMode(capability["access_mode"]),
            block=capability["block"],
            fs_type=capability["fs_type"],
            mount_flags=tuple(capability["mount_flags"]),
        ),
        chap=Chap(**fields["chap"]),
        revoked=fields["revoked"],
    )
