"""Random requests against the whole driver: each gets an answer, none a defect, and what they leave is on record."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi.model import volume_id_of
from csi.pb import csi_pb2 as pb
from csi.services.node import Node
from tests.model.book import MIB, NAMES
from tests.model.codes import ALLOWED
from tests.model.ground import Reply
from tests.model.world import World
from tests.rpc import test_fuzz
from tests.rpc.service import block, mount
from tests.rpc.use_cases import NODE_ID


class Stack:
    """A world, and the words of the random requests in it: the id of a volume, a node, paths below its root."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.node = world.nodes[0]
        self.ids = [volume_id_of(name) for name in ("one", NAMES[0])]
        self.contexts: dict[str, dict[str, str]] = {}
        self._words = {
            "v-" + "a" * 26: self.ids[0],
            "v-" + "b" * 26: self.ids[1],
            NODE_ID: self.node.node_id,
            "/staging/one": str(self.node.root / "staging" / "one"),
            "/target/one": str(self.node.root / "target" / "one"),
        }

    def call(self, request: Message) -> Reply:
        """Translate a request and make it."""
        self._translate(request)
        if isinstance(request, pb.NodeStageVolumeRequest) and not request.publish_context:
            request.publish_context.update(self.contexts.get(request.volume_id, {}))
        name = type(request).__name__.removesuffix("Request")
        reply = self.world.call(request, node=self.node if name in vars(Node) else None)
        assert reply.code in ALLOWED[name], f"{name}: {reply.code.name}: {reply.details}\n{self.world.tracebacks}"
        if isinstance(request, pb.ControllerPublishVolumeRequest) and reply.ok:
            self.contexts[request.volume_id] = dict(reply.message.publish_context)
        return reply

    def check(self) -> None:
        """What is there is on record, and what is on record is listed."""
        world = self.world
        assert not world.violations and not world.tgtd.unexpected
        world.tend()
        listed = {entry.volume.volume_id: entry for entry in self.call(pb.ListVolumesRequest()).message.entries}
        assert listed.keys() == world.images().keys()
        assert world.strays() == []
        records = world.publications.all()
        assert world.targets() == {record.target for record in records}
        published = {(volume_id, node) for volume_id in listed for node in listed[volume_id].status.published_node_ids}
        assert published == {(record.volume_id, record.node_id) for record in records}
        for point in self.node.mounts.mount_points():
            backing = self.node.backing(point)
            assert backing is not None and backing.stem in self.node.records.names()
        assert self.node.volumes() <= set(self.node.records.names())

    def clean(self) -> None:
        """Nothing is left when all is undone."""
        for point in reversed(self.node.mounts.mount_points()):
            backing = self.node.backing(point)
            assert backing is not None
            self._ok(pb.NodeUnpublishVolumeRequest(volume_id=backing.stem, target_path=str(point)))
        for volume_id in sorted(self.node.volumes() | (set(self.node.records.names()) - {"key", "formatted"})):
            path = str(self.node.root / "staging" / "one")
            self._ok(pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=path))
        for volume_id in sorted(self.world.images()):
            self._ok(pb.ControllerUnpublishVolumeRequest(volume_id=volume_id))
            self._ok(pb.DeleteVolumeRequest(volume_id=volume_id))
        self.check()
        assert (self.world.images(), self.world.targets(), self.node.initiator.leftovers()) == ({}, set(), [])

    def _ok(self, request: Message) -> None:
        reply = self.call(request)
        assert reply.ok, f"{type(request).__name__}: {reply.code.name}: {reply.details}"

    def _translate(self, message: Message) -> None:
        for field, value in list(message.ListFields()):
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                continue
            if isinstance(value, str):
                setattr(message, field.name, self._words.get(value, value))
            elif isinstance(value, Message):
                self._translate(value)
            elif field.message_type is not None:
                for part in value:
                    self._translate(part)


@contextmanager
def _stack() -> Iterator[Stack]:
    world = World()
    try:
        yield Stack(world)
    finally:
        world.close()


@st.composite
def _deep(draw: Callable[..., Any]) -> list[Message]:
    """The way of a volume to its mount, with random requests between its steps."""
    capability = draw(st.sampled_from([mount(), block(), mount(fs_type="xfs")]))
    volume_id, staging, target = "v-" + "a" * 26, "/staging/one", "/target/one"
    way: list[Message] = [
        pb.CreateVolumeRequest(
            name="one", volume_capabilities=[capability], capacity_range=pb.CapacityRange(required_bytes=320 * MIB)
        ),
        pb.ControllerPublishVolumeRequest(volume_id=volume_id, node_id=NODE_ID, volume_capability=capability),
        pb.NodeStageVolumeRequest(volume_id=volume_id, staging_target_path=staging, volume_capability=capability),
        pb.NodePublishVolumeRequest(
            volume_id=volume_id, staging_target_path=staging, target_path=target, volume_capability=capability
        ),
    ]
    between: st.SearchStrategy[list[Message]] = st.lists(test_fuzz.requests(), max_size=4)
    found: list[Message] = []
    for request in way[: draw(st.integers(0, len(way)))]:
        found += [request, *draw(between)]
    return [*found, *draw(st.lists(test_fuzz.requests(), max_size=10))]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(batch=_deep())
def test_no_request_finds_a_defect_in_the_whole(batch: list[Message]) -> None:
    with _stack() as stack:
        for request in batch:
            copy = type(request)()
            copy.CopyFrom(request)
            stack.call(copy)
        stack.check()
        stack.clean()
