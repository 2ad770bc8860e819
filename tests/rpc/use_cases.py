"""Use cases in memory, with the interface of csi.volumes.Volumes and csi.staging.Staging."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import InUse, NotFound, Stale
from csi.fs.usage import Usage
from csi.model import VOLUME_ID, Capability, Capacity, Complaint, Volume, volume_id_of
from csi.staging import NodeInfo
from csi.volumes import Entry, Page

NODE_ID = "1;node-a;;"


class MemoryVolumes:
    """Volumes without disks. `gate`, when set, holds every create until it is opened; `raises` is raised by create."""

    def __init__(self) -> None:
        self.volumes: dict[str, Volume] = {}
        self.published: dict[str, dict[str, tuple[Capability, bool]]] = {}
        self.gate: threading.Event | None = None
        self.entered = threading.Semaphore(0)
        self.raises: Exception | None = None
        self.deadlines: list[float] = []
        self.local_to = ""

    def create(
        self,
        *,
        name: str,
        required_bytes: int,
        limit_bytes: int,
        capabilities: Sequence[Capability],
        parameters: Mapping[str, str],
        requisite: Sequence[Mapping[str, str]],
        deadline: Deadline,
    ) -> Volume:
        self.deadlines.append(deadline.remaining())
        if self.gate is not None:
            self.entered.release()
            self.gate.wait(30)
            deadline.check("create")
        if self.raises is not None:
            raise self.raises
        volume = Volume(
            volume_id=volume_id_of(name),
            name=name,
            pool=parameters.get("pool", "fast"),
            size_bytes=required_bytes or limit_bytes or 1 << 30,
            device=Path("/dev/null"),
            parameters=dict(parameters),
        )
        return self.volumes.setdefault(volume.volume_id, volume)

    def delete(self, volume_id: str, deadline: Deadline) -> None:
        if self.published.get(volume_id):
            raise InUse(f"volume {volume_id}: published")
        self.volumes.pop(volume_id, None)

    def publish(
        self, volume_id: str, *, node_id: str, capability: Capability, readonly: bool, deadline: Deadline
    ) -> dict[str, str]:
        self.get(volume_id, deadline)
        self.published.setdefault(volume_id, {})[node_id] = (capability, readonly)
        return {"format": "1", "sealed": "a-sealed-secret"}

    def unpublish(self, volume_id: str, *, node_id: str, deadline: Deadline) -> None:
        nodes = self.published.get(volume_id, {})
        for node in [node_id] if node_id else list(nodes):
            nodes.pop(node, None)

    def validate(
        self,
        volume_id: str,
        *,
        capabilities: Sequence[Capability],
        parameters: Mapping[str, str],
        deadline: Deadline,
    ) -> str:
        volume = self.get(volume_id, deadline).volume
        return "" if parameters.get("pool", volume.pool) == volume.pool else "another pool"

    def list_volumes(self, *, starting_token: str, max_entries: int, deadline: Deadline) -> Page:
        if starting_token and not VOLUME_ID.fullmatch(starting_token):
            raise Stale("starting_token: unknown")
        ids = sorted(volume_id for volume_id in self.volumes if volume_id > starting_token)
        page = ids[: max_entries or None]
        token = page[-1] if len(page) < len(ids) else ""
        return Page(tuple(self.get(volume_id, deadline) for volume_id in page), token)

    def get(self, volume_id: str, deadline: Deadline) -> Entry:
        if volume_id not in self.volumes:
            raise NotFound(f"volume {volume_id}: does not exist")
        return Entry(self.volumes[volume_id], tuple(self.published.get(volume_id, {})))

    def capacity(
        self,
        *,
        parameters: Mapping[str, str],
        topology: Mapping[str, str],
        capabilities: Sequence[Capability],
        deadline: Deadline,
    ) -> Capacity:
        return Capacity(available_bytes=100, maximum_volume_bytes=50, minimum_volume_bytes=1)

    def expand(self, volume_id: str, *, required_bytes: int, limit_bytes: int, deadline: Deadline) -> int:
        volume = self.get(volume_id, deadline).volume
        self.volumes[volume_id] = replace(volume, size_bytes=max(volume.size_bytes, required_bytes))
        return self.volumes[volume_id].size_bytes

    def topology_of(self, volume: Volume) -> dict[str, str]:
        return {"topology.csi.snode.io/node": self.local_to} if self.local_to else {}


class MemoryStaging:
    """A node without devices: what is staged and published, by path."""

    def __init__(self) -> None:
        self.staged: dict[Path, str] = {}
        self.targets: dict[Path, tuple[str, bool]] = {}
        self.contexts: list[dict[str, str]] = []
        self.blocks: list[bool | None] = []
        self.trouble: list[Complaint] = []

    def stage(
        self,
        volume_id: str,
        *,
        staging_path: Path,
        capability: Capability,
        publish_context: Mapping[str, str],
        deadline: Deadline,
    ) -> None:
        self.contexts.append(dict(publish_context))
        self.staged[staging_path] = volume_id

    def unstage(self, volume_id: str, *, staging_path: Path, deadline: Deadline) -> None:
        self.staged.pop(staging_path, None)

    def publish(
        self,
        volume_id: str,
        *,
        staging_path: Path,
        target_path: Path,
        capability: Capability,
        readonly: bool,
        publish_context: Mapping[str, str],
        deadline: Deadline,
    ) -> None:
        if self.staged.get(staging_path) != volume_id:
            raise InUse("not staged")
        self.targets[target_path] = (volume_id, readonly)

    def unpublish(self, volume_id: str, *, target_path: Path, deadline: Deadline) -> None:
        self.targets.pop(target_path, None)

    def stats(self, volume_id: str, *, volume_path: Path, deadline: Deadline) -> list[Usage]:
        if volume_path not in self.targets:
            raise NotFound("not there")
        return [Usage("bytes", 1, 3, 2), Usage("inodes", 10, 30, 20)]

    def expand(
        self, volume_id: str, *, volume_path: Path, block: bool | None, required_bytes: int, deadline: Deadline
    ) -> int:
        self.blocks.append(block)
        return required_bytes

    def complaints(self, volume_id: str) -> list[Complaint]:
        if volume_id not in self.staged.values():
            raise NotFound("not there")
        return self.trouble

    def info(self, deadline: Deadline) -> NodeInfo:
        return NodeInfo(node_id=NODE_ID, max_volumes=7, topology={"topology.csi.snode.io/node": "node-a"})
