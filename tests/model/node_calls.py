"""Calls to a CNODE, right and wrong ones; each answer is held against what was acknowledged."""

from collections.abc import Callable

from grpc import StatusCode as Code

from csi.pb import csi_pb2 as pb
from tests.model.book import CAPABILITIES, Call
from tests.model.caller import Caller
from tests.model.ground import Reply


class NodeCalls:
    """`kinds`: the calls by name; each takes the call and whether nothing disturbs it, and is None without power."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._ground = caller.ground
        self._volumes = caller.volumes
        self.kinds: dict[str, Callable[[Call, bool], Reply | None]] = {
            "stage": self._stage,
            "unstage": self._unstage,
            "node publish": self._node_publish,
            "node unpublish": self._node_unpublish,
            "stats": self._stats,
            "health": self._health,
            "node expand": self._node_expand,
            "info": self._info,
        }

    def _stage(self, call: Call, sure: bool) -> Reply | None:
        known, node = self._volumes[call.volume], self._ground.nodes[call.node]
        if not node.up:
            return None
        path = self._caller.staging_path(call)
        contexts = known.contexts.get(call.node, [{}])
        context = contexts[max(0, len(contexts) - 2)] if call.odd else contexts[-1]
        known.staged.add((call.node, path))
        reply = self._caller.call(
            pb.NodeStageVolumeRequest(
                volume_id=known.volume_id,
                staging_target_path=str(path),
                volume_capability=CAPABILITIES[self._caller.way(call)],
                publish_context=context,
            ),
            node,
            sure=sure,
        )
        if reply.ok and sure:
            assert self._ground.sessions_of(known.volume_id, node) or not node.reaches_snode
            if not CAPABILITIES[self._caller.way(call)].HasField("block"):
                self._caller.shows(known, node, path)
        return reply

    def _unstage(self, call: Call, sure: bool) -> Reply | None:
        known, node = self._volumes[call.volume], self._ground.nodes[call.node]
        if not node.up:
            return None
        path = self._caller.staging_path(call)
        reply = self._caller.call(
            pb.NodeUnstageVolumeRequest(volume_id=known.volume_id, staging_target_path=str(path)), node, sure=sure
        )
        if reply.ok:
            known.staged.discard((call.node, path))
            if not self._caller.alone or not node.up:
                return reply
            assert not node.is_mounted(path), f"still mounted at {path}"
            if not any(index == call.node and node.is_mounted(other) for index, other in known.staged):
                known.staged = {(index, other) for index, other in known.staged if index != call.node}
                assert known.volume_id not in node.volumes(), f"{known.name} is attached after the last unstage"
        return reply

    def _node_publish(self, call: Call, sure: bool) -> Reply | None:
        known, node = self._volumes[call.volume], self._ground.nodes[call.node]
        if not node.up:
            return None
        path = self._caller.target_path(call)
        capability = CAPABILITIES[self._caller.way(call)]
        known.targets.add((call.node, path))
        staged = self._caller.staging_path(Call("", call.volume, call.node))
        reply = self._caller.call(
            pb.NodePublishVolumeRequest(
                volume_id=known.volume_id,
                staging_target_path=str(staged),
                target_path=str(path),
                volume_capability=capability,
                readonly=call.readonly,
            ),
            node,
            sure=sure,
        )
        if reply.ok:
            known.shown[(call.node, path)] = capability.HasField("block")
            if sure:
                self._caller.shows(known, node, path)
        return reply

    def _node_unpublish(self, call: Call, sure: bool) -> Reply | None:
        known, node = self._volumes[call.volume], self._ground.nodes[call.node]
        if not node.up:
            return None
        path = self._caller.target_path(call)
        known.shown.pop((call.node, path), None)
        request = pb.NodeUnpublishVolumeRequest(volume_id=known.volume_id, target_path=str(path))
        reply = self._caller.call(request, node, sure=sure)
        if reply.ok:
            if self._caller.alone and node.up:
                assert not node.is_mounted(path) and not node.exists(path), f"still something at {path}"
            known.targets.discard((call.node, path))
        return reply

    def _stats(self, call: Call, sure: bool) -> Reply | None:
        known, node = self._volumes[call.volume], self._ground.nodes[call.node]
        if not node.up:
            return None
        path = self._caller.target_path(call)
        request = pb.NodeGetVolumeStatsRequest(volume_id=known.volume_id, volume_path=str(path))
        reply = self._caller.call(request, node, sure=sure)
        if sure and not known.shown and (call.node, path) not in known.targets:
            self._caller.expect(reply, Code.NOT_FOUND)
        return reply

    def _health(self, call: Call, sure: bool) -> Reply | None:
        known, node = self._volumes[call.volume], self._ground.nodes[call.node]
        if not node.up:
            return None
        reply = self._caller.call(pb.NodeGetVolumeHealthRequest(volume_id=known.volume_id), node, sure=sure)
        assert not reply.ok or reply.message.volume_health.volume_id == known.volume_id
        return reply

    def _node_expand(self, call: Call, sure: bool) -> Reply | None:
        known, node = self._volumes[call.volume], self._ground.nodes[call.node]
        if not node.up:
            return None
        reply = self._caller.call(
            pb.NodeExpandVolumeRequest(
                volume_id=known.volume_id,
                volume_path=str(self._caller.target_path(call)),
                capacity_range=pb.CapacityRange(required_bytes=0 if call.odd else known.size_bytes),
            ),
            node,
            sure=sure,
        )
        if reply.ok and not call.odd:
            assert reply.message.capacity_bytes >= known.size_bytes
        return reply

    def _info(self, call: Call, sure: bool) -> Reply | None:
        node = self._ground.nodes[call.node]
        if not node.up:
            return None
        assert self._caller.call(pb.NodeGetCapabilitiesRequest(), node, sure=sure).ok or not sure
        reply = self._caller.call(pb.NodeGetInfoRequest(), node, sure=sure)
        assert not reply.ok or reply.message.node_id == node.node_id
        return reply
