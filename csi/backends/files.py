"""Volumes as sparse files in one directory: the embedded default, no process at all.

A volume is `<id>.img` and beside it `<id>.json`. The sidecar is written first, the image appears by a rename as the
last step of a creation: whatever a crash leaves behind, an image without a sidecar is never our doing, so nothing
deletes data for the lack of a sidecar.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from csi.backends.images import ImageDirectory
from csi.deadline import Deadline
from csi.errors import Busy, DataLoss, DriverError, NoSpace, NotFound, Unavailable
from csi.figures import figure
from csi.locks import ResourceLock
from csi.log import get_logger
from csi.model import MIB, VOLUME_ID, Capacity, Volume
from csi.run import Boundary, no_boundary
from csi.signature import holds_data

_UNIT_BYTES = MIB


class FilesBackend:
    """A pool that is a directory. Sizes are multiples of 1 MiB."""

    def __init__(
        self,
        pool: str,
        *,
        directory: Path,
        state: Path,
        overcommit_ratio: float = 1.0,
        boundary: Boundary = no_boundary,
        loops: Path = Path("/sys/block"),
    ) -> None:
        """directory: made with mode 0700 if missing. state: the pool's own folder in the state directory.

        overcommit_ratio: how many bytes may be promised for each byte that is there; 1.0 = every volume can be filled.
        Raises Unavailable when the directory can't be made.
        """
        self._pool = pool
        self._images = ImageDirectory(pool, directory, state=state, boundary=boundary)
        self._overcommit_ratio = overcommit_ratio
        self._loops = loops
        self._lock = ResourceLock(f"pool {pool}")
        self._log = get_logger("files")
        self._swept = False

    @property
    def pool(self) -> str:
        """See Backend.pool."""
        return self._pool

    def round_size(self, size_bytes: int) -> int:
        """See Backend.round_size."""
        return max(1, -(-size_bytes // _UNIT_BYTES)) * _UNIT_BYTES

    def create(
        self, volume_id: str, *, name: str, size_bytes: int, parameters: Mapping[str, str], deadline: Deadline
    ) -> Volume:
        """See Backend.create."""
        if not VOLUME_ID.fullmatch(volume_id):
            raise ValueError(f"not a volume id: {volume_id!r}")
        with self._lock.hold(deadline), self._images.opened() as directory:
            existing = self._read(directory, volume_id)
            if existing is not None:
                if existing.size_bytes == size_bytes and dict(existing.parameters) == dict(parameters):
                    return existing
                raise Busy(f"volume {volume_id}: it appeared in this moment, of another kind; repeat the request")
            self._check_space(directory, size_bytes)
            self._images.sidecars.write(volume_id, {"name": name, "parameters": dict(parameters), "blank": True})
            self._images.make(directory, volume_id, size_bytes=size_bytes)
            volume = self._read(directory, volume_id)
        if volume is None or volume.size_bytes != size_bytes:
            raise Unavailable(f"volume {volume_id}: not there as made in {self._images.path}; repeat the request")
        return volume

    def delete(self, volume: Volume, deadline: Deadline) -> None:
        """See Backend.delete. Raises InUse while a loop device of this host has the file."""
        with self._lock.hold(deadline), self._images.opened() as directory:
            self._images.check_detached(directory, volume.volume_id, loops=self._loops)
            self._images.remove(directory, volume.volume_id)

    def grow(self, volume: Volume, *, size_bytes: int, deadline: Deadline) -> Volume:
        """See Backend.grow."""
        with self._lock.hold(deadline), self._images.opened() as directory:
            current = self._get(directory, volume.volume_id)
            if current.size_bytes < size_bytes:
                self._check_space(directory, size_bytes - current.size_bytes)
                self._images.extend(directory, volume.volume_id, size_bytes=size_bytes)
            return self._get(directory, volume.volume_id)

    def find(self, volume_id: str, deadline: Deadline) -> Volume | None:
        """See Backend.find; always read afresh."""
        del deadline
        if not VOLUME_ID.fullmatch(volume_id):
            return None
        with self._images.opened() as directory:
            return self._read(directory, volume_id)

    def list_volumes(self, deadline: Deadline) -> list[Volume]:
        """See Backend.list_volumes."""
        del deadline
        found = []
        with self._images.opened() as directory:
            for volume_id in sorted(self._images.images()):
                try:
                    volume = self._read(directory, volume_id)
                except DriverError as error:
                    self._log.warning("volume left out", volume_id=volume_id, error=str(error))
                    continue
                if volume is not None:
                    found.append(volume)
        return found

    def open_for_export(self, volume: Volume, deadline: Deadline) -> Volume:
        """See Backend.open_for_export."""
        del deadline
        with self._images.opened() as directory:
            current = self._get(directory, volume.volume_id)
        return replace(current, blank=current.blank and not holds_data(current.device))

    def mark_used(self, volume: Volume) -> None:
        """See Backend.mark_used."""
        with self._images.opened():
            fields = self._images.sidecars.read(volume.volume_id)
            if fields is not None and fields.get("blank"):
                self._images.sidecars.write(volume.volume_id, {**fields, "blank": False})

    def capacity(self, deadline: Deadline) -> Capacity:
        """See Backend.capacity."""
        del deadline
        with self._images.opened() as directory:
            available = self._images.available(directory, ratio=self._overcommit_ratio) // _UNIT_BYTES * _UNIT_BYTES
        return Capacity(available, available, _UNIT_BYTES)

    def problems(self, deadline: Deadline) -> list[str]:
        """See Backend.problems."""
        del deadline
        path = self._images.path
        try:
            with self._images.opened() as directory:
                mode = os.fstat(directory).st_mode
                read_only = os.fstatvfs(directory).f_flag & os.ST_RDONLY
        except DriverError as error:
            return [str(error)]
        found = []
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            found.append(f"pool {self._pool}: {path} may be written by others than its owner -> chmod 0700 it")
        if read_only:
            found.append(f"pool {self._pool}: {path} is on a read-only filesystem -> remount it read-write")
        return found

    def tend(self, deadline: Deadline) -> None:
        """See Backend.tend: once after a start, remove what a crash left of creations and deletions."""
        if self._swept:
            return
        with self._lock.hold(deadline), self._images.opened() as directory:
            for volume_id in self._images.sweep(directory):
                self._log.warning("volume has a record but no image", volume_id=volume_id, pool=self._pool)
        self._swept = True

    # -- parts ---------------------------------------------------------------------------------------------------

    def _read(self, directory: int, volume_id: str) -> Volume | None:
        """The volume, or None when there is no image."""
        fact = self._images.stat(directory, volume_id)
        if fact is None:
            return None
        fields = self._images.sidecars.read(volume_id)
        if fields is None:
            if self._images.stat(directory, volume_id) is None:
                return None  # deleted in this moment
            raise DataLoss(
                f"volume {volume_id}: image without {volume_id}.json in {self._images.path}; restore that file from a "
                "backup, or move the image away"
            )
        return Volume(
            volume_id=volume_id,
            name=str(fields.get("name", "")),
            pool=self._pool,
            size_bytes=fact.st_size,
            device=self._images.image(volume_id),
            blank=bool(fields.get("blank", False)),
            parameters={str(key): str(value) for key, value in dict(fields.get("parameters", {})).items()},
        )

    def _get(self, directory: int, volume_id: str) -> Volume:
        volume = self._read(directory, volume_id)
        if volume is None:
            raise NotFound(f"volume {volume_id}: does not exist in {self._images.path}")
        return volume

    def _check_space(self, directory: int, size_bytes: int) -> None:
        available = self._images.available(directory, ratio=self._overcommit_ratio)
        if size_bytes > available:
            raise NoSpace(
                f"pool {self._pool}: {figure(size_bytes)} asked, {figure(available)} can still be promised in "
                f"{self._images.path}; delete volumes or enlarge its filesystem"
            )
