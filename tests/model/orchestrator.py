"""Makes calls as an orchestrator does, right ones and wrong ones, and holds each answer against what was acknowledged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from grpc import StatusCode as Code

from csi.pb import csi_pb2 as pb
from tests.model.book import CAPABILITIES, MIB, NAMES, SHARED, UNSUPPORTED, Call, Known, Published
from tests.model.codes import ALLOWED
from tests.model.cnode import Cnode
from tests.model.world import Reply, World


class Orchestrator:
    """`sure`, given to `do`: nothing disturbs the call, so its answer is known beforehand in many cases."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.volumes = [Known(name) for name in NAMES]
        self.refused_by_hand = False  # a fault was injected that the driver can't foresee: INTERNAL is right then
        self._kinds: dict[str, Callable[[Call, bool], Reply | None]] = {
            "create": self._create,
            "delete": self._delete,
            "publish": self._publish,
            "unpublish": self._unpublish,
            "expand": self._expand,
            "list": self._list,
            "get": self._get,
            "validate": self._validate,
            "capacity": self._capacity,
            "probe": self._probe,
            "stage": self._stage,
            "unstage": self._unstage,
            "node publish": self._node_publish,
            "node unpublish": self._node_unpublish,
            "stats": self._stats,
            "node expand": self._node_expand,
            "info": self._info,
        }

    @property
    def kinds(self) -> list[str]:
        """What `do` can do."""
        return list(self._kinds)

    def do(self, call: Call, *, sure: bool) -> Reply | None:
        """Make a call. Returns None when the node has no power to answer."""
        return self._kinds[call.kind](call, sure)

    def staging_path(self, call: Call) -> Path:
        """The staging path of a call: of its own volume, or (place 2) of another one."""
        return self._path(call, "staging")

    def target_path(self, call: Call) -> Path:
        """The target path of a call."""
        return self._path(call, "target")

    # -- controller ----------------------------------------------------------------------------------------------

    def _create(self, call: Call, sure: bool) -> Reply:
        known = self.volumes[call.volume]
        before, known.exists = known.exists, known.exists or None
        size, limit = call.size, 2 * call.size if call.odd else 0
        reply = self._call(
            pb.CreateVolumeRequest(
                name=known.name,
                capacity_range=pb.CapacityRange(required_bytes=size, limit_bytes=limit),
                volume_capabilities=[CAPABILITIES[call.way]],
                parameters={"pool": "none" if call.place == 2 else "files"},
            )
        )
        wrong = call.way in UNSUPPORTED or call.place == 2
        if reply.ok:
            assert not wrong
            volume = reply.message.volume
            assert volume.volume_id == known.volume_id and volume.capacity_bytes >= size
            assert not before or volume.capacity_bytes == known.size_bytes
            known.exists, known.size_bytes = True, volume.capacity_bytes
        elif before is False and (wrong or reply.code in (Code.INVALID_ARGUMENT, Code.ABORTED)):
            known.exists = False
        if sure and before is not None:
            fits = before is False or size <= known.size_bytes <= (limit or known.size_bytes)
            self._expect(reply, Code.INVALID_ARGUMENT if wrong else Code.OK if fits else Code.ALREADY_EXISTS)
        return reply

    def _delete(self, call: Call, sure: bool) -> Reply:
        known = self.volumes[call.volume]
        before, known.exists = known.exists, None if known.exists is not False else False
        kept, known.acknowledged = known.acknowledged, []
        reply = self._call(pb.DeleteVolumeRequest(volume_id=known.volume_id))
        held = any(published.sure for published in known.published.values())
        if reply.ok:
            known.gone()
            assert not held or not sure, "a published volume was deleted"
        elif reply.code in (Code.FAILED_PRECONDITION, Code.ABORTED):
            known.exists, known.acknowledged = before, kept
        if sure and (held or not known.published):
            self._expect(reply, Code.FAILED_PRECONDITION if held and before else Code.OK)
        return reply

    def _publish(self, call: Call, sure: bool) -> Reply:
        known = self.volumes[call.volume]
        node = self.world.nodes[call.node]
        standing = known.published.get(call.node)
        others = [published for index, published in known.published.items() if index != call.node]
        wish = Published(call.way, call.readonly or call.way in ("reader", "readers"))
        if standing is None:
            known.published[call.node] = wish
        known.used = known.used or "block" in call.way
        reply = self._call(
            pb.ControllerPublishVolumeRequest(
                volume_id=known.volume_id,
                node_id=node.node_id,
                volume_capability=CAPABILITIES[call.way],
                readonly=call.readonly,
            )
        )
        if reply.ok:
            for other in others:
                shared = call.way in SHARED and other.way == call.way
                assert shared or not other.sure, f"published as {call.way} beside another node's {other.way}"
            assert self.world.tgtd_up
            wish.sure = True
            known.published[call.node] = wish
            context = dict(reply.message.publish_context)
            # Sealed anew at each answer: what it says is compared.
            contexts = known.contexts.setdefault(call.node, [])
            contexts[:] = [*(c for c in contexts if _says(c) != _says(context)), context]
        elif standing is None and reply.code in (
            Code.NOT_FOUND, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.ABORTED
        ):  # fmt: skip
            known.published.pop(call.node, None)
        if sure and known.exists is not None and self.world.tgtd_up:
            self._expect_publish(known, call, standing, others, wish, reply)
        return reply

    def _expect_publish(
        self,
        known: Known,
        call: Call,
        standing: Published | None,
        others: list[Published],
        wish: Published,
        reply: Reply,
    ) -> None:
        if call.way in UNSUPPORTED:
            self._expect(reply, Code.INVALID_ARGUMENT)
        elif not known.exists:
            self._expect(reply, Code.NOT_FOUND)
        elif standing is not None and standing.sure:
            same = (_mode(standing.way), standing.readonly) == (_mode(wish.way), wish.readonly)
            self._expect(reply, Code.OK if same else Code.ALREADY_EXISTS)
        elif standing is None and all(other.sure for other in others):
            free = all(other.way == wish.way and wish.way in SHARED for other in others)
            self._expect(reply, Code.OK if free else Code.FAILED_PRECONDITION)

    def _unpublish(self, call: Call, sure: bool) -> Reply:
        known = self.volumes[call.volume]
        nodes = [index for index in range(len(self.world.nodes)) if call.odd or index == call.node]
        for index in nodes:
            if index in known.published:
                known.published[index].sure = False
        node_id = "" if call.odd else self.world.nodes[call.node].node_id
        reply = self._call(pb.ControllerUnpublishVolumeRequest(volume_id=known.volume_id, node_id=node_id))
        if reply.ok:
            for index in nodes:
                known.published.pop(index, None)
                left = self.world.sessions_of(known.volume_id, self.world.nodes[index])
                assert not left, f"node {index} still has {left} sessions for {known.name} after its fence"
        if sure and self.world.tgtd_up and not self.in_flight():
            self._expect(reply, Code.OK)
        return reply

    def _expand(self, call: Call, sure: bool) -> Reply:
        known = self.volumes[call.volume]
        before = known.size_bytes
        request = pb.ControllerExpandVolumeRequest(
            volume_id=known.volume_id,
            capacity_range=pb.CapacityRange(required_bytes=call.size, limit_bytes=call.size if call.odd else 0),
        )
        try:
            reply = self._call(request)
        finally:
            self._learn(known)
        assert not reply.ok or reply.message.capacity_bytes == known.size_bytes >= call.size
        if sure and known.exists is not None and self.world.tgtd_up and not self.in_flight():
            shrink = call.odd and call.size < before
            self._expect(reply, Code.NOT_FOUND if not known.exists else Code.OUT_OF_RANGE if shrink else Code.OK)
        return reply

    def _learn(self, known: Known) -> None:
        """The size after a growth that may have gone wrong."""
        image = self.world.images().get(known.volume_id)
        if known.exists and image is not None:
            size_bytes = image.stat().st_size
            assert size_bytes >= known.size_bytes
            known.size_bytes = size_bytes

    def _list(self, call: Call, sure: bool) -> Reply:
        page = 1 if call.odd else 0
        found: dict[str, Any] = {}
        token = ""
        for _ in range(len(self.volumes) + 1):
            reply = self._call(pb.ListVolumesRequest(max_entries=page, starting_token=token))
            if not reply.ok:
                return reply
            found |= {entry.volume.volume_id: entry for entry in reply.message.entries}
            token = reply.message.next_token
            if not token:
                break
        if sure:
            for known in self.volumes:
                listed = known.volume_id in found
                assert known.exists is None or known.exists == listed, f"{known.name} listed: {listed}"
                known.exists = listed
                if listed:
                    nodes = set(found[known.volume_id].status.published_node_ids)
                    for index, published in known.published.items():
                        assert not published.sure or self.world.nodes[index].node_id in nodes
            assert found.keys() == self.world.images().keys()
        return reply

    def _get(self, call: Call, sure: bool) -> Reply:
        known = self.volumes[call.volume]
        reply = self._call(pb.ControllerGetVolumeRequest(volume_id=known.volume_id))
        if sure and known.exists is not None:
            self._expect(reply, Code.OK if known.exists else Code.NOT_FOUND)
        if sure and known.exists:
            assert reply.message.volume.capacity_bytes == known.size_bytes
        return reply

    def _validate(self, call: Call, sure: bool) -> Reply:
        known = self.volumes[call.volume]
        reply = self._call(
            pb.ValidateVolumeCapabilitiesRequest(
                volume_id=known.volume_id, volume_capabilities=[CAPABILITIES[call.way]]
            )
        )
        if sure and known.exists is not None:
            self._expect(reply, Code.OK if known.exists else Code.NOT_FOUND)
        if reply.ok:
            assert reply.message.HasField("confirmed") == (call.way not in UNSUPPORTED)
        return reply

    def _capacity(self, call: Call, sure: bool) -> Reply:
        reply = self._call(pb.GetCapacityRequest(volume_capabilities=[CAPABILITIES[call.way]]))
        if sure:
            self._expect(reply, Code.OK)
        return reply

    def _probe(self, call: Call, sure: bool) -> Reply:
        return self._call(pb.ProbeRequest())

    # -- node ----------------------------------------------------------------------------------------------------

    def _stage(self, call: Call, sure: bool) -> Reply | None:
        known, node = self.volumes[call.volume], self.world.nodes[call.node]
        if not node.up:
            return None
        path = self.staging_path(call)
        contexts = known.contexts.get(call.node, [{}])
        context = contexts[max(0, len(contexts) - 2)] if call.odd else contexts[-1]
        known.staged.add((call.node, path))
        reply = self._call(
            pb.NodeStageVolumeRequest(
                volume_id=known.volume_id,
                staging_target_path=str(path),
                volume_capability=CAPABILITIES[self._way(call)],
                publish_context=context,
            ),
            node,
        )
        if reply.ok and sure:
            assert self.world.sessions_of(known.volume_id, node) or node.initiator.connected is False
            if not CAPABILITIES[self._way(call)].HasField("block"):
                self._shows(known, node, path)
        return reply

    def _unstage(self, call: Call, sure: bool) -> Reply | None:
        known, node = self.volumes[call.volume], self.world.nodes[call.node]
        if not node.up:
            return None
        path = self.staging_path(call)
        reply = self._call(pb.NodeUnstageVolumeRequest(volume_id=known.volume_id, staging_target_path=str(path)), node)
        if reply.ok:
            assert node.mounts.at(path) is None, f"still mounted at {path}"
            known.staged.discard((call.node, path))
            if not any(index == call.node and node.mounts.at(other) for index, other in known.staged):
                known.staged = {(index, other) for index, other in known.staged if index != call.node}
                assert known.volume_id not in node.volumes(), f"{known.name} is attached after the last unstage"
        return reply

    def _node_publish(self, call: Call, sure: bool) -> Reply | None:
        known, node = self.volumes[call.volume], self.world.nodes[call.node]
        if not node.up:
            return None
        path = self.target_path(call)
        capability = CAPABILITIES[self._way(call)]
        known.targets.add((call.node, path))
        staged = self.staging_path(Call("", call.volume, call.node))
        reply = self._call(
            pb.NodePublishVolumeRequest(
                volume_id=known.volume_id,
                staging_target_path=str(staged),
                target_path=str(path),
                volume_capability=capability,
                readonly=call.readonly,
            ),
            node,
        )
        if reply.ok:
            known.shown[(call.node, path)] = capability.HasField("block")
            if sure:
                self._shows(known, node, path)
        return reply

    def _node_unpublish(self, call: Call, sure: bool) -> Reply | None:
        known, node = self.volumes[call.volume], self.world.nodes[call.node]
        if not node.up:
            return None
        path = self.target_path(call)
        known.shown.pop((call.node, path), None)
        reply = self._call(pb.NodeUnpublishVolumeRequest(volume_id=known.volume_id, target_path=str(path)), node)
        if reply.ok:
            assert node.mounts.at(path) is None and not path.exists(), f"still something at {path}"
            known.targets.discard((call.node, path))
        return reply

    def _stats(self, call: Call, sure: bool) -> Reply | None:
        known, node = self.volumes[call.volume], self.world.nodes[call.node]
        if not node.up:
            return None
        path = self.target_path(call)
        reply = self._call(pb.NodeGetVolumeStatsRequest(volume_id=known.volume_id, volume_path=str(path)), node)
        if sure and not known.shown and (call.node, path) not in known.targets:
            self._expect(reply, Code.NOT_FOUND)
        return reply

    def _node_expand(self, call: Call, sure: bool) -> Reply | None:
        known, node = self.volumes[call.volume], self.world.nodes[call.node]
        if not node.up:
            return None
        reply = self._call(
            pb.NodeExpandVolumeRequest(
                volume_id=known.volume_id,
                volume_path=str(self.target_path(call)),
                capacity_range=pb.CapacityRange(required_bytes=0 if call.odd else known.size_bytes),
            ),
            node,
        )
        if reply.ok and not call.odd:
            assert reply.message.capacity_bytes >= known.size_bytes
        return reply

    def _info(self, call: Call, sure: bool) -> Reply | None:
        node = self.world.nodes[call.node]
        if not node.up:
            return None
        reply = self._call(pb.NodeGetInfoRequest(), node)
        assert reply.message.node_id == node.node_id
        return reply

    # -- parts ---------------------------------------------------------------------------------------------------

    def _call(self, request: Message, node: Cnode | None = None) -> Reply:
        reply = self.world.call(request, node=node)
        name = type(request).__name__.removesuffix("Request")
        by_hand = self.refused_by_hand and reply.code is Code.INTERNAL and "defect" not in reply.details
        defects = "\n".join(self.world.tracebacks)
        assert by_hand or reply.code in ALLOWED[name], f"{name}: {reply.code.name}: {reply.details}\n{defects}"
        return reply

    def _expect(self, reply: Reply, code: Code) -> None:
        assert reply.code is code, f"{reply.code.name} instead of {code.name}: {reply.details}"

    def _way(self, call: Call) -> str:
        published = self.volumes[call.volume].published.get(call.node)
        return call.way if call.odd or published is None else published.way

    def _path(self, call: Call, kind: str) -> Path:
        index = (call.volume + 1) % len(self.volumes) if call.place == 2 else call.volume
        return self.world.nodes[call.node].root / kind / f"{NAMES[index]}{call.place % 2}"

    def _shows(self, known: Known, node: Cnode, path: Path) -> None:
        backing = node.backing(path)
        assert backing is not None and backing.stem == known.volume_id, f"{backing} at {path}, not {known.name}"

    def in_flight(self) -> bool:
        """Whether any command of any node is still at work in tgtd."""
        return any(session.in_flight for target in self.world.tgtd.targets.values() for session in target.sessions)


def _says(context: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in context.items() if key != "sealed"}


def _mode(way: str) -> tuple[int, bool]:
    capability = CAPABILITIES[way]
    return capability.access_mode.mode, capability.HasField("block")


__all__ = ["MIB", "Orchestrator"]
