"""The requests and the background work of a SNODE, to be killed at each step: on files and on a fake LVM."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc

from csi.errors import DriverError, Timeout
from csi.model import TARGET_PREFIX, AccessMode, Capability, volume_id_of
from csi.pb import csi_pb2 as pb
from csi.rpc.method import Calls
from csi.run import Boundary, no_boundary
from csi.services.controller import Controller
from tests.fakes.lvm import FakeLvm
from tests.fakes.tgt import FakeTarget, FakeTgtd
from tests.lab import invariants
from tests.unit.backends.rig import EXT4
from tests.unit.crash_looks import look_at_snode
from tests.unit.crash_points import Case, Ground, after, killed, scratch
from tests.unit.snode import MIB, WRITER, Snode, soon

Act = Callable[["SnodeGround"], object]
VOLUME = volume_id_of("a")
SIZE_BYTES = 2 * MIB
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)


class SnodeGround:
    """A SNODE, made anew for each kill. `act`: see Ground."""

    def __init__(self, folder: Path, tgtd: FakeTgtd, kind: str, before: Act, act: Act) -> None:
        self._folder = folder
        self._kind = kind
        self._before = before
        self._act = act
        self._number = 0
        self.tgtd = tgtd
        self.boundary: Boundary = no_boundary

    def begin(self) -> None:
        """See Ground."""
        self._number += 1
        self.snode = Snode(self._folder / str(self._number), self.tgtd, kind=self._kind)
        self._before(self)

    def start(self, boundary: Boundary) -> None:
        """See Ground."""
        self.boundary = boundary
        self.tgtd.forgive()  # troubles of a moment do not last beyond a start
        for target in list(self.tgtd.targets.values()):
            self.tgtd.drain(target.name)
        self.snode.start(boundary)

    def act(self) -> None:
        """See Ground."""
        self._act(self)

    def tend(self) -> None:
        """See Ground."""
        self.snode.volumes.tend(soon())

    def state(self) -> object:
        """See Ground."""
        snode = self.snode
        snode.settle()
        self.check()
        page = snode.volumes.list_volumes(starting_token="", max_entries=0, deadline=soon())
        entries = [
            (e.volume.volume_id, e.volume.size_bytes, e.volume.blank, len(e.node_ids)) for e in page.entries
        ]  # the nodes' keys differ, so only their number counts
        return entries, len(snode.targets()), {Path(name).suffix for name in snode.files()}, len(snode.files())

    def check(self) -> None:
        """The invariants of the lab, and that every volume has its record."""
        snode = self.snode
        tags = {f"{name}": f"snode.name={name}" for name in snode.volumes_there()}
        if snode.lvm is not None:
            tags = {name: ",".join(snode.lvm.lvs[name].tags) for name in tags}
        seen = look_at_snode(self.tgtd, snode.publications, volumes=snode.volumes_there(), tags=tags,
                             notes=frozenset(name.removesuffix(".json") for name in snode.notes()))  # fmt: skip
        assert invariants.problems_of(seen, []) == []
        assert self.tgtd.unexpected == [] and self.tgtd.state == "ready"

    def end(self) -> None:
        """See Ground."""
        snode = self.snode
        snode.unpublish_all()
        for entry in snode.volumes.list_volumes(starting_token="", max_entries=0, deadline=soon()).entries:
            snode.volumes.delete(entry.volume.volume_id, soon())
        snode.settle()
        snode.volumes.tend(soon())
        left = {name for name in snode.files() if not name.endswith(".damaged")}
        assert (left, snode.targets(), self.tgtd.accounts) == (set(), set(), {})
        assert snode.lvm is None or snode.lvm.stale or not snode.lvm.dirty

    # -- for the cases -------------------------------------------------------------------------------------------

    @property
    def lvm(self) -> FakeLvm:
        """The fake LVM of a pool that has one."""
        assert self.snode.lvm is not None
        return self.snode.lvm

    def device(self) -> Path:
        """What the volume's data is in, deleted or not."""
        name = next(name for name in self.snode.volumes_there() if name == VOLUME or name.startswith("trash-"))
        return self.lvm.device(name) if self.snode.lvm else self.snode.pool / f"{name}.img"

    def target(self) -> FakeTarget:
        """The volume's only target."""
        (target,) = (target for target in self.tgtd.targets.values() if f":{VOLUME}:" in target.name)
        return target


# -- requests --------------------------------------------------------------------------------------------------------


def create(ground: SnodeGround) -> None:
    ground.snode.create("a", size_bytes=SIZE_BYTES)


