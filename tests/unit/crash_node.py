"""The requests, the sweep and the start of a CNODE, to be killed at each step; and those of its SNODE beside it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from google.protobuf.message import Message

from csi.connectors.unstick import Unstick
from csi.fs import grow
from csi.model import volume_id_of
from csi.pb import csi_pb2 as pb
from csi.run import Boundary, no_boundary
from tests.fakes.iscsi import FakeIscsi
from tests.lab import invariants
from tests.model.patience import Steps
from tests.model.world import World
from tests.rpc.service import block, mount
from tests.unit.crash_looks import folder_of, look_at_cnode, look_at_snode
from tests.unit.crash_points import Case, Ground, after, killed
from tests.unit.snode import soon

Act = Callable[["WorldGround"], object]
VOLUME = volume_id_of("a")
MIB = 1 << 20
SIZE_BYTES = {"xfs": 300 * MIB, "btrfs": 128 * MIB}


class Refused(Exception):
    """What an RPC ended with."""


class _Steps(Steps):
    """A boundary of the world that is one of ours. What a program does is no step of the driver."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self._boundary = boundary

    def __call__(self, name: str) -> None:
        if not name.endswith(":runs"):
            self._boundary(name)


class WorldGround:
    """One SNODE and a CNODE, for all kills of a case. See Ground for `act`."""

    def __init__(self, world: World, capability: pb.VolumeCapability, before: Act, act: Act, *, snode: bool) -> None:
        """snode: it is the SNODE's service that is killed, not the CNODE's."""
        self.world = world
        self.node = world.nodes[0]
        self.capability = capability
        self.context: dict[str, str] = {}
        self.until_end = ExitStack()  # patches of this life of the volume
        self.boundary: Boundary = no_boundary
        self._before = before
        self._act = act
        self._snode = snode

    def begin(self) -> None:
        """See Ground."""
        self._before(self)

    def start(self, boundary: Boundary) -> None:
        """See Ground."""
        self.boundary = boundary
        if self._snode:
            self.world.steps = _Steps(boundary)
            self.world.start()
        else:
            self.node.steps = _Steps(boundary)
            self.node.runner.boundary = self.node.steps
            self.node.start()

    def act(self) -> None:
        """See Ground."""
        self._act(self)

    def tend(self) -> None:
        """See Ground."""
        self.world.tend()
        self.node.tend()

    def state(self) -> object:
        """See Ground."""
        self.tend()
        self.check()
        node = self.node
        mounts = [(str(path.relative_to(node.root)), node.mounts.at(path)) for path in node.mounts.mount_points()]
        images = {path.stem: (path.stat().st_size, self.contents(path)) for path in self.world.images().values()}
        kept = {name: node.records.read(name) or {} for name in node.records.names()}
        records = {name: (sorted(of["staged"]), sorted(of["targets"])) for name, of in kept.items() if "staged" in of}
        states = [node.initiator.alive(number) for number in node.initiator.sessions]
        shown = sorted((path, seen.fs_type, seen.readonly) for path, seen in mounts if seen is not None)
        return shown, images, records, states, folder_of(node), len(self.world.publications.all())

    def check(self) -> None:
        """The invariants of the lab, and that no filesystem was made over data."""
        world = self.world
        world.look()
        seen = look_at_snode(
            world.tgtd,
            world.publications,
            volumes={name: path.stat().st_size for name, path in world.images().items()},
            tags={name: "snode.name=" if path.with_suffix(".json").exists() else ""
                  for name, path in world.images().items()},
        )  # fmt: skip
        assert invariants.problems_of(seen, [look_at_cnode(node) for node in world.nodes]) == []
        assert (world.violations, world.tgtd.unexpected, self.node.mounts.formatted_over) == ([], [], [])
        assert world.tracebacks == [] and world.strays() == []

    def end(self) -> None:
        """See Ground."""
        self.until_end.close()
        for path in self.node.mounts.mount_points():
            if path.parent.name == "pods":
                self.call(pb.NodeUnpublishVolumeRequest(volume_id=VOLUME, target_path=str(path)))
        for name in ("s", "s2"):
            unstage(self, name)
        unpublish(self)
        delete(self)
        shutil.rmtree(self.node.root)
        self.node.root.mkdir()
        self.node.records.remove("formatted")
        world, node = self.world, self.node
        assert (world.images(), world.strays(), world.publications.all()) == ({}, [], [])
        assert (world.tgtd.targets, world.tgtd.accounts) == ({}, {})
        assert (node.initiator.leftovers(), node.mounts.mount_points(), node.records.names()) == ([], [], ["key"])

    # -- for the cases -------------------------------------------------------------------------------------------

    def call(self, request: Message) -> Any:
        """Run an RPC on the machine it is for; it must succeed."""
        name = type(request).__name__
        on_node = name.startswith("Node")
        reply = self.world.call(request, node=self.node if on_node else None)
        if not reply.ok:
            raise Refused(f"{name}: {reply.code.name}: {reply.details}")
        return reply.message

    @property
    def size_bytes(self) -> int:
        """The smallest size for the filesystem."""
        return SIZE_BYTES.get(self.capability.mount.fs_type, 16 * MIB)

    def path(self, name: str) -> Path:
        """A path below the folder where volumes are mounted."""
        return self.node.root / name

    def contents(self, image: Path) -> tuple[str, list[str]]:
        """The filesystem on a volume, and what an application has written."""
        found = self.node.mounts.on(str(image))
        return found.signature, list(getattr(found, "records", []))


