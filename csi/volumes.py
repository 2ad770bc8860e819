"""The use cases of a SNODE: create, delete, publish, unpublish, list, grow. No proto, no tool, no process here.

Idempotency lives here, once: every use case reads what is there, does what is missing, and may be repeated after a
crash at any instruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csi import policy, takeover
from csi.deadline import Deadline
from csi.errors import Conflict, InUse, Invalid, NoSpace, OutOfRange, Stale
from csi.locks import VolumeLocks
from csi.log import get_logger
from csi.model import TOPOLOGY_NODE, VOLUME_ID, Capability, Capacity, Volume, volume_id_of
from csi.pools import Pool, Pools
from csi.publications import Publications
from csi.publishing import Publishing

__all__ = ["Entry", "Page", "Pool", "Volumes"]


@dataclass(frozen=True)
class Entry:
    """A volume and the nodes that it is published to."""

    volume: Volume
    node_ids: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """A page of ListVolumes; next_token is "" on the last one."""

    entries: tuple[Entry, ...]
    next_token: str


class Volumes:
    """The volumes of one SNODE."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        *,
        default_pool: str,
        publications: Publications,
        locks: VolumeLocks,
        max_per_node: int = 0,
    ) -> None:
        """max_per_node: how many volumes one node may hold at once, 0 = no limit."""
        self._pools = Pools(pools, default=default_pool)
        self._publications = publications
        self._locks = locks
        self._publishing = Publishing(self._pools, publications=publications, locks=locks, max_per_node=max_per_node)
        self._told: list[str] = []
        self._log = get_logger("volumes")

    # -- create, delete ------------------------------------------------------------------------------------------

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
        """CreateVolume. limit_bytes 0 = none; requisite = topologies that the volume must be reachable from, [] = any.

        Raises Conflict when the name has a volume of other size, pool or parameters; NoSpace, OutOfRange, Invalid.
        """
        pool_name, pool = self._pools.of_parameters(parameters)
        reason = policy.unsupported(capabilities)
        if reason:
            raise Invalid(f"volume_capabilities: {reason}")
        if takeover.after_seconds(parameters) and pool.local_to:
            raise Invalid(
                f"parameters.{takeover.PARAMETER}: volumes of pool {pool_name} are on node {pool.local_to} alone, so "
                "no other node can take one; leave it out"
            )
        size_bytes = policy.size(pool.backend, required_bytes, limit_bytes)
        volume_id = volume_id_of(name)
        with self._locks.hold(volume_id):
            existing = self._pools.find_volume(volume_id, deadline)
            if existing is not None:
                policy.check_same(existing, pool_name, parameters, required_bytes, limit_bytes)
                if not self._reachable(pool, requisite):
                    raise Conflict(f"volume {name!r} exists, but {self._out_of_reach(pool_name, pool)}")
                return existing
            if not self._reachable(pool, requisite):
                raise NoSpace(f"accessibility_requirements: {self._out_of_reach(pool_name, pool)}")
            deadline.check(f"create volume {name!r}")
            return pool.backend.create(
                volume_id, name=name, size_bytes=size_bytes, parameters=dict(parameters), deadline=deadline
            )

    def delete(self, volume_id: str, deadline: Deadline) -> None:
        """DeleteVolume; an absent volume is fine. Raises InUse while it is published."""
        with self._locks.hold(volume_id):
            published = self._publications.of(volume_id)
            if published:
                names = ", ".join(sorted(p.node.name for p in published))
                raise InUse(f"volume {volume_id}: still published to {names}; unpublish it first")
            volume = self._pools.find_volume(volume_id, deadline)
            if volume is not None:
                self._pools.by_name[volume.pool].backend.delete(volume, deadline)

    # -- publish, unpublish: see csi.publishing ------------------------------------------------------------------

    def publish(
        self, volume_id: str, *, node_id: str, capability: Capability, readonly: bool, deadline: Deadline
    ) -> dict[str, str]:
        """ControllerPublishVolume; returns the publish_context. See Publishing.publish."""
        return self._publishing.publish(
            volume_id, node_id=node_id, capability=capability, readonly=readonly, deadline=deadline
        )

    def unpublish(self, volume_id: str, *, node_id: str, deadline: Deadline) -> None:
        """ControllerUnpublishVolume: fence the node ("" = every node). See Publishing.unpublish."""
        self._publishing.unpublish(volume_id, node_id=node_id, deadline=deadline)

    # -- look ----------------------------------------------------------------------------------------------------

    def validate(
        self,
        volume_id: str,
        *,
        capabilities: Sequence[Capability],
        parameters: Mapping[str, str],
        deadline: Deadline,
    ) -> str:
        """ValidateVolumeCapabilities: "" when confirmed, else the reason. Raises NotFound."""
        volume = self._pools.get_volume(volume_id, deadline)
        if "pool" in parameters and parameters["pool"] != volume.pool:
            return f"the volume is in pool {volume.pool}, not {parameters['pool']}"
        return policy.unsupported(capabilities)

    def list_volumes(self, *, starting_token: str, max_entries: int, deadline: Deadline) -> Page:
        """ListVolumes in the order of ids. A token is the last id of the page before, so that pages stay right while
        volumes come and go. Raises Stale for a token that no page of ours ended with.
        """
        if starting_token and not VOLUME_ID.fullmatch(starting_token):
            raise Stale(f"starting_token {starting_token[:60]!r}: not a token of this driver; list from the start")
        volumes = sorted(
            (
                v
                for pool in self._pools.by_name.values()
                for v in pool.backend.list_volumes(deadline)
                if v.volume_id > starting_token
            ),
            key=lambda v: v.volume_id,
        )
        page = volumes[: max_entries or None]
        next_token = page[-1].volume_id if len(page) < len(volumes) else ""
        return Page(tuple(self._entry(volume) for volume in page), next_token)

    def get(self, volume_id: str, deadline: Deadline) -> Entry:
        """ControllerGetVolume. Raises NotFound."""
        return self._entry(self._pools.get_volume(volume_id, deadline))

    def capacity(
        self,
        *,
        parameters: Mapping[str, str],
        topology: Mapping[str, str],
        capabilities: Sequence[Capability],
        deadline: Deadline,
    ) -> Capacity:
        """GetCapacity of the pool that the parameters name; nothing where it can't be reached or used in that way."""
        _, pool = self._pools.of_parameters(parameters)
        if policy.unsupported(capabilities) or not policy.reaches(pool.local_to, topology):
            return Capacity(0, 0, 0)
        return pool.backend.capacity(deadline)

    def topology_of(self, volume: Volume) -> dict[str, str]:
        """The segment that a volume is tied to; {} when every node reaches it."""
        local_to = self._pools.by_name[volume.pool].local_to
        return {TOPOLOGY_NODE: local_to} if local_to else {}

    # -- grow ----------------------------------------------------------------------------------------------------

    def expand(self, volume_id: str, *, required_bytes: int, limit_bytes: int, deadline: Deadline) -> int:
        """ControllerExpandVolume; returns the size in bytes. Smaller or equal is fine and changes nothing."""
        with self._locks.hold(volume_id):
            volume = self._pools.get_volume(volume_id, deadline)
            pool = self._pools.by_name[volume.pool]
            size_bytes = volume.size_bytes
            if required_bytes > volume.size_bytes:
                size_bytes = policy.size(pool.backend, required_bytes, limit_bytes)
            elif limit_bytes and limit_bytes < volume.size_bytes:
                raise OutOfRange(
                    f"capacity_range.limit_bytes: {limit_bytes} is less than the volume's {volume.size_bytes} "
                    "bytes; volumes never shrink"
                )
            # Of the present size too: a growth that was killed may have left a device that is not as large.
            volume = pool.backend.grow(volume, size_bytes=size_bytes, deadline=deadline)
            for publication in self._publications.of(volume_id):
                if not publication.revoked:
                    self._publishing.follow_size(pool, publication, volume, deadline)
            return volume.size_bytes

    # -- background, health --------------------------------------------------------------------------------------

    def problems(self, deadline: Deadline) -> list[str]:
        """What makes this SNODE unable to serve, a sentence each; [] = ready.

        A pool or a record that is broken beside others that work is told in the log only: the others must go on.
        """
        broken = [pool.backend.problems(deadline) for pool in self._pools.by_name.values()]
        found = [problem for export in self._pools.exports() for problem in export.problems(deadline)]
        pool_problems = [problem for problems in broken for problem in problems]
        if all(broken):
            found += pool_problems
        self._tell(pool_problems + self._publishing.record_problems())
        return found

    def _tell(self, problems: list[str]) -> None:
        """Log what is broken, once for each change."""
        if problems != self._told:
            for problem in problems:
                self._log.warning("problem", problem=problem)
            self._told = problems

    @property
    def pool_names(self) -> Sequence[str]:
        """The names of all pools."""
        return list(self._pools.by_name)

    def reconcile(self, deadline: Deadline) -> None:
        """Background work, again and again: make the exports hold what the records say. See Publishing.reconcile."""
        self._publishing.reconcile(deadline)

    def export_restarted(self) -> bool:
        """Whether `reconcile` should come at once: a server of exports was started anew. Costs next to nothing."""
        return any(export.restarted() for export in self._pools.exports())

    def tend_pool(self, name: str, deadline: Deadline) -> None:
        """Background work on one pool, again and again: activate devices, see data that nodes wrote, resume wipes."""
        backend = self._pools.by_name[name].backend
        for publication in self._publications.all():
            if publication.pool == name and self._pools.find_of(publication) is not None:
                self._publishing.see_device(publication, backend, deadline)
        backend.tend(deadline)

    def tend(self, deadline: Deadline) -> None:
        """All background work once, one after the other; the service has a thread for each part of it."""
        for name in self.pool_names:
            self.tend_pool(name, deadline)
        self.reconcile(deadline)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _entry(self, volume: Volume) -> Entry:
        published = self._publications.readable_of(volume.volume_id)
        return Entry(volume, tuple(sorted(publication.node_id for publication in published)))

    def _reachable(self, pool: Pool, requisite: Sequence[Mapping[str, str]]) -> bool:
        return not requisite or any(policy.reaches(pool.local_to, topology) for topology in requisite)

    def _out_of_reach(self, name: str, pool: Pool) -> str:
        return f"pool {name} is local to node {pool.local_to}, which is not among the requisite topologies"