def publish(ground: SnodeGround, *, capability: Capability = WRITER) -> None:
    ground.snode.publish(VOLUME, capability=capability)


def create_to_be_taken(ground: SnodeGround) -> None:
    """A volume that another node may take from one that has fallen silent."""
    ground.snode.volumes.create(
        name="a", required_bytes=SIZE_BYTES, limit_bytes=0, capabilities=[WRITER], parameters={"takeover": "15s"},
        requisite=[], deadline=soon(),
    )  # fmt: skip


def take_over(ground: SnodeGround) -> None:
    """Publish to another node, the holder being silent."""
    snode = ground.snode
    snode.export.idle_seconds = lambda publication: (  # type: ignore[method-assign]  # the test says how long a node is silent
        60.0 if publication.node.name == snode.node.name else 0.0
    )
    snode.publish(VOLUME, snode.other)


def unpublish(ground: SnodeGround) -> None:
    ground.snode.unpublish(VOLUME, ground.snode.node)


def expand(ground: SnodeGround) -> None:
    ground.snode.volumes.expand(VOLUME, required_bytes=2 * SIZE_BYTES, limit_bytes=0, deadline=soon())


def expand_on_a_slow_disk(ground: SnodeGround) -> None:
    """Commands of the node are in flight for longer than the request may last."""
    (session,) = ground.target().sessions or [
        ground.tgtd.add_session(ground.target().name, ground.snode.node.initiator)
    ]
    session.in_flight = True
    with suppress(Timeout):
        expand(ground)
    ground.tgtd.drain(ground.target().name)
    expand(ground)


def delete(ground: SnodeGround) -> None:
    ground.snode.volumes.delete(VOLUME, soon())


def tend(ground: SnodeGround) -> None:
    """All that the background has to do."""
    ground.snode.settle()
    ground.snode.volumes.tend(soon())


def tend_while_tgtd_fails(ground: SnodeGround) -> None:
    """In the middle of a restoration, once."""
    ground.tgtd.forgive()
    ground.tgtd.fail("target-show", nth=2)
    with suppress(DriverError):
        ground.snode.volumes.reconcile(soon())
    ground.tgtd.forgive()
    tend(ground)


def tend_while_a_disk_is_gone(ground: SnodeGround) -> None:
    ground.lvm.gone.add("/dev/sdb")
    tend(ground)
    ground.lvm.gone.clear()
    ground.start(ground.boundary)  # it would not look again at once
    tend(ground)


def get_capacity(ground: SnodeGround) -> None:
    controller = Controller(calls=Calls(), volumes=ground.snode.volumes)
    context = cast(grpc.ServicerContext, SimpleNamespace(time_remaining=lambda: 20.0))
    assert controller.GetCapacity(pb.GetCapacityRequest(), context).available_capacity > 0


# -- what was there before -------------------------------------------------------------------------------------------


def nothing(ground: SnodeGround) -> None:
    """No volume is there, but the pool was in use before."""
    create(ground)
    delete(ground)
    tend(ground)


def never_started(ground: SnodeGround) -> None:
    for folder in (ground.snode.pool, ground.snode.state):
        shutil.rmtree(folder, ignore_errors=True)


def login(ground: SnodeGround) -> None:
    """The node has a session."""
    ground.tgtd.add_session(ground.target().name, ground.snode.node.initiator)


def write_filesystem(ground: SnodeGround) -> None:
    """What a node leaves on the volume."""
    with ground.device().open("r+b") as file:
        file.seek(1024)
        file.write(EXT4)


def fill(ground: SnodeGround) -> None:
    """The volume is full of data."""
    ground.device().write_bytes(os.urandom(SIZE_BYTES))


def second_volume(ground: SnodeGround) -> None:
    """Published to the other node: the restoration of several targets shuts tgtd."""
    ground.snode.publish(ground.snode.create("b", size_bytes=SIZE_BYTES).volume_id, ground.snode.other)


def stray_target(ground: SnodeGround) -> None:
    """A target of the volume that no record knows, with a session."""
    name = f"{TARGET_PREFIX}:{VOLUME}:00000000000000ff"
    ground.tgtd.targets[77] = FakeTarget(77, name, names=["iqn.2000-01.x:y"])
    ground.tgtd.add_session(name, "iqn.2000-01.x:y")


def foreign_session(ground: SnodeGround) -> None:
    ground.tgtd.add_session(ground.target().name, "iqn.2000-01.x:y")


def strange_rule(ground: SnodeGround) -> None:
    """A rule that somebody made by hand, which tgtd would misread if it were told to remove it."""
    ground.target().names.append("iqn.2000-01.x:y,z")