# -- requests --------------------------------------------------------------------------------------------------------


def create(ground: WorldGround) -> None:
    ground.call(
        pb.CreateVolumeRequest(
            name="a",
            capacity_range=pb.CapacityRange(required_bytes=ground.size_bytes),
            volume_capabilities=[ground.capability],
        )
    )


def publish(ground: WorldGround, *, readonly: bool = False) -> None:
    request = pb.ControllerPublishVolumeRequest(
        volume_id=VOLUME, node_id=ground.node.node_id, volume_capability=ground.capability, readonly=readonly
    )
    ground.context = dict(ground.call(request).publish_context)


def stage(ground: WorldGround, name: str = "s") -> None:
    request = pb.NodeStageVolumeRequest(
        volume_id=VOLUME,
        publish_context=ground.context,
        staging_target_path=str(ground.path(name)),
        volume_capability=ground.capability,
    )
    ground.call(request)


def node_publish(ground: WorldGround, name: str = "t", *, readonly: bool = False) -> None:
    request = pb.NodePublishVolumeRequest(
        volume_id=VOLUME,
        staging_target_path=str(ground.path("s")),
        target_path=str(ground.path(f"pods/{name}")),
        volume_capability=ground.capability,
        readonly=readonly,
    )
    ground.call(request)


def node_unpublish(ground: WorldGround) -> None:
    ground.call(pb.NodeUnpublishVolumeRequest(volume_id=VOLUME, target_path=str(ground.path("pods/t"))))


def unstage(ground: WorldGround, name: str = "s") -> None:
    ground.call(pb.NodeUnstageVolumeRequest(volume_id=VOLUME, staging_target_path=str(ground.path(name))))


def unpublish(ground: WorldGround) -> None:
    ground.call(pb.ControllerUnpublishVolumeRequest(volume_id=VOLUME, node_id=ground.node.node_id))


def expand(ground: WorldGround) -> None:
    size = pb.CapacityRange(required_bytes=2 * ground.size_bytes)
    ground.call(pb.ControllerExpandVolumeRequest(volume_id=VOLUME, capacity_range=size))


def node_expand(ground: WorldGround) -> None:
    request = pb.NodeExpandVolumeRequest(
        volume_id=VOLUME,
        volume_path=str(ground.path("pods/t")),
        capacity_range=pb.CapacityRange(required_bytes=2 * ground.size_bytes),
    )
    ground.call(request)


def delete(ground: WorldGround) -> None:
    ground.call(pb.DeleteVolumeRequest(volume_id=VOLUME))


def tend(ground: WorldGround) -> None:
    """All that the background of the CNODE has to do."""
    ground.node.tend()


def free_sessions(ground: WorldGround) -> None:
    """A thread of its own does so."""

    def stop(_number: int) -> None:
        ground.until_end.close()  # it comes back
        ground.node.look()

    unstick = Unstick(sysfs=ground.node.initiator.sysfs, stop=stop, boundary=ground.boundary)
    for _ in range(2):
        unstick.turn(soon())


def failed_stage(ground: WorldGround, trouble: "Trouble") -> None:
    """Something is wrong at the first try, and well at the second."""
    with trouble(ground), suppress(Refused):
        stage(ground)
    stage(ground)


def failed_node_publish(ground: WorldGround) -> None:
    """A folder on the way to the target is renamed at the very moment of the mount."""
    with renamed_folder(ground), suppress(Refused):
        node_publish(ground)
    node_publish(ground)


# -- troubles --------------------------------------------------------------------------------------------------------

Trouble = Callable[["WorldGround"], AbstractContextManager[object]]


@contextmanager
def wrong_secret(ground: WorldGround) -> Iterator[None]:
    """The target does not take the node's CHAP secret."""
    accounts = dict(ground.world.tgtd.accounts)
    ground.world.tgtd.accounts.update(dict.fromkeys(accounts, "another-secret"))
    try:
        yield
    finally:
        ground.world.tgtd.accounts.update(accounts)


