"""The publications of a SNODE: records on disk, kept in memory too, since one controller owns them."""

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from csi.errors import DataLoss, DriverError
from csi.log import get_logger
from csi.model import AccessMode, Capability, Chap, Publication
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
        for name, why in self.damaged.items():
            if name.startswith(f"{volume_id}."):
                raise DataLoss(f"volume {volume_id}: its publication record is damaged: {why}")
        with self._guard:
            return list(self._known.get(volume_id, {}).values())

    def write(self, publication: Publication) -> None:
        """Put a publication on disk, new or changed."""
        fields: dict[str, Any] = asdict(publication)
        fields["device"] = str(publication.device)
        fields["capability"]["access_mode"] = publication.capability.access_mode.value
        self._records.write(_name(publication), fields)
        with self._guard:
            self._keep(publication)

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
