"""The pools of a SNODE: each a backend, and how its volumes reach the nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csi.backends.base import Backend
from csi.deadline import Deadline
from csi.errors import CommandFailed, DriverError, InUse, Invalid, NotFound, Timeout, Unavailable
from csi.exports.base import Export
from csi.model import Publication, Volume


@dataclass(frozen=True)
class Pool:
    """A backend, and how its volumes reach the nodes."""

    backend: Backend
    export: Export
    local_to: str = ""  # name of the only node that can reach it; "" = every node can


class Pools:
    """All pools by name."""

    def __init__(self, by_name: Mapping[str, Pool], *, default: str) -> None:
        self.by_name = by_name
        self._default = default

    def exports(self) -> Sequence[Export]:
        """Every export once; pools share them."""
        return list({id(pool.export): pool.export for pool in self.by_name.values()}.values())

    def of_parameters(self, parameters: Mapping[str, str]) -> tuple[str, Pool]:
        """The pool that StorageClass parameters name, or the default one. Raises Invalid."""
        name = parameters.get("pool", self._default)
        if name not in self.by_name:
            raise Invalid(f"parameters.pool: no pool {name!r} here; there is: {', '.join(sorted(self.by_name))}")
        return name, self.by_name[name]

    def find_volume(self, volume_id: str, deadline: Deadline) -> Volume | None:
        """The volume, or None when no pool has it. A pool that can't be read does not hide the volumes of the others.

        Raises what the pool said that can't be read, if no other one has the volume: it may be there.
        """
        unread: DriverError | None = None
        for pool in self.by_name.values():
            try:
                volume = pool.backend.find(volume_id, deadline)
            except (Timeout, Unavailable, CommandFailed) as error:
                unread = unread or error
                continue
            if volume is not None:
                return volume
        if unread is not None:
            raise unread
        return None

    def get_volume(self, volume_id: str, deadline: Deadline) -> Volume:
        """The volume; raises NotFound."""
        volume = self.find_volume(volume_id, deadline)
        if volume is None:
            raise NotFound(f"volume {volume_id}: does not exist in any pool ({', '.join(sorted(self.by_name))})")
        return volume

    def get_of(self, publication: Publication) -> Pool:
        """The pool that a publication is from; raises InUse when the settings no longer have it."""
        pool = self.find_of(publication)
        if pool is None:
            raise InUse(
                f"pool {publication.pool}: volume {publication.volume_id} is published from it over "
                f"{publication.protocol}, which is not in the settings any more; put it back, then unpublish"
            )
        return pool

    def find_of(self, publication: Publication) -> Pool | None:
        """The pool of a publication, or None when the settings no longer have it, or export it in another way."""
        pool = self.by_name.get(publication.pool)
        return pool if pool is not None and pool.export.protocol == publication.protocol else None
