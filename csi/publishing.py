"""Granting volumes to nodes and taking them back: publish, unpublish, and the background that keeps both true.

The records come first: one is on disk before its target exists, is revoked before its target goes, and goes last.
"""

import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from csi import policy, publish_context, takeover
from csi.backends.base import Backend
from csi.deadline import Deadline
from csi.errors import Busy, DriverError, InUse, Invalid, NoSpace, NotFound
from csi.exports.base import Export
from csi.locks import VolumeLocks
from csi.log import get_logger
from csi.model import Capability, Chap, NodeId, Publication, Volume
from csi.pools import Pool, Pools
from csi.publications import Publications
from csi.sealing import check_public_key


class Publishing:
    """The publications of one SNODE, as use cases."""

    def __init__(self, pools: Pools, *, publications: Publications, locks: VolumeLocks, max_per_node: int = 0) -> None:
        """max_per_node: how many volumes one node may hold at once, 0 = no limit."""
        self._pools = pools
        self._publications = publications
        self._locks = locks
        self._max_per_node = max_per_node
        self._admission = threading.Lock()
        self._warned = ""
        self._log = get_logger("publishing")

    def publish(
        self, volume_id: str, *, node_id: str, capability: Capability, readonly: bool, deadline: Deadline
    ) -> dict[str, str]:
        """ControllerPublishVolume; returns the publish_context. Starts no process when the device is active.

        Raises NotFound for an unknown volume or node, Conflict when it is published to this node in another way,
        InUse when it is published to another node, or another machine has this node's initiator name. A volume with the
        parameter `takeover` is taken from a node that has fallen silent.
        """
        try:
            node = NodeId.parse(node_id)
        except Invalid as error:
            raise NotFound(str(error)) from error
        reason = policy.unsupported([capability])
        if reason:
            raise Invalid(f"volume_capability: {reason}")
        with self._locks.hold(volume_id):
            volume = self._pools.get_volume(volume_id, deadline)
            pool = self._pools.by_name[volume.pool]
            self._check_node(volume, pool, node)
            self._finish_fences(volume_id, pool.export, deadline)
            volume = self._open(pool.backend, volume, deadline)
            self._take_over(volume, pool, node, capability, deadline)
            publication = self._admit(volume, node, capability, readonly=readonly or capability.access_mode.reader_only)
            if capability.block and not publication.readonly:
                # Whatever the node writes there has no signature that a later look could find.
                pool.backend.mark_used(volume)
                volume = replace(volume, blank=False)
            paths = pool.export.ensure(publication, deadline)
            publication = self.follow_size(pool, publication, volume, deadline)
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
            known = self._publications.readable_of(volume_id)
            exports = [self._pools.get_of(publication).export for publication in known] or self._pools.exports()
            for publication in known:
                if node_name in ("", publication.node.name):
                    self._fence(publication, deadline)
            self._fence_unknown(volume_id, exports, deadline)

    def _finish_fences(self, volume_id: str, export: Export, deadline: Deadline) -> None:
        """Complete what an interrupted unpublish began, and fence whom no record knows."""
        for publication in self._publications.of(volume_id):
            self._pools.get_of(publication)
            if publication.revoked:
                self._fence(publication, deadline)
        self._fence_unknown(volume_id, [export], deadline)

    def _fence_unknown(self, volume_id: str, exports: Sequence[Export], deadline: Deadline) -> None:
        """Fence targets of this volume without a (readable) record: records can be lost, and tgtd outlives them."""
        keep = {publication.target for publication in self._publications.readable_of(volume_id)}
        for export in exports:
            export.fence_strays(volume_id, keep=keep, deadline=deadline)
        for name in self._publications.damaged_of(volume_id):
            self._publications.forget_damaged(name)

    def _fence(self, publication: Publication, deadline: Deadline) -> None:
        pool = self._pools.get_of(publication)
        # Revoked on disk first: otherwise the background could restore the target between its removal and the record's.
        publication = self._publications.revoke(publication)
        pool.export.remove(publication, deadline)
        self._look_after_fence(pool, publication, deadline)
        self._publications.remove(publication)

    def _look_after_fence(self, pool: Pool, publication: Publication, deadline: Deadline) -> None:
        """See whether the node has left data. A failing disk must not keep the node attached for ever."""
        try:
            volume = pool.backend.find(publication.volume_id, deadline)
            if volume is None or not volume.blank:
                return
            try:
                self._open(pool.backend, volume, deadline)
            except DriverError as error:
                self._log.warning("can't look at volume; taken as used", volume_id=volume.volume_id, error=str(error))
                pool.backend.mark_used(volume)  # in doubt there is data, and nobody formats it
        except DriverError as error:
            self._log.warning("can't note data", volume_id=publication.volume_id, error=str(error))

    def _open(self, backend: Backend, volume: Volume, deadline: Deadline) -> Volume:
        """Open for export, and remember for good when data is seen where none was before."""
        opened = backend.open_for_export(volume, deadline)
        if volume.blank and not opened.blank:
            backend.mark_used(volume)
        return opened

    def _take_over(self, volume: Volume, pool: Pool, node: NodeId, capability: Capability, deadline: Deadline) -> None:
        """Fence holders that have fallen silent, if the volume allows it. Raises InUse for one that has not."""
        after = takeover.after_seconds(volume.parameters)
        standing = self._publications.of(volume.volume_id)
        if not after or node.name in {publication.node.name for publication in standing}:
            return
        self._check_initiator(node)
        self._check_room(node)
        for holder in [publication for publication in standing if not policy.can_share(publication, capability)]:
            name = holder.node.name
            if reason := takeover.refusal(after, name, self._idle_seconds(pool.export)):
                raise InUse(f"volume {volume.volume_id}: published to node {name}; {reason}")
            self._log.warning(
                "taking the volume from a silent node", volume_id=volume.volume_id, node=name, to=node.name
            )
            self._fence(holder, deadline)

    def _idle_seconds(self, export: Export) -> dict[str, float | None]:
        """How long each node that an export serves has been silent on all of its sessions."""
        idle: dict[str, float | None] = {}
        for publication in self._wanted(export):
            name, seconds = publication.node.name, export.idle_seconds(publication)
            before = idle.get(name)
            idle[name] = seconds if before is None or (seconds is not None and seconds < before) else before
        return idle

    def _admit(self, volume: Volume, node: NodeId, capability: Capability, *, readonly: bool) -> Publication:
        """The publication for this node, on record: the one that stands, or a new one if the others allow it."""
        with self._admission:  # what the checks count must not change before the record counts too
            return self._admit_one(volume, node, capability, readonly=readonly)

    def _admit_one(self, volume: Volume, node: NodeId, capability: Capability, *, readonly: bool) -> Publication:
        mode = capability.access_mode
        standing = self._publications.of(volume.volume_id)
        for own in standing:
            if own.node.name == node.name:
                return policy.same_publication(own, node, capability, readonly=readonly)
        for other in standing:
            if not policy.can_share(other, capability):
                theirs = other.capability.access_mode.value
                raise InUse(
                    f"volume {volume.volume_id}: published to node {other.node.name} as {theirs}; "
                    f"unpublish it there before it goes to node {node.name} as {mode.value}"
                )
        self._check_initiator(node)
        self._check_room(node)
        publication = Publication(
            volume_id=volume.volume_id,
            pool=volume.pool,
            node_id=str(node),
            protocol=self._pools.by_name[volume.pool].export.protocol,
            nonce=secrets.token_hex(8),
            tid=secrets.randbelow((1 << 30) - 1) + (1 << 30),
            device=volume.device,
            size_bytes=volume.size_bytes,
            readonly=readonly,
            capability=capability,
            chap=_new_chap(),
        )
        self._publications.write(publication)
        return publication

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
        if pool.export.protocol == "iscsi":
            if not (node.initiator and node.public_key):
                raise InUse(
                    f"node {node.name}: has no iSCSI initiator name; install open-iscsi there and restart its "
                    "node service"
                )
            check_public_key(node.public_key, whose=f"node {node.name}")

    def follow_size(self, pool: Pool, publication: Publication, volume: Volume, deadline: Deadline) -> Publication:
        """Make an export show the size of its volume. The record follows the export, so that a crash is made good."""
        if publication.size_bytes == volume.size_bytes:
            return publication
        grown = replace(publication, size_bytes=volume.size_bytes)
        pool.export.grow(grown, deadline)
        self._publications.write(grown)
        return grown

    # -- background ----------------------------------------------------------------------------------------------

    def reconcile(self, deadline: Deadline) -> None:
        """Background work, again and again: make the exports hold what the records say, and nothing else.

        A thread of its own calls it: a disk that hangs must not keep the targets of the others away.
        """
        spare = self._publications.damaged_targets()
        spare |= {
            publication.target for publication in self._publications.all() if self._pools.find_of(publication) is None
        }
        for export in self._pools.exports():
            export.reconcile(partial(self._wanted, export), deadline, spare=spare)

    def see_device(self, publication: Publication, backend: Backend, deadline: Deadline) -> None:
        """Activate what a reboot left inactive, and drop the permission to format as soon as data is seen.

        Not only at unpublish: the superblock may be damaged, or this machine lost, before that. The look is not under
        the volume's lock, since a device may hang; its result counts if the publication still stands afterwards.
        """
        volume_id = publication.volume_id
        try:
            volume = backend.find(volume_id, deadline)
            if volume is None or not (volume.blank or not publication.device.exists()):
                return
            opened = backend.open_for_export(volume, deadline)
            if volume.blank and not opened.blank:
                with self._locks.hold(volume_id, background=True):
                    if publication.nonce in {known.nonce for known in self._publications.readable_of(volume_id)}:
                        backend.mark_used(volume)
        except Busy:
            return  # a request is at it; next time
        except DriverError as error:
            self._warn(f"can't look at volume {volume_id}: {error}")

    def _warn(self, text: str) -> None:
        """Log a warning once until another one takes its place."""
        if text != self._warned:
            self._log.warning(text)
            self._warned = text

    def _wanted(self, export: Export) -> list[Publication]:
        """The publications that an export must hold."""
        standing = [publication for publication in self._publications.all() if not publication.revoked]
        return [p for p in standing if (pool := self._pools.find_of(p)) is not None and pool.export is export]

    def record_problems(self) -> list[str]:
        """What is wrong with the records, a sentence each."""
        missing = {p.pool for p in self._publications.all() if self._pools.find_of(p) is None}
        return [
            *(f"publication record {name}: {why}" for name, why in self._publications.damaged.items()),
            *(
                f"pool {name}: volumes are published from it, but it is not configured; put it back, or unpublish them"
                for name in sorted(missing)
            ),
        ]


def _new_chap() -> Chap:
    return Chap(
        user=f"n{secrets.token_hex(8)}",
        secret=secrets.token_hex(16),
        mutual_user=f"t{secrets.token_hex(8)}",
        mutual_secret=secrets.token_hex(16),
    )
