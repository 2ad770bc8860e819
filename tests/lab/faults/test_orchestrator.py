"""What an orchestrator may do to a controller: repeat, contradict itself, ask for two things at once, for too much."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import pytest

from csi.model import DEFAULT_SIZE_BYTES
from csi.pb import csi_pb2 as pb
from tests.lab import invariants
from tests.lab.cluster import MIB, STAGING, TARGET, Cluster, Machine, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.oracle import Oracle
from tests.model.codes import ALLOWED

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Code = grpc.StatusCode
EXTENT = 4 * MIB
_MOST = (1 << 63) - 1


def code_of(call: Callable[[], object]) -> Code:
    """The status of a call."""
    error = refused(call)
    return Code.OK if error is None else error.code()


def create(
    cluster: Cluster,
    name: str = "one",
    *,
    required: int = 0,
    limit: int = 0,
    parameters: Mapping[str, str] | None = None,
) -> pb.Volume:
    """CreateVolume with both ends of its range."""
    request = pb.CreateVolumeRequest(
        name=name,
        capacity_range=pb.CapacityRange(required_bytes=required, limit_bytes=limit),
        volume_capabilities=[capability()],
        parameters=parameters or {},
    )
    volume: pb.Volume = cluster.snode.stubs["controller"].CreateVolume(request, timeout=120).volume
    return volume


def expand(cluster: Cluster, volume_id: str, *, required: int = 0, limit: int = 0) -> int:
    """ControllerExpandVolume with both ends of its range; the new size in bytes."""
    request = pb.ControllerExpandVolumeRequest(
        volume_id=volume_id, capacity_range=pb.CapacityRange(required_bytes=required, limit_bytes=limit)
    )
    answer = cluster.snode.stubs["controller"].ControllerExpandVolume(request, timeout=120)
    return int(answer.capacity_bytes)


def capacity(cluster: Cluster, pool: str) -> int:
    """GetCapacity of a pool, in bytes."""
    request = pb.GetCapacityRequest(parameters={"pool": pool})
    return int(cluster.snode.stubs["controller"].GetCapacity(request, timeout=60).available_capacity)


def sizes(cluster: Cluster) -> dict[str, int]:
    """The volumes that LVM has, and their sizes in bytes."""
    lines = cluster.snode.guest.sh("lvs --noheadings --units=b --nosuffix -o lv_name,lv_size").splitlines()
    rows = [line.split() for line in lines]
    return {name: int(size) for name, size in rows if name.startswith("v-")}


def listed(cluster: Cluster) -> set[str]:
    """The volumes that the driver has."""
    answer = cluster.snode.stubs["controller"].ListVolumes(pb.ListVolumesRequest(), timeout=60)
    return {entry.volume.volume_id for entry in answer.entries}


# -- sizes -----------------------------------------------------------------------------------------------------------


_SOAK = pytest.mark.soak


@pytest.mark.parametrize("pool", ["thick", pytest.param("thin", marks=_SOAK), pytest.param("mirror", marks=_SOAK)])
def test_sizes_that_can_not_be_had_are_out_of_range_and_others_are_rounded_up(cluster: Cluster, pool: str) -> None:
    def make(name: str, required: int, limit: int) -> pb.Volume:
        return create(cluster, name, required=required, limit=limit, parameters={"pool": pool})

    for required, limit in (
        (-1, 0), (0, -1), (8 * MIB, 4 * MIB), (5 * MIB, 6 * MIB), (_MOST, 0), (_MOST, _MOST), (0, 1), (0, EXTENT - 1),
    ):  # fmt: skip
        assert code_of(partial(make, "no", required, limit)) is Code.OUT_OF_RANGE, (required, limit)
    assert sizes(cluster) == {}
    expected = {
        (1, 0): EXTENT,
        (EXTENT, EXTENT): EXTENT,
        (EXTENT + 1, 0): 2 * EXTENT,
        (5 * MIB, 8 * MIB): 8 * MIB,
        (0, 6 * MIB): EXTENT,
        (5 * MIB, _MOST): 2 * EXTENT,
    }
    if pool == "thin":
        expected[0, 0] = DEFAULT_SIZE_BYTES
    for (required, limit), size in expected.items():
        volume = make("yes", required, limit)
        assert volume.capacity_bytes == size, (required, limit)
        assert sizes(cluster) == {volume.volume_id: size}, (required, limit)
        cluster.delete(volume.volume_id)


@pytest.mark.soak
def test_expand_to_the_same_a_smaller_and_twice_the_same_size(cluster: Cluster) -> None:
    volume_id = create(cluster, required=4 * EXTENT).volume_id
    for required, limit in ((4 * EXTENT, 0), (4 * EXTENT, 4 * EXTENT), (3 * EXTENT, 0), (1, 0), (0, 5 * EXTENT)):
        assert expand(cluster, volume_id, required=required, limit=limit) == 4 * EXTENT
    for required, limit in (
        (-1, 0), (5 * EXTENT, 4 * EXTENT), (4 * EXTENT + 1, 4 * EXTENT + 2), (_MOST, 0), (0, 3 * EXTENT),
    ):  # fmt: skip
        refusal = code_of(partial(expand, cluster, volume_id, required=required, limit=limit))
        assert refusal is Code.OUT_OF_RANGE, (required, limit)
    assert sizes(cluster) == {volume_id: 4 * EXTENT}
    for _ in range(2):
        assert expand(cluster, volume_id, required=4 * EXTENT + 1, limit=5 * EXTENT) == 5 * EXTENT
    for size in (6 * EXTENT, 6 * EXTENT, 5 * EXTENT):
        assert expand(cluster, volume_id, required=size) == 6 * EXTENT
    assert sizes(cluster) == {volume_id: 6 * EXTENT}
    cluster.delete(volume_id)


_ROOM = 8


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["thick", "thin", pytest.param("mirror", marks=_SOAK)])
def test_the_last_free_extent_can_be_had_and_the_one_after_it_can_not(cluster: Cluster, pool: str) -> None:
    snode = cluster.snode.guest
    parameters = {"pool": pool}
    cluster.delete(create(cluster, "warm", required=1, parameters=parameters).volume_id)
    cluster.leftovers()  # waits for its wipe
    fill(cluster, pool)

    def refused_for_space(call: Callable[[], object]) -> None:
        error = refused(call)
        assert error is not None
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert ("vg1" if pool == "mirror" else "vg0") in str(error.details())

    try:
        # The first of them by a look of the driver that does not know of this yet.
        room = None
        for _ in range(2):
            refused_for_space(lambda: create(cluster, "much", required=1 << 40, parameters=parameters))
            room = capacity(cluster, pool)
        assert room is not None
        if pool != "thin":
            assert 0 < room <= 2 * _ROOM * EXTENT
        refused_for_space(lambda: create(cluster, "more", required=room + 1, parameters=parameters))
        assert sizes(cluster) == {}
        volume_id = create(cluster, "less", required=room - EXTENT, parameters=parameters).volume_id
        refused_for_space(lambda: expand(cluster, volume_id, required=room + 1))
        assert sizes(cluster) == {volume_id: room - EXTENT}
        assert expand(cluster, volume_id, required=room) == room
        assert sizes(cluster) == {volume_id: room}
        refused_for_space(lambda: create(cluster, "more", required=1, parameters=parameters))
        assert capacity(cluster, pool) == 0
        assert sizes(cluster) == {volume_id: room}
        cluster.delete(volume_id)
    finally:
        snode.run("lvremove -y vg0/filler; for n in 1 2 3; do lvremove -y vg1/filler$n; done")


def fill(cluster: Cluster, pool: str) -> None:
    """Leave little free in a pool, by hand."""
    snode = cluster.snode.guest
    if pool == "thick":
        free = int(snode.sh("vgs --noheadings -o vg_free_count vg0"))
        snode.sh(f"lvcreate -q -an -Zn -Wn -l {free - _ROOM} -n filler vg0")
    if pool == "mirror":
        disks = snode.sh(
            "pvs --noheadings -o pv_name,pv_free,pv_pe_count,pv_pe_alloc_count -S vg_name=vg1"
        ).splitlines()
        for number, line in enumerate(disks, start=1):
            name, _, total, used = line.split()
            snode.sh(f"lvcreate -q -an -Zn -Wn -l {int(total) - int(used) - _ROOM} -n filler{number} vg1 {name}")


# -- one name, one volume --------------------------------------------------------------------------------------------

#: Of a volume of 4 extents in the pool thick: what asks for the same one, and what asks for another.
_SAME: list[dict[str, Any]] = [
    {"required": 4 * EXTENT},
    {"required": 4 * EXTENT - 1},
    {"required": 1},
    {},
    {"required": 4 * EXTENT, "limit": 4 * EXTENT},
    {"limit": 5 * EXTENT},
    {"required": 4 * EXTENT, "parameters": {"pool": "thick", "csi.storage.k8s.io/pvc/name": "another"}},
]
_OTHER: dict[str, dict[str, Any]] = {
    "bytes": {"required": 4 * EXTENT + 1},
    "bytes, asked": {"required": 8 * EXTENT, "limit": 9 * EXTENT},
    "bytes, asked 0 to": {"limit": 3 * EXTENT},
    "pool thick, asked thin": {"required": 4 * EXTENT, "parameters": {"pool": "thin"}},
    "pool thick, asked mirror": {"required": 4 * EXTENT, "parameters": {"pool": "mirror"}},
    "asked {}": {"required": 4 * EXTENT, "parameters": {}},
}


@pytest.mark.soak
def test_one_name_is_one_volume_and_another_wish_is_a_conflict(cluster: Cluster) -> None:
    cnode = cluster.cnodes[0]
    volume_id = create(cluster, required=4 * EXTENT, parameters={"pool": "thick"}).volume_id

    def check() -> None:
        for wish in _SAME:
            volume = create(cluster, **{"parameters": {"pool": "thick"}, **wish})
            assert (volume.volume_id, volume.capacity_bytes) == (volume_id, 4 * EXTENT), wish
        for words, wish in _OTHER.items():
            error = refused(partial(create, cluster, **{"parameters": {"pool": "thick"}, **wish}))
            assert error is not None, wish
            assert error.code() is Code.ALREADY_EXISTS, wish
            assert words in str(error.details())
            assert "choose another name" in str(error.details())
        assert sizes(cluster) == {volume_id: 4 * EXTENT}

    check()
    cluster.publish(volume_id, cnode)
    assert cluster.snode.driver is not None
    cluster.snode.driver.kill9()
    cluster.start_driver(cluster.snode)  # all that it knows now is what LVM says
    check()
    for name in ("One", "one ", "öne"):
        volume = create(cluster, name, required=1, parameters={"pool": "thick"})
        assert volume.volume_id != volume_id
        cluster.delete(volume.volume_id)
    cluster.unpublish(volume_id, cnode)
    cluster.delete(volume_id)


# -- deleting --------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["thick", pytest.param("thin", marks=_SOAK)])
def test_a_volume_in_use_is_not_deleted(cluster: Cluster, pool: str) -> None:
    cnode = cluster.cnodes[0]
    oracle = Oracle("one")
    volume_id = cluster.create(parameters={"pool": pool})
    path = cluster.attach(volume_id, cnode)
    writer = oracle.write(cnode.guest, f"{path}/records")
    oracle.wait_for(20)
    for _ in range(3):
        error = refused(lambda: cluster.delete(volume_id))
        assert error is not None
        assert error.code() is Code.FAILED_PRECONDITION
        assert "published to cnode1; unpublish it first" in str(error.details())
        oracle.wait_for_more(10)
    assert list(sizes(cluster)) == [volume_id]
    oracle.judge(cnode.guest, f"{path}/records")
    writer.signal(9)
    writer.wait(30)
    # Somebody on the SNODE copies it, so that it is in use though nobody has it any more.
    cluster.detach(volume_id, cnode)
    copy = cluster.snode.guest.spawn(f"exec 3< /dev/vg0/{volume_id}; echo open; sleep 1000", name="copy")
    copy.wait_for("open")
    error = refused(lambda: cluster.delete(volume_id))
    assert error is not None
    assert error.code() is Code.FAILED_PRECONDITION
    assert "still open on this machine" in str(error.details())
    copy.signal(9)
    copy.wait(10)
    path = cluster.attach(volume_id, cnode)
    oracle.judge(cnode.guest, f"{path}/records")
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


# -- killed among many -----------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["thin", pytest.param("mirror", marks=_SOAK)])
def test_a_kill_among_many_creations_leaves_no_orphan(cluster: Cluster, say: Say, pool: str) -> None:
    names = [f"v{number}" for number in range(12)]
    stub = cluster.snode.stubs["controller"]
    driver = cluster.snode.driver
    assert driver is not None
    requests = [
        pb.CreateVolumeRequest(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=EXTENT),
            volume_capabilities=[capability()],
            parameters={"pool": pool},
        )
        for name in names
    ]
    under_way = [stub.CreateVolume.future(request, timeout=60) for request in requests]
    for future in under_way[:3]:
        future.exception()
    driver.kill9()
    made = {future.result().volume.volume_id for future in under_way if future.exception() is None}
    cluster.start_driver(cluster.snode)
    assert invariants.check(cluster) == []
    # Nothing but whole volumes: what was answered, and what only its answer was missing of.
    there = listed(cluster)
    end = time.monotonic() + 30
    while sizes(cluster).keys() != there and time.monotonic() < end:
        time.sleep(0.2)
        there = listed(cluster)
    assert sizes(cluster).keys() == there
    assert made <= there
    say(f"{pool}: {len(made)} of {len(names)} creations answered before the kill, {len(there)} volumes after it")
    ids = [create(cluster, name, required=EXTENT, parameters={"pool": pool}).volume_id for name in names]
    assert made <= set(ids)
    assert sizes(cluster) == dict.fromkeys(ids, EXTENT)
    for volume_id in ids:
        cluster.delete(volume_id)


# -- all at once -----------------------------------------------------------------------------------------------------

_SEED = 20261124
_THREADS, _CALLS = 8, 25
_KINDS = [
    "create", "create", "publish", "publish", "publish", "stage", "stage", "mount", "mount", "expand", "expand node",
    "unmount", "unstage", "unpublish", "delete",
]  # fmt: skip


@dataclass
class Storm:
    """Random requests about few volumes; each is sent whatever the others do."""

    cluster: Cluster
    names: tuple[str, ...] = ("one", "two", "three")
    ids: dict[str, str] = field(default_factory=dict)
    contexts: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    outcomes: list[tuple[str, Code, str]] = field(default_factory=list)

    def blow(self, seed: int) -> None:
        """The requests of one thread."""
        rng = random.Random(seed)
        for _ in range(_CALLS):
            kind, name, cnode = rng.choice(_KINDS), rng.choice(self.names), rng.choice(self.cluster.cnodes)
            if self.send(kind, name, cnode, size_bytes=rng.choice([16, 24]) * MIB) is Code.ABORTED:
                time.sleep(0.2)  # as one who repeats would

    def send(self, kind: str, name: str, cnode: Machine, *, size_bytes: int = 16 * MIB) -> Code:
        """Send a request; its status."""
        volume_id = self.ids[name]
        method, call = self._request(kind, name, volume_id, cnode, size_bytes)
        error = refused(call)
        code = Code.OK if error is None else error.code()
        self.outcomes.append((method, code, "" if error is None else str(error.details())))
        return code

    def _request(
        self, kind: str, name: str, volume_id: str, cnode: Machine, size_bytes: int
    ) -> tuple[str, Callable[[], object]]:
        cluster, context = self.cluster, self.contexts.get((volume_id, cnode.node_id))
        if kind in ("stage", "mount") and context is None:
            kind = "publish"

        def publish() -> None:
            self.contexts[volume_id, cnode.node_id] = cluster.publish(volume_id, cnode)

        path, staging = f"{TARGET}/{volume_id}", f"{STAGING}/{volume_id}"
        node = cnode.stubs["node"]
        requests: dict[str, tuple[str, Callable[[], object]]] = {
            "create": ("CreateVolume", lambda: cluster.create(name, size_bytes=16 * MIB)),
            "publish": ("ControllerPublishVolume", publish),
            "stage": ("NodeStageVolume", lambda: cluster.stage(volume_id, cnode, context or {})),
            "mount": ("NodePublishVolume", lambda: cluster.mount(volume_id, cnode)),
            "expand": ("ControllerExpandVolume", lambda: cluster.expand(volume_id, size_bytes)),
            "expand node": ("NodeExpandVolume", lambda: cluster.expand_node(volume_id, cnode, size_bytes)),
            "unmount": (
                "NodeUnpublishVolume",
                lambda: node.NodeUnpublishVolume(
                    pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=path), timeout=120
                ),
            ),
            "unstage": (
                "NodeUnstageVolume",
                lambda: node.NodeUnstageVolume(
                    pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=staging), timeout=120
                ),
            ),
            "unpublish": ("ControllerUnpublishVolume", lambda: cluster.unpublish(volume_id, cnode)),
            "delete": ("DeleteVolume", lambda: cluster.delete(volume_id)),
        }
        return requests[kind]


@contextmanager
def impatient_nodes(cluster: Cluster) -> Iterator[None]:
    """The nodes give up a lost session after 5 s, not 2 minutes: that is how long a request may wait for it."""
    configs = [machine.config for machine in cluster.cnodes]

    def restart(machine: Machine, config: str) -> None:
        assert machine.driver is not None
        machine.driver.kill9()
        machine.config = config
        cluster.start_driver(machine)

    with ThreadPoolExecutor() as pool:
        impatient = [config.replace("[node]", "[node]\nreplacement_timeout = 5") for config in configs]
        list(pool.map(restart, cluster.cnodes, impatient))
        try:
            yield
        finally:
            list(pool.map(restart, cluster.cnodes, configs))


@pytest.mark.soak
def test_200_random_requests_at_once(cluster: Cluster, say: Say) -> None:
    with impatient_nodes(cluster):
        blow(cluster, say)


def blow(cluster: Cluster, say: Say) -> None:
    """See test_200_random_requests_at_once."""
    bystander = Oracle("calm")
    calm = cluster.create("calm")
    path = cluster.attach(calm, cluster.cnodes[0])
    writer = bystander.write(cluster.cnodes[0].guest, f"{path}/records", pause=0.1)
    bystander.wait_for(5)
    storm = Storm(cluster)
    storm.ids = {name: cluster.create(name, size_bytes=16 * MIB) for name in storm.names}
    began = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(storm.blow, range(_SEED, _SEED + _THREADS)))
    took = seconds(began)
    codes = [code for _, code, _ in storm.outcomes]
    say(f"{len(codes)} requests in {took}: " + ", ".join(f"{codes.count(c)} {c.name}" for c in dict.fromkeys(codes)))
    allowed = {method: codes - {Code.DEADLINE_EXCEEDED} for method, codes in ALLOWED.items()}
    assert [outcome for outcome in storm.outcomes if outcome[1] not in allowed[outcome[0]]] == []
    # When all is answered, LVM, tgtd and the nodes have what the records say, and nobody has more than he was granted.
    assert invariants.check(cluster) == []
    assert listed(cluster) == sizes(cluster).keys()
    assert {Code.OK, Code.ABORTED} <= set(codes)
    bystander.wait_for_more(3)
    bystander.judge(cluster.cnodes[0].guest, f"{path}/records")
    writer.signal(9)
    writer.wait(30)
    cluster.detach(calm, cluster.cnodes[0])
    cluster.delete(calm)
    for name in storm.names:
        steps = [(kind, cnode) for cnode in cluster.cnodes for kind in ("unmount", "unstage", "unpublish")]
        for kind, cnode in [*steps, ("delete", cluster.cnodes[0])]:
            assert storm.send(kind, name, cnode) is Code.OK, storm.outcomes[-1]