def wrong_target(ground: SnodeGround) -> None:
    ground.target().luns[1].scsi_id = "naa.61"


def old_account(ground: SnodeGround) -> None:
    """tgtd was restarted, and has an account of the publication with another secret."""
    (publication,) = ground.snode.publications.all()
    ground.tgtd.restart()
    ground.tgtd.accounts[publication.chap.user] = "another-secret"


def unused_account(ground: SnodeGround) -> None:
    ground.tgtd.accounts["n0123456789abcdef"] = "another-secret"


def tgtd_offline(ground: SnodeGround) -> None:
    ground.tgtd.state = "offline"


def tgtd_restarted(ground: SnodeGround) -> None:
    ground.tgtd.restart()


def damaged_record(ground: SnodeGround) -> None:
    (path,) = (ground.snode.state / "publications").glob("*.json")
    path.write_text("{")


def image_cut(ground: SnodeGround) -> None:
    """Nobody can tell what is on the volume."""
    os.truncate(ground.device(), 0)


def inactive(ground: SnodeGround) -> None:
    """As after a boot of the SNODE."""
    ground.lvm.reboot()


def parts_left(ground: SnodeGround) -> None:
    """A killed activation left parts of the volume active."""
    ground.lvm.reboot()
    stem = f"vg0-{VOLUME.replace('-', '--')}"
    ground.lvm.lvs[VOLUME].legs = [f"{stem}_rimage_0", f"{stem}_rmeta_0"]


def pool_parts_left(ground: SnodeGround) -> None:
    """Likewise, of the thin pool."""
    ground.lvm.reboot()
    ground.lvm.lvs["tp"].legs = ["vg0-tp_tdata", "vg0-tp_tmeta"]


def lost_leg(ground: SnodeGround) -> None:
    """A RAID leg had a write error."""
    ground.lvm.drop_leg(ground.device().name)


def old_data(ground: SnodeGround) -> None:
    """A new volume gets extents with an old filesystem on them."""
    ground.lvm.stale = bytes(1024) + bytes(EXT4)


def lvcreate_stops(ground: SnodeGround) -> None:
    """LVM commits a new volume, and ends before it has removed old signatures and activated it."""
    old_data(ground)
    ground.lvm.midway.add("lvcreate")


def half_made(ground: SnodeGround) -> None:
    """The driver was killed in lvcreate, and LVM with it."""
    lvcreate_stops(ground)
    killed(create, "lvcreate:after")(ground)
    ground.lvm.midway.clear()


def half_grown(ground: SnodeGround) -> None:
    """The driver was killed in lvextend, and LVM with it: the device is suspended, of the old size."""
    ground.lvm.midway.add("lvextend")
    killed(expand, "lvextend:after")(ground)
    ground.lvm.midway.clear()


# -- cases -----------------------------------------------------------------------------------------------------------


@contextmanager
def _ground(kind: str, before: Act, act: Act) -> Iterator[Ground]:
    with scratch() as folder:
        tgtd = FakeTgtd(folder / "tgtd.0")
        tgtd.start()
        try:
            with tgtd.in_process():
                yield SnodeGround(folder, tgtd, kind, before, act)
        finally:
            tgtd.stop()


def _case(kind: str, request: str, name: str, before: Act, act: Act) -> Case:
    return Case(request, f"{name} on {kind}".strip(), partial(_ground, kind, before, act))


def _on_any(kind: str) -> Iterator[Case]:
    """What every kind of pool does."""
    case = partial(_case, kind)
    written = after(create, publish, login, write_filesystem)
    yield case("CreateVolume", "", nothing, create)
    yield case("DeleteVolume", "", create, delete)
    yield case("ControllerExpandVolume", "published", after(create, publish, login), expand)
    if kind in ("files", "lvm"):  # the rest is alike in all volume groups
        yield case("start", "the very first", never_started, create)
        yield case("ControllerPublishVolume", "", create, publish)
        yield case("ControllerPublishVolume", "block", create, partial(publish, capability=BLOCK))
        yield case("ControllerPublishVolume", "data is seen", after(create, write_filesystem), publish)
        yield case("ControllerUnpublishVolume", "", after(create, publish, login), unpublish)
        yield case("ControllerUnpublishVolume", "data is seen", written, unpublish)
        yield case("background", "data is seen", written, tend)


