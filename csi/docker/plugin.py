"""What Docker asks of a volume plugin, as CSI calls: the plugin is an orchestrator of one machine.

Docker names each use of a volume (a mount id) and calls Mount and Unmount with it. The ids in use stand in a record for
each volume, so that the count is right after a restart of this process. Docker itself forgets: when it is killed, it
never says Unmount for the containers that died with it, and a reboot ends all uses at once. So an id counts only while
this boot lasts, and when Docker comes back, ids of volumes that no container shows any more are dropped.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi.client import Client, VolumeLine, VolumeUse
from csi.docker.options import Options
from csi.errors import DriverError, InUse, Invalid, NotFound
from csi.log import get_logger
from csi.model import NodeId, volume_id_of
from csi.records import RecordStore

#: Docker's own rule for names, with CSI's length.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class Use:
    """A volume in use on this machine."""

    name: str
    boot: str  # the boot that the ids are of
    fs_type: str = ""
    ids: tuple[str, ...] = ()  # of the uses, in Docker's words; none = it is being detached

    def fields(self) -> dict[str, Any]:
        """For its record."""
        return {"name": self.name, "boot": self.boot, "fs_type": self.fs_type, "ids": list(self.ids)}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Use":
        """From its record."""
        return cls(str(fields["name"]), str(fields["boot"]), str(fields["fs_type"]), tuple(map(str, fields["ids"])))


class Plugin:
    """The volumes of one machine, for its Docker. Methods may be called from several threads."""

    def __init__(
        self,
        *,
        controller: Client,
        node: Client,
        records: RecordStore,
        folder: Path,
        boot: str,
        is_shown: Callable[[Path], bool],
    ) -> None:
        """folder: where volumes are mounted. boot: the kernel's boot id.

        is_shown: whether a container shows what is mounted at a path.
        """
        self._controller = controller
        self._node = node
        self._records = records
        self._folder = folder
        self._boot = boot
        self._is_shown = is_shown
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._log = get_logger("docker")

    # -- volumes -------------------------------------------------------------------------------------------------

    def create(self, name: str, options: Options) -> None:
        """Make the volume, or find the one that is there."""
        if not _NAME.fullmatch(name):
            raise Invalid(f"volume {name[:200]!a}: a name has 1 to 128 letters, digits and _.-")
        use = VolumeUse(fs_type=options.fs_type)
        if not options.given and self._find(name):
            return
        self._controller.create(name, size_bytes=options.size_bytes, parameters=options.parameters, use=use)

    def remove(self, name: str) -> None:
        """Delete the volume and its data. Raises InUse while a container here or a node elsewhere has it."""
        volume_id = volume_id_of(name)
        with self._lock(volume_id):
            use = self._read(volume_id)
            if use is not None and use.ids and use.boot == self._boot:
                raise InUse(f"volume {name}: {len(use.ids)} container(s) of this machine use it; stop them first")
            if use is not None:
                self._detach(volume_id, use)
            self._controller.delete(volume_id)

    def get(self, name: str) -> VolumeLine:
        """The volume. Raises NotFound."""
        found = self._find(name)
        if found is None:
            raise NotFound(f"volume {name}: there is none; make it: docker volume create -d snode -o size=1G {name}")
        return found

    def volumes(self) -> list[VolumeLine]:
        """All volumes that the SNODE shows us."""
        return self._controller.volumes()

    # -- use -----------------------------------------------------------------------------------------------------

    def mount(self, name: str, mount_id: str) -> Path:
        """Attach the volume if it is not, and count the use; returns where it is mounted.

        Raises InUse, with its name, when another node has the volume.
        """
        line = self.get(name)
        volume_id = line.volume_id
        with self._lock(volume_id):
            use = self._read(volume_id)
            if use is None or use.boot != self._boot:
                use = Use(name, self._boot, line.fs_type)
            # The id is on record before anything is mounted: a crash in between leaves a use too many, never too few,
            # and Docker repeats its call with the same id or ends it.
            if mount_id not in use.ids:
                use = Use(name, self._boot, use.fs_type, (*use.ids, mount_id))
                self._records.write(volume_id, use.fields())
            try:
                self._attach(volume_id, use)
            except DriverError as error:
                self._forget(volume_id, use, mount_id)
                if isinstance(error, InUse) and (others := self._held_elsewhere(name)):
                    raise InUse(
                        f"volume {name} is in use on node {others}; stop its containers there. If that node is lost: "
                        f"snode volumes release {name} --node {others} ({error})"
                    ) from error
                raise
            return self.path_of(volume_id)

    def unmount(self, name: str, mount_id: str) -> None:
        """End a use; the last one detaches the volume. An id that is unknown is fine."""
        volume_id = volume_id_of(name)
        with self._lock(volume_id):
            use = self._read(volume_id)
            if use is not None:
                self._forget(volume_id, use, mount_id)

    def path(self, name: str) -> Path | None:
        """Where a volume is mounted; None when it is not."""
        volume_id = volume_id_of(name)
        use = self._read(volume_id)
        return self.path_of(volume_id) if use is not None and use.ids and use.boot == self._boot else None

    def path_of(self, volume_id: str) -> Path:
        """Where a volume is mounted when it is."""
        return self._folder / "mounts" / volume_id

    def docker_is_back(self) -> None:
        """Docker has started: drop the uses that ended without a word."""
        for volume_id in self._records.names():
            with self._lock(volume_id):
                use = self._read(volume_id)
                if use is None or (use.boot == self._boot and use.ids and self._is_shown(self.path_of(volume_id))):
                    continue
                self._log.info("no container uses the volume any more", volume=use.name, ids=len(use.ids))
                self._release(volume_id, Use(use.name, use.boot, use.fs_type))

    def tend(self) -> None:
        """Background work: detach what could not be detached at once."""
        for volume_id in self._records.names():
            use = self._read(volume_id)
            if use is None or use.ids:
                continue
            with self._lock(volume_id):
                use = self._read(volume_id)
                if use is not None and not use.ids:
                    self._release(volume_id, use)

    # -- building blocks -----------------------------------------------------------------------------------------

    def _attach(self, volume_id: str, use: Use) -> None:
        how = VolumeUse(fs_type=use.fs_type)
        context = self._controller.publish(volume_id, node_id=self._node.node_id(), use=how)
        self._node.stage(volume_id, path=self._staging(volume_id), context=context, use=how)
        self._node.show(volume_id, staging_path=self._staging(volume_id), path=self.path_of(volume_id), use=how)

    def _detach(self, volume_id: str, use: Use) -> None:
        self._node.hide(volume_id, path=self.path_of(volume_id))
        self._node.unstage(volume_id, path=self._staging(volume_id))
        self._controller.unpublish(volume_id, node_id=self._node.node_id())
        self._records.remove(volume_id)

    def _forget(self, volume_id: str, use: Use, mount_id: str) -> None:
        """Take an id off the record; the last one detaches."""
        rest = tuple(one for one in use.ids if one != mount_id)
        use = Use(use.name, use.boot, use.fs_type, rest)
        self._records.write(volume_id, use.fields())
        if not rest:
            self._release(volume_id, use)

    def _release(self, volume_id: str, use: Use) -> None:
        """Detach. What does not work now is done by `tend`: Docker's call is about its container, which has ended."""
        if use.ids or use != self._read(volume_id):
            self._records.write(volume_id, use.fields())
        try:
            self._detach(volume_id, use)
        except DriverError as error:
            self._log.warning("volume not detached yet, it is tried again", volume=use.name, error=str(error))

    def _read(self, volume_id: str) -> Use | None:
        fields = self._records.read(volume_id)
        return None if fields is None else Use.of(fields)

    def _held_elsewhere(self, name: str) -> str:
        """The other node that has the volume, "" if there is none."""
        own = NodeId.parse(self._node.node_id()).name
        return next((node for node in self.get(name).nodes if node != own), "")

    def _find(self, name: str) -> VolumeLine | None:
        return next((line for line in self._controller.volumes() if line.name == name), None)

    def _staging(self, volume_id: str) -> Path:
        return self._folder / "staging" / volume_id

    @contextmanager
    def _lock(self, volume_id: str) -> Iterator[None]:
        """Docker may call for one volume from several containers at once; they wait for each other."""
        with self._guard:
            lock = self._locks.setdefault(volume_id, threading.Lock())
        with lock:
            yield