@contextmanager
def lost_at_once(ground: WorldGround) -> Iterator[None]:
    """The connection breaks as soon as it stands."""
    initiator = ground.node.initiator
    real = initiator.make_session

    def make_session(target: str) -> None:
        real(target)
        initiator.connected = False

    with mock.patch.object(initiator, "make_session", make_session):
        try:
            yield
        finally:
            initiator.connected = True


def no_disk(ground: WorldGround) -> AbstractContextManager[object]:
    """No scan finds a disk."""
    return mock.patch.object(ground.node.initiator, "scan", lambda _session: None)


@contextmanager
def renamed_folder(ground: WorldGround) -> Iterator[None]:
    """A folder on the way to the staging path is renamed at the very moment of the mount."""
    ground.path("elsewhere").mkdir(exist_ok=True)
    ground.node.mounts.astray = ground.path("elsewhere")
    try:
        yield
    finally:
        ground.node.mounts.astray = None


# -- what was there before -------------------------------------------------------------------------------------------


def asked_otherwise(capability: pb.VolumeCapability) -> Act:
    """A stage with another capability was killed before it had attached anything."""

    def stage_otherwise(ground: WorldGround) -> None:
        ground.capability, wanted = capability, ground.capability
        killed(stage, "record:after")(ground)
        ground.capability = wanted

    return stage_otherwise


def write(ground: WorldGround) -> None:
    """An application writes a record."""
    assert ground.node.write(ground.path("pods/t"), "a.1.1")


def never_started(ground: WorldGround) -> None:
    """The CNODE has no state folder, and so not its key."""
    shutil.rmtree(ground.node._state)


def record_lost(ground: WorldGround) -> None:
    ground.node.records.remove(VOLUME)


def reboot(ground: WorldGround) -> None:
    """The CNODE."""
    ground.node.power(up=False)
    ground.node.power(up=True)


def logged_out_by_hand(ground: WorldGround) -> None:
    """Under a mounted filesystem, which iscsiadm does not mind."""
    for number in list(ground.node.initiator.sessions):
        ground.node.initiator._end_session(number)


def session_dead(ground: WorldGround) -> None:
    """The session does not come back, whatever iscsid tries."""
    initiator = ground.node.initiator
    (number,) = initiator.sessions
    real = initiator.alive
    ground.until_end.enter_context(mock.patch.object(initiator, "alive", lambda other: other != number and real(other)))


def stuck_session(ground: WorldGround) -> None:
    """The kernel refuses every connection until it is asked to stop the one that is no more."""
    session_dead(ground)
    ground.node.look()
    (session,) = ground.node.initiator.sessions.values()
    name = f"connection{session.number}:0"
    folder = session.folder / name / "iscsi_connection" / name
    folder.mkdir(parents=True)
    (folder / "state").write_text("failed\n")


def no_disk_at_first(ground: WorldGround) -> None:
    """The first scan of a session finds a LUN that is no disk."""
    initiator = ground.node.initiator
    scanned: set[int] = set()

    def scan(session: Any) -> None:
        initiator.look()
        lun = initiator.targets[session.target].lun
        assert lun is not None
        lun.kind = "0" if session.number in scanned else "31"
        scanned.add(session.number)
        FakeIscsi.scan(initiator, session)
        initiator.look()

    ground.until_end.enter_context(mock.patch.object(initiator, "scan", scan))


def without_cap_sys_resource(ground: WorldGround) -> None:
    """The kernel does not let this process grow a mounted ext4."""
    ground.until_end.enter_context(mock.patch.object(grow, "may_grow_mounted_ext4", lambda: False))


def mkfs_killed(ground: WorldGround) -> None:
    """mkfs.xfs ended before it was done."""
    ground.node.mounts.unfinished = {str(image) for image in ground.world.images().values()}


# -- cases -----------------------------------------------------------------------------------------------------------

_WAYS = {"mount": mount(), "block": block(), "xfs": mount(fs_type="xfs"), "btrfs": mount(fs_type="btrfs")}


@contextmanager
def _ground(way: str, before: Act, act: Act, *, snode: bool) -> Iterator[Ground]:
    world = World()
    try:
        with world.tgtd.in_process():
            yield WorldGround(world, _WAYS[way], before, act, snode=snode)
    finally:
        world.close()


def _case(way: str, request: str, name: str, before: Act, act: Act, *, snode: bool = False) -> Case:
    return Case(request, ", ".join(filter(None, (name, way))), partial(_ground, way, before, act, snode=snode))


