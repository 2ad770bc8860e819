"""Calls to the SNODE, right and wrong ones; each answer is held against what was acknowledged."""

from collections.abc import Callable
from typing import Any

from grpc import StatusCode as Code

from csi.pb import csi_pb2 as pb
from tests.model.book import CAPABILITIES, SHARED, UNSUPPORTED, Call, Known, Published
from tests.model.caller import Caller
from tests.model.ground import Reply


class ControllerCalls:
    """`kinds`: the calls by name; each takes the call and whether nothing disturbs it."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._ground = caller.ground
        self._volumes = caller.volumes
        self.kinds: dict[str, Callable[[Call, bool], Reply | None]] = {
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
        }

    def _create(self, call: Call, sure: bool) -> Reply:
        known = self._volumes[call.volume]
        before, known.exists = known.exists, known.exists or None
        size, limit, pools = call.size, 2 * call.size if call.odd else 0, self._ground.pools
        reply = self._caller.call(
            pb.CreateVolumeRequest(
                name=known.name,
                capacity_range=pb.CapacityRange(required_bytes=size, limit_bytes=limit),
                volume_capabilities=[CAPABILITIES[call.way]],
                parameters={"pool": "none" if call.place == 2 else pools[call.volume % len(pools)]},
            ),
            sure=sure,
        )
        wrong = call.way in UNSUPPORTED or call.place == 2
        if reply.ok:
            assert not wrong
            volume = reply.message.volume
            assert volume.volume_id == known.volume_id and volume.capacity_bytes >= size
            sure_of_size = before and self._caller.alone and not known.may_have_grown
            assert not sure_of_size or volume.capacity_bytes == known.size_bytes
            known.exists, known.size_bytes = True, volume.capacity_bytes
        elif before is False and (wrong or reply.code in (Code.INVALID_ARGUMENT, Code.ABORTED, Code.OUT_OF_RANGE)):
            known.exists = False
        if sure and before is not None:
            fits = before is False or size <= known.size_bytes <= (limit or known.size_bytes)
            odd = bool(limit) and self._rounded(size) > limit
            usual = Code.OUT_OF_RANGE if odd else Code.OK if fits else Code.ALREADY_EXISTS
            self._caller.expect(reply, Code.INVALID_ARGUMENT if wrong else usual)
        return reply

    def _delete(self, call: Call, sure: bool) -> Reply:
        known = self._volumes[call.volume]
        before, known.exists = known.exists, None if known.exists is not False else False
        kept, known.acknowledged = known.acknowledged, []
        reply = self._caller.call(pb.DeleteVolumeRequest(volume_id=known.volume_id), sure=sure)
        held = any(published.sure for published in list(known.published.values()))
        if reply.ok:
            known.gone()
            assert not held or not sure, "a published volume was deleted"
        elif reply.code in (Code.FAILED_PRECONDITION, Code.ABORTED):
            known.exists, known.acknowledged = before, kept
        if sure and (held or not known.published):
            self._caller.expect(reply, Code.FAILED_PRECONDITION if held and before else Code.OK)
        return reply

    def _publish(self, call: Call, sure: bool) -> Reply:
        known = self._volumes[call.volume]
        node = self._ground.nodes[call.node]
        standing = known.published.get(call.node)
        others = [published for index, published in list(known.published.items()) if index != call.node]
        wish = Published(call.way, call.readonly or call.way in ("reader", "readers"))
        if standing is None:
            known.published[call.node] = wish
        known.used = known.used or "block" in call.way
        reply = self._caller.call(
            pb.ControllerPublishVolumeRequest(
                volume_id=known.volume_id,
                node_id=node.node_id,
                volume_capability=CAPABILITIES[call.way],
                readonly=call.readonly,
            ),
            sure=sure,
        )
        if reply.ok:
            for other in others:
                shared = call.way in SHARED and other.way == call.way
                assert shared or not other.sure, f"published as {call.way} beside another node's {other.way}"
            assert self._ground.exporting
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
        if sure and known.exists is not None and self._ground.exporting and not self._ground.in_flight():
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
            self._caller.expect(reply, Code.INVALID_ARGUMENT)
        elif not known.exists:
            self._caller.expect(reply, Code.NOT_FOUND)
        elif standing is not None and standing.sure:
            same = (_mode(standing.way), standing.readonly) == (_mode(wish.way), wish.readonly)
            self._caller.expect(reply, Code.OK if same else Code.ALREADY_EXISTS)
        elif standing is None and all(other.sure for other in others):
            free = all(other.way == wish.way and wish.way in SHARED for other in others)
            self._caller.expect(reply, Code.OK if free else Code.FAILED_PRECONDITION)

    def _unpublish(self, call: Call, sure: bool) -> Reply:
        known = self._volumes[call.volume]
        nodes = [index for index in range(len(self._ground.nodes)) if call.odd or index == call.node]
        for index in nodes:
            if index in known.published:
                known.published[index].sure = False
        node_id = "" if call.odd else self._ground.nodes[call.node].node_id
        request = pb.ControllerUnpublishVolumeRequest(volume_id=known.volume_id, node_id=node_id)
        reply = self._caller.call(request, sure=sure)
        if reply.ok:
            for index in nodes:
                known.published.pop(index, None)
                left = self._ground.sessions_of(known.volume_id, self._ground.nodes[index]) if self._caller.alone else 0
                assert not left, f"node {index} still has {left} sessions for {known.name} after its fence"
        if sure and self._ground.exporting and not self._ground.in_flight():
            self._caller.expect(reply, Code.OK)
        return reply

    def _expand(self, call: Call, sure: bool) -> Reply:
        known = self._volumes[call.volume]
        before = known.size_bytes
        request = pb.ControllerExpandVolumeRequest(
            volume_id=known.volume_id,
            capacity_range=pb.CapacityRange(required_bytes=call.size, limit_bytes=call.size if call.odd else 0),
        )
        try:
            reply = self._caller.call(request, sure=sure)
        finally:
            if self._caller.alone:
                self._learn(known)
            else:
                known.may_have_grown = True
        grown = max(call.size, known.size_bytes if self._caller.alone else 0)
        assert not reply.ok or reply.message.capacity_bytes >= grown
        if sure and known.exists is not None and self._ground.exporting and not self._ground.in_flight():
            limit = max(before, self._rounded(call.size) if call.size > before else 0)
            shrink = call.odd and call.size < limit
            self._caller.expect(reply, Code.NOT_FOUND if not known.exists else Code.OUT_OF_RANGE if shrink else Code.OK)
        return reply

    def _learn(self, known: Known) -> None:
        """The size after a growth that may have gone wrong."""
        size_bytes = self._ground.sizes().get(known.volume_id)
        if known.exists and size_bytes is not None:
            assert size_bytes >= known.size_bytes
            known.size_bytes = size_bytes

    def _list(self, call: Call, sure: bool) -> Reply:
        page = 1 if call.odd else 0
        found: dict[str, Any] = {}
        token = ""
        for _ in range(len(self._volumes) + 1):
            reply = self._caller.call(pb.ListVolumesRequest(max_entries=page, starting_token=token), sure=sure)
            if not reply.ok:
                return reply
            found |= {entry.volume.volume_id: entry for entry in reply.message.entries}
            token = reply.message.next_token
            if not token:
                break
        if sure:
            for known in self._volumes:
                listed = known.volume_id in found
                assert known.exists is None or known.exists == listed, f"{known.name} listed: {listed}"
                if listed and known.exists is None:
                    known.size_bytes = found[known.volume_id].volume.capacity_bytes  # of a creation that was killed
                known.exists = listed
                if listed:
                    nodes = set(found[known.volume_id].status.published_node_ids)
                    for index, published in known.published.items():
                        assert not published.sure or self._ground.nodes[index].node_id in nodes
            assert found.keys() == self._ground.sizes().keys()
        return reply

    def _get(self, call: Call, sure: bool) -> Reply:
        known = self._volumes[call.volume]
        reply = self._caller.call(pb.ControllerGetVolumeRequest(volume_id=known.volume_id), sure=sure)
        if sure and known.exists is not None:
            self._caller.expect(reply, Code.OK if known.exists else Code.NOT_FOUND)
        if sure and known.exists:
            assert known.may_have_grown or reply.message.volume.capacity_bytes == known.size_bytes
        return reply

    def _validate(self, call: Call, sure: bool) -> Reply:
        known = self._volumes[call.volume]
        reply = self._caller.call(
            pb.ValidateVolumeCapabilitiesRequest(
                volume_id=known.volume_id, volume_capabilities=[CAPABILITIES[call.way]]
            ),
            sure=sure,
        )
        if sure and known.exists is not None:
            self._caller.expect(reply, Code.OK if known.exists else Code.NOT_FOUND)
        if reply.ok:
            assert reply.message.HasField("confirmed") == (call.way not in UNSUPPORTED)
        return reply

    def _capacity(self, call: Call, sure: bool) -> Reply:
        reply = self._caller.call(pb.GetCapacityRequest(volume_capabilities=[CAPABILITIES[call.way]]), sure=sure)
        if sure:
            self._caller.expect(reply, Code.OK)
        return reply

    def _probe(self, call: Call, sure: bool) -> Reply:
        for request in (
            pb.GetPluginInfoRequest(), pb.GetPluginCapabilitiesRequest(), pb.ControllerGetCapabilitiesRequest()
        ):  # fmt: skip
            assert self._caller.call(request, sure=sure).ok or not sure
        return self._caller.call(pb.ProbeRequest(), sure=sure)

    def _rounded(self, size_bytes: int) -> int:
        unit = self._ground.unit_bytes
        return -(-size_bytes // unit) * unit


def _says(context: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in context.items() if key != "sealed"}


def _mode(way: str) -> tuple[int, bool]:
    capability = CAPABILITIES[way]
    return capability.access_mode.mode, capability.HasField("block")
