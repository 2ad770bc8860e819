"""The use cases of a SNODE: create, delete, publish, unpublish, list, grow. No proto, no tool, no process here.

Idempotency lives here, once: every use case reads what is there, does what is missing, and may be repeated after a
crash at any instruction.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from csi import policy, publish_context
from csi.backends.base import Backend
from csi.deadline import Deadline
from csi.errors import Busy, DriverError, InUse, Invalid, NoSpace, NotFound, OutOfRange, Stale
from csi.exports.base import Export
from csi.locks import VolumeLocks
from csi.log import get_logger
from csi.model import (
    DEFAULT_SIZE_BYTES,
    TOPOLOGY_NODE,
    VOLUME_ID,
    Capability,
    Capacity,
    Chap,
    NodeId,
    Publication,
    Volume,
    volume_id_of,
)
from csi.publications import Publications


@dataclass(frozen=True)
class Pool:
    """A backend, and how its volumes reach the nodes."""

    backend: Backend
    export: Export
    local_to: str = ""  # name of the only node that can reach it; "" = every node can


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
        self._pools = pools
        self._default_pool = default_pool
        self._publications = publications
        self._locks = locks
        self._max_per_node = max_per_node
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
        pool_name, pool = self._pool_of(parameters)
        reason = policy.unsupported(capabilities)
        if reason:
            raise Invalid(f"volume_capabilities: {reason}")
        size_bytes = policy.size(
            pool.backend, required_bytes or min(DEFAULT_SIZE_BYTES, limit_bytes or DEFAULT_SIZE_BYTES), limit_bytes
        )
        volume_id = volume_id_of(name)
        with self._locks.hold(volume_id):
            existing = self._find(volume_id, deadline)
            if existing is not None:
                policy.check_same(existing, pool_name, parameters, required_bytes, limit_bytes)
                return existing
            self._check_reachable(pool_name, pool, requisite)
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
            volume = self._find(volume_id, deadline)
            if volume is not None:
                self._pools[volume.pool].backend.delete(volume, deadline)

    # -- publish, unpublish --------------------------------------------------------------------------------------

    def publish(
        self, volume_id: str, *, node_id: str, capability: Capability, readonly: bool, deadline: Deadline
    ) -> dict[str, str]:
        """ControllerPublishVolume; returns the publish_context. Starts no process when the device is active.

        Raises NotFound for an unknown volume or node, Conflict when it is published to this node in another way,
        InUse when it is published to another node, or another machine has this node's initiator name.
        """
        try:
            node = NodeId.parse(node_id)
        except Invalid as error:
            raise NotFound(str(error)) from error
        reason = policy.unsupported([capability])
        if reason:
            raise Invalid(f"volume_capability: {reason}")
        with self._locks.hold(volume_id):
            volume = self._get(volume_id, deadline)
            pool = self._pools[volume.pool]
            self._check_node(volume, pool, node)
            self._finish_fences(volume_id, deadline)
            publication = self._admit(volume, node, capability, readonly=readonly or capability.access_mode.reader_only)
            volume = self._open(pool.backend, volume, deadline)
            if capability.block and not publication.readonly:
                # Whatever the node writes there has no signature that a later look could find.
                pool.backend.mark_used(volume)
                volume = replace(volume, blank=False)
            if publication not in self._publications.of(volume_id):
                self._publications.write(publication)
            paths = pool.export.ensure(publication, deadline)
            publication = self._follow_size(pool, publication, volume, deadline)
            may_format = volume.blank and not publication.readonly
            return publish_context.encode(
                publication, protocol=pool.export.protocol, paths=paths, may_format=may_format
            )

    def unpublish(self, volume_id: str, *, node_id: str, deadline: Deadline) -> None:
        """ControllerUnpublishVolume: fence the node ("" = every node), without its help. Not published is fine."""
        node_name = ""
        if node_id:
            try:
                node_name = NodeId.parse(node_id).name
            except Invalid:
                return  # no node of ours, so nothing of ours is published to it
        with self._locks.hold(volume_id):
            for publication in self._publications.of(volume_id):
                if node_name in ("", publication.node.name):
                    self._fence(publication, deadline)

    def _finish_fences(self, volume_id: str, deadline: Deadline) -> None:
        """Complete what an interrupted unpublish began."""
        for publication in self._publications.of(volume_id):
            if publication.revoked:
                self._fence(publication, deadline)

    def _fence(self, publication: Publication, deadline: Deadline) -> None:
        pool = self._pools.get(publication.pool)
        if pool is None:
            raise NotFound(
                f"pool {publication.pool}: volume {publication.volume_id} is published from it, but it is "
                "not configured any more; put it back into the settings, then unpublish"
            )
        # Revoked on disk first: otherwise the background could restore the target between its removal and the record's.
        publication = replace(publication, revoked=True)
        self._publications.write(publication)
        pool.export.remove(publication, deadline)
        self._look_after_fence(pool, publication, deadline)
        self._publications.remove(publication)

    def _look_after_fence(self, pool: Pool, publication: Publication, deadline: Deadline) -> None:
        volume = self._find(publication.volume_id, deadline)
        if volume is None or not volume.blank:
            return
        try:
            self._open(pool.backend, volume, deadline)
        except DriverError as error:
            # A failing disk must not keep a node attached for ever; in doubt there is data, and nobody formats it.
            self._log.warning("can't look at volume; taken as used", volume_id=volume.volume_id, error=str(error))
            pool.backend.mark_used(volume)

    def _open(self, backend: Backend, volume: Volume, deadline: Deadline) -> Volume:
        """Open for export, and remember for good when data is seen where none was before."""
        opened = backend.open_for_export(volume, deadline)
        if volume.blank and not opened.blank:
            backend.mark_used(volume)
        return opened

    def _admit(self, volume: Volume, node: NodeId, capability: Capability, *, readonly: bool) -> Publication:
        """The publication for this node: the one that stands, or a new one if the others allow it."""
        mode = capability.access_mode
        standing = self._publications.of(volume.volume_id)
        for own in standing:
            if own.node.name == node.name:
                return policy.same_publication(own, node, capability, readonly=readonly)
        for other in standing:
            theirs = other.capability
            shared = mode.multi_node and theirs.access_mode == mode and theirs.block == capability.block
            if not shared:
                raise InUse(
                    f"volume {volume.volume_id}: published to node {other.node.name} as {theirs.access_mode.value}; "
                    f"unpublish it there before it goes to node {node.name} as {mode.value}"
                )
        self._check_initiator(node)
        self._check_room(node)
        return Publication(
            volume_id=volume.volume_id,
            pool=volume.pool,
            node_id=str(node),
            nonce=secrets.token_hex(8),
            tid=secrets.randbelow((1 << 30) - 1) + (1 << 30),
            device=volume.device,
            size_bytes=volume.size_bytes,
            readonly=readonly,
            capability=capability,
            chap=_new_chap(),
        )

    def _check_initiator(self, node: NodeId) -> None:
        """Two machines with one initiator name (a cloned image) would kick each other out for ever."""
        if not node.initiator:
            return
        for other in self._publications.all():
            if other.node.initiator == node.initiator and other.node.name != node.name:
                raise InUse(
                    f"node {node.name}: its initiator name {node.initiator} is also that of node {other.node.name}; "
                    "give each machine its own (iscsi-iname > /etc/iscsi/initiatorname.iscsi) and restart iscsid there"
                )

    def _check_room(self, node: NodeId) -> None:
        held = sum(1 for publication in self._publications.all() if publication.node.name == node.name)
        if self._max_per_node and held >= self._max_per_node:
            raise NoSpace(f"node {node.name}: holds {held} volumes, and node.max_volumes is {self._max_per_node}")

    def _check_node(self, volume: Volume, pool: Pool, node: NodeId) -> None:
        if pool.local_to and pool.local_to != node.name:
            raise InUse(
                f"volume {volume.volume_id}: pool {volume.pool} is local to node {pool.local_to}, node {node.name} "
                "can't reach it"
            )
        if pool.export.protocol == "iscsi" and not (node.initiator and node.public_key):
            raise InUse(
                f"node {node.name}: has no iSCSI initiator name; install open-iscsi there and restart its node service"
            )

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
        volume = self._get(volume_id, deadline)
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
                for pool in self._pools.values()
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
        return self._entry(self._get(volume_id, deadline))

    def capacity(
        self,
        *,
        parameters: Mapping[str, str],
        topology: Mapping[str, str],
        capabilities: Sequence[Capability],
        deadline: Deadline,
    ) -> Capacity:
        """GetCapacity of the pool that the parameters name; nothing where it can't be reached or used in that way."""
        _, pool = self._pool_of(parameters)
        if policy.unsupported(capabilities) or not policy.reaches(pool.local_to, topology):
            return Capacity(0, 0, 0)
        return pool.backend.capacity(deadline)

    def topology_of(self, volume: Volume) -> dict[str, str]:
        """The segment that a volume is tied to; {} when every node reaches it."""
        local_to = self._pools[volume.pool].local_to
        return {TOPOLOGY_NODE: local_to} if local_to else {}

    # -- grow ----------------------------------------------------------------------------------------------------

    def expand(self, volume_id: str, *, required_bytes: int, limit_bytes: int, deadline: Deadline) -> int:
        """ControllerExpandVolume; returns the size in bytes. Smaller or equal is fine and changes nothing."""
        with self._locks.hold(volume_id):
            volume = self._get(volume_id, deadline)
            pool = self._pools[volume.pool]
            if required_bytes > volume.size_bytes:
                size_bytes = policy.size(pool.backend, required_bytes, limit_bytes)
                volume = pool.backend.grow(volume, size_bytes=size_bytes, deadline=deadline)
            elif limit_bytes and limit_bytes < volume.size_bytes:
                raise OutOfRange(
                    f"capacity_range.limit_bytes: {limit_bytes} is less than the volume's {volume.size_bytes} "
                    "bytes; volumes never shrink"
                )
            for publication in self._publications.of(volume_id):
                if not publication.revoked:
                    self._follow_size(pool, publication, volume, deadline)
            return volume.size_bytes

    def _follow_size(self, pool: Pool, publication: Publication, volume: Volume, deadline: Deadline) -> Publication:
        """Make an export show the size of its volume. The record follows the export, so that a crash is made good."""
        if publication.size_bytes == volume.size_bytes:
            return publication
        grown = replace(publication, size_bytes=volume.size_bytes)
        pool.export.grow(grown, deadline)
        self._publications.write(grown)
        return grown

    # -- background, health --------------------------------------------------------------------------------------

    def problems(self, deadline: Deadline) -> list[str]:
        """What makes this SNODE unable to serve, a sentence each; [] = ready.

        A pool or a record that is broken beside others that work is told in the log only: the others must go on.
        """
        broken = [pool.backend.problems(deadline) for pool in self._pools.values()]
        found = [problem for export in self._exports() for problem in export.problems(deadline)]
        pool_problems = [problem for problems in broken for problem in problems]
        if all(broken):
            found += pool_problems
        self._tell(pool_problems + self._record_problems())
        return found

    def _record_problems(self) -> list[str]:
        return [
            *(f"publication record {name}: {why}" for name, why in self._publications.damaged.items()),
            *(
                f"pool {name}: volumes are published from it, but it is not configured; put it back, or unpublish them"
                for name in sorted(self._missing_pools())
            ),
        ]

    def _tell(self, problems: list[str]) -> None:
        """Log what is broken, once for each change."""
        if problems != self._told:
            for problem in problems:
                self._log.warning("problem", problem=problem)
            self._told = problems

    def tend(self, deadline: Deadline) -> None:
        """Background work, called again and again: restore exports, see data that nodes wrote, resume wipes."""
        self._see_devices(deadline)
        # A record that can't be read, or a pool that fell out of the settings, must not cost a running node its target.
        if not self._publications.damaged and not self._missing_pools():
            for export in self._exports():
                export.reconcile(partial(self._wanted, export), deadline)
        for pool in self._pools.values():
            pool.backend.tend(deadline)

    def _missing_pools(self) -> set[str]:
        return {publication.pool for publication in self._publications.all()} - self._pools.keys()

    def _exports(self) -> Sequence[Export]:
        return list({id(pool.export): pool.export for pool in self._pools.values()}.values())

    def _wanted(self, export: Export) -> list[Publication]:
        """The publications that an export must hold."""
        return [
            publication
            for publication in self._publications.all()
            if not publication.revoked
            and (pool := self._pools.get(publication.pool)) is not None
            and pool.export is export
        ]

    def _see_devices(self, deadline: Deadline) -> None:
        """Activate what a reboot left inactive, and drop the permission to format as soon as data is seen.

        Not only at unpublish: the superblock may be damaged, or this machine lost, before that.
        """
        for publication in self._publications.all():
            pool = self._pools.get(publication.pool)
            if pool is None:
                continue
            try:
                with self._locks.hold(publication.volume_id, background=True):
                    volume = self._find(publication.volume_id, deadline)
                    if volume is not None and (volume.blank or not publication.device.exists()):
                        self._open(pool.backend, volume, deadline)
            except Busy:
                continue  # a request is at it and looks itself; next time
            except DriverError as error:
                self._log.warning("can't look at volume", volume_id=publication.volume_id, error=str(error))

    # -- parts ---------------------------------------------------------------------------------------------------

    def _find(self, volume_id: str, deadline: Deadline) -> Volume | None:
        for pool in self._pools.values():
            volume = pool.backend.find(volume_id, deadline)
            if volume is not None:
                return volume
        return None

    def _get(self, volume_id: str, deadline: Deadline) -> Volume:
        volume = self._find(volume_id, deadline)
        if volume is None:
            raise NotFound(f"volume {volume_id}: does not exist in any pool ({', '.join(sorted(self._pools))})")
        return volume

    def _entry(self, volume: Volume) -> Entry:
        published = self._publications.of(volume.volume_id)
        return Entry(volume, tuple(sorted(publication.node_id for publication in published)))

    def _pool_of(self, parameters: Mapping[str, str]) -> tuple[str, Pool]:
        name = parameters.get("pool", self._default_pool)
        if name not in self._pools:
            raise Invalid(f"parameters.pool: no pool {name!r} here; there is: {', '.join(sorted(self._pools))}")
        return name, self._pools[name]

    def _check_reachable(self, name: str, pool: Pool, requisite: Sequence[Mapping[str, str]]) -> None:
        if requisite and not any(policy.reaches(pool.local_to, topology) for topology in requisite):
            raise NoSpace(
                f"accessibility_requirements: pool {name} is local to node {pool.local_to}, which is not among the "
                "requisite topologies"
            )


def _new_chap() -> Chap:
    return Chap(
        user=f"n{secrets.token_hex(8)}",
        secret=secrets.token_hex(16),
        mutual_user=f"t{secrets.token_hex(8)}",
        mutual_secret=secrets.token_hex(16),
    )