def _life(way: str) -> Iterator[Case]:
    """What a CNODE does on the whole way of a volume."""
    case = partial(_case, way)
    granted = after(create, publish)
    staged = after(granted, stage)
    in_use = after(staged, node_publish, write)
    left = after(in_use, node_unpublish, unstage)
    yield case("NodeStageVolume", "new", granted, stage)
    yield case("NodeExpandVolume", "", after(in_use, expand), node_expand)
    yield case("NodeStageVolume", "grown meanwhile", after(left, expand), stage)
    if way in ("mount", "block"):  # the rest is alike for all filesystems
        yield case("NodeStageVolume", "existing", left, stage)
        yield case("NodePublishVolume", "", staged, node_publish)
        yield case("NodeUnpublishVolume", "", in_use, node_unpublish)
        yield case("NodeUnstageVolume", "", after(in_use, node_unpublish), unstage)


def _on_snode() -> Iterator[Case]:
    """What its SNODE does, while the CNODE is there: by RPC, with sessions that live and data that is written."""
    case = partial(_case, "mount", snode=True)
    granted = after(create, publish)
    in_use = after(granted, stage, node_publish, write)
    left = after(in_use, node_unpublish, unstage)
    yield case("CreateVolume", "", nothing, create)
    yield case("ControllerPublishVolume", "", create, publish)
    yield case("ControllerExpandVolume", "in use", in_use, expand)
    yield case("ControllerUnpublishVolume", "in use", in_use, unpublish)
    yield case("DeleteVolume", "", after(left, unpublish), delete)


def _rare() -> Iterator[Case]:
    """What is done in rare situations only."""
    case = partial(_case, "mount")
    granted = after(create, publish)
    staged = after(granted, stage)
    in_use = after(staged, node_publish, write)
    left = after(in_use, node_unpublish, unstage)
    read = partial(publish, readonly=True)
    renewed = after(unpublish, publish)
    yield case("start", "the very first", after(create, never_started), after(publish, stage))
    yield case("start", "after a reboot", after(in_use, reboot), tend)
    for way, other in (("mount", mount(fs_type="ext4")), ("block", block("SINGLE_NODE_SINGLE_WRITER"))):
        yield _case(way, "NodeStageVolume", "asked otherwise before", after(granted, asked_otherwise(other)), stage)
    yield case("NodeStageVolume", "killed after mkfs", after(granted, killed(stage, "mkfs.ext4:after")), stage)
    yield case("NodeStageVolume", "killed with a secret", after(granted, killed(stage, "node-record:written")), stage)
    yield case("start", "stage killed", after(granted, killed(stage, "node-record:written")), tend)
    yield case("background", "stuck session", after(in_use, stuck_session), free_sessions)
    yield case("start", "unstage killed", after(staged, killed(unstage, "iscsiadm:after")), tend)
    yield case("NodeStageVolume", "read-only", after(left, unpublish, read), stage)
    yield case("NodeStageVolume", "at a second path", after(left, stage), partial(stage, name="s2"))
    yield case("NodeStageVolume", "old session", after(left, killed(stage, "attribute_helper:after"), renewed), stage)
    yield case(
        "NodeStageVolume", "dead session", after(granted, killed(stage, "attribute_helper:after"), session_dead), stage
    )
    yield case("NodeStageVolume", "logged out by hand", after(staged, logged_out_by_hand), stage)
    yield case("NodeStageVolume", "no disk at first", after(granted, no_disk_at_first), stage)
    for trouble in (wrong_secret, lost_at_once, no_disk, renamed_folder):
        name = trouble.__name__.replace("_", " ")
        yield case("NodeStageVolume", name, granted, partial(failed_stage, trouble=trouble))
    grown = after(left, expand, without_cap_sys_resource)
    yield case("NodeStageVolume", "grown, without CAP_SYS_RESOURCE", grown, stage)
    yield _case("xfs", "NodeStageVolume", "mkfs killed", after(granted, mkfs_killed), stage)
    yield case("NodePublishVolume", "read-only", staged, partial(node_publish, readonly=True))
    yield case("NodePublishVolume", "renamed folder", staged, failed_node_publish)
    yield case("NodeUnpublishVolume", "record lost", after(in_use, record_lost), after(node_unpublish, unstage))
    second = partial(stage, name="s2")
    yield case("NodeUnstageVolume", "one of two", after(staged, second), partial(unstage, name="s2"))


def nothing(_ground: WorldGround) -> None:
    """No volume."""


def cases() -> list[Case]:
    """All of them."""
    return [*(case for way in _WAYS for case in _life(way)), *_on_snode(), *_rare()]