def _on_tgtd() -> Iterator[Case]:
    """What only tgtd, or the records of publications, give rise to."""
    case = partial(_case, "files")
    published, both = after(create, publish), after(create, publish, second_volume)
    yield case(
        "ControllerPublishVolume", "unpublish killed", after(published, killed(unpublish, "record:after")), publish
    )
    yield case("ControllerPublishVolume", "stray target", after(create, stray_target), publish)
    yield case("ControllerPublishVolume", "takeover", after(create_to_be_taken, publish, login), take_over)
    yield case("ControllerPublishVolume", "wrong target", after(published, wrong_target), publish)
    yield case(
        "ControllerPublishVolume", "growth killed", after(published, killed(expand, "image-size:after")), publish
    )
    yield case("ControllerPublishVolume", "old account", after(published, old_account), publish)
    yield case("ControllerExpandVolume", "tgtd restarted", after(published, tgtd_restarted), expand)
    yield case("ControllerExpandVolume", "slow disk", after(published, login), expand_on_a_slow_disk)
    yield case("ControllerUnpublishVolume", "stray target", after(create, stray_target), unpublish)
    yield case("ControllerUnpublishVolume", "damaged record", after(published, damaged_record), unpublish)
    yield case("ControllerUnpublishVolume", "strange rule", after(published, strange_rule), unpublish)
    yield case("ControllerUnpublishVolume", "image cut", after(published, image_cut), unpublish)
    yield case("background", "tgtd restarted", after(both, tgtd_restarted), tend)
    yield case("background", "tgtd fails", after(both, tgtd_restarted), tend_while_tgtd_fails)
    yield case("background", "stray target", after(create, stray_target), tend)
    yield case("background", "foreign session", after(published, foreign_session), tend)
    yield case("background", "tgtd offline", after(published, tgtd_offline), tend)
    yield case("background", "unused account", after(published, unused_account), tend)
    yield case("background", "growth killed", after(published, killed(expand, "tgt:lun-reopen:before")), tend)


def _on_files() -> Iterator[Case]:
    """What only files have to sweep up."""
    case = partial(_case, "files")
    for name in ("record:written", "record:after", "image:made", "image-size:after"):
        yield case("CreateVolume", f"killed at {name}", after(nothing, killed(create, name)), create)
        yield case("start", f"creation killed at {name}", after(nothing, killed(create, name)), tend)
    for name in ("image-trash:renamed", "record-remove:after"):
        yield case("start", f"deletion killed at {name}", after(create, killed(delete, name)), tend)


def _on_lvm() -> Iterator[Case]:
    """What only LVM leaves behind or brings about."""
    case, mirror, thin = partial(_case, "lvm"), partial(_case, "mirror"), partial(_case, "thin")
    used = after(create, partial(publish, capability=BLOCK), unpublish)
    deleted = after(create, fill, delete)
    incomplete = after(old_data, killed(create, "lvcreate:after"))
    yield case("CreateVolume", "killed after lvcreate", incomplete, create)
    yield case("CreateVolume", "lvcreate killed too", half_made, create)
    yield mirror("CreateVolume", "lvcreate killed too", half_made, create)
    yield case("CreateVolume", "lvcreate stops", lvcreate_stops, create)
    yield thin("CreateVolume", "not active", inactive, create)
    yield thin("CreateVolume", "parts left", pool_parts_left, create)
    yield thin("GetCapacity", "not active", inactive, get_capacity)
    yield case("DeleteVolume", "used", used, delete)
    yield case("ControllerPublishVolume", "not active", after(create, inactive), publish)
    yield mirror("ControllerPublishVolume", "parts left", after(create, parts_left), publish)
    yield case("ControllerExpandVolume", "lvextend killed too", after(create, publish, half_grown), expand)
    yield thin("ControllerExpandVolume", "not active", after(create, inactive), expand)
    yield case("background", "killed before lvcreate", killed(create, "lvcreate:before"), tend)
    yield case("background", "killed after lvcreate", incomplete, tend)
    yield case("background", "deletion of a used one killed", after(used, killed(delete, "lvrename:after")), tend)
    yield case("background", "SNODE rebooted", after(create, publish, tgtd_restarted, inactive), tend)
    for a_pool in (case, mirror):
        yield a_pool("background", "wipe", deleted, tend)
    yield case("background", "wipe after a reboot", after(deleted, inactive), tend)
    yield case("background", "wipe killed", after(deleted, killed(tend, "lvremove:after")), tend)
    yield mirror("background", "wipe with a lost leg", after(deleted, lost_leg), tend)
    yield mirror("background", "wipe without a disk", deleted, tend_while_a_disk_is_gone)


def cases() -> list[Case]:
    """All of them."""
    common = [case for kind in ("files", "lvm", "thin", "mirror") for case in _on_any(kind)]
    return [*common, *_on_tgtd(), *_on_files(), *_on_lvm()]
