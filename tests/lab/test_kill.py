"""kill -9 of the drivers at the steps of a volume's life on LVM, tgtd, iscsid and real kernels; then the same again.

A step is the moment before or after a change (csi/crash.py). The request is repeated after the restart, the invariants
must hold then (invariants.py), an acknowledged file must be there, and in the end nothing may be left.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import grpc
import pytest

from . import Lab, invariants
from .cluster import MIB, STAGING, Cluster, Machine, capability
from .conftest import Say
from .errors import LabError

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(1800)]

_LOG = "/run/crash-points"


@dataclass(frozen=True)
class Request:
    """`machine` runs the service that is killed. `has`: volumes, targets, sessions and mounts afterwards."""

    name: str
    machine: Machine
    act: Callable[[], object]
    has: tuple[int, int, int, int]


class Life:
    """The whole way of one volume, request by request."""

    def __init__(self, cluster: Cluster, way: str) -> None:
        """way: "mount" (ext4), "xfs" or "block"."""
        self._cluster = cluster
        self._cnode = cluster.cnodes[0]
        self._block = way == "block"
        self._how = capability(block=self._block, fs_type="xfs" if way == "xfs" else "ext4")
        self._size_bytes = (320 if way == "xfs" else 96) * MIB
        self._id = ""
        self._context: Mapping[str, str] = {}

    def requests(self) -> Iterator[Request]:
        """In their order."""
        cluster, cnode, snode = self._cluster, self._cnode, self._cluster.snode
        grown = self._size_bytes + 64 * MIB
        staged = 0 if self._block else 1  # a raw device is staged without a mount
        there, granted = (1, 0, 0, 0), (1, 1, 0, 0)
        attached, in_use = (1, 1, 1, staged), (1, 1, 1, staged + 1)
        yield Request("CreateVolume", snode, self._create, there)
        yield Request("ControllerPublishVolume", snode, self._publish, granted)
        yield Request("NodeStageVolume, new", cnode, self._stage, attached)
        yield Request("NodePublishVolume", cnode, self._mount, in_use)
        yield Request("ControllerExpandVolume", snode, lambda: cluster.expand(self._id, grown), in_use)
        yield Request("NodeExpandVolume", cnode, lambda: cluster.expand_node(self._id, cnode, grown), in_use)
        yield Request("NodeUnpublishVolume", cnode, lambda: cluster.unmount(self._id, cnode), attached)
        yield Request("NodeUnstageVolume", cnode, lambda: cluster.unstage(self._id, cnode), granted)
        yield Request("NodeStageVolume, existing", cnode, self._stage, attached)
        yield Request("NodeUnstageVolume, again", cnode, lambda: cluster.unstage(self._id, cnode), granted)
        yield Request("ControllerUnpublishVolume", snode, lambda: cluster.unpublish(self._id, cnode), there)
        yield Request("DeleteVolume", snode, lambda: cluster.delete(self._id), (0, 0, 0, 0))

    def check(self, request: Request) -> None:
        """What must hold after a request."""
        assert invariants.check(self._cluster) == [], request.name
        snode = invariants.look_at_snode(self._cluster.snode)
        cnode = invariants.look_at_cnode(self._cnode)
        has = (len(snode.volumes), len(snode.targets), len(cnode.sessions), len(cnode.mounts))
        assert has == request.has, request.name
        if request.name == "NodeStageVolume, existing":
            (disk,) = cnode.sessions[0].disks
            path = f"/dev/{disk}" if self._block else f"{STAGING}/{self._id}/file"
            assert self._cnode.guest.sh(f"head -c 12 {path}") == "acknowledged"

    def _create(self) -> None:
        created = self._cluster.create(size_bytes=self._size_bytes)
        assert self._id in ("", created)
        self._id = created

    def _publish(self) -> None:
        self._context = self._cluster.publish(self._id, self._cnode, how=self._how)

    def _stage(self) -> None:
        self._cluster.stage(self._id, self._cnode, self._context, how=self._how)

    def _mount(self) -> None:
        path = self._cluster.mount(self._id, self._cnode, how=self._how)
        file = path if self._block else f"{path}/file"
        self._cnode.guest.sh(f"echo acknowledged | dd of={file} bs=512 conv=sync,fsync,notrunc status=none")


@pytest.mark.parametrize("way", ["mount", "block"])
def test_kill_9_at_some_steps(lab: Lab, say: Say, way: str) -> None:
    """One step of each request, chosen by a seed."""
    seed = random.randrange(1 << 32)
    chosen = random.Random(seed)
    cluster = Cluster(lab, cnodes=1)
    points = _count(cluster, way)
    say(f"{way}: crash points {points}; chosen by seed {seed}")
    life, killed = Life(cluster, way), []
    for request, number in zip(life.requests(), points.values(), strict=True):
        step = chosen.randint(1, number)
        if not _survives(cluster, request, step):
            killed.append(f"{request.name} {step}")
            cluster.start_driver(request.machine)
            request.act()
        life.check(request)
    say(f"{way}: killed at {', '.join(killed)}")
    assert len(killed) >= len(points) - 2  # the background may have taken a step that was counted before
    cluster.restore()
    assert cluster.leftovers() == {}


@pytest.mark.parametrize("way", ["mount", "block", "xfs"])
def test_kill_9_at_every_step(lab: Lab, say: Say, way: str) -> None:
    """Each start of a driver dies one step later than the one before, until the request is answered."""
    cluster = Cluster(lab, cnodes=1)
    life, points = Life(cluster, way), {}
    for request in life.requests():
        killed = 0
        while not _survives(cluster, request, killed + 1):
            killed += 1
        points[request.name] = killed
        life.check(request)
    say(f"{way}: killed at {sum(points.values())} steps: {points}")
    assert sum(points.values()) > 150
    cluster.restore()
    assert cluster.leftovers() == {}


def _count(cluster: Cluster, way: str) -> dict[str, int]:
    """Live through a life in which nothing is killed; returns how many steps each request has."""
    for machine in cluster.machines:
        _restart(cluster, machine, f"SNODE_CRASH_LOG={_LOG}")

    def passed(machine: Machine) -> int:
        return int(machine.guest.sh(f"cat {_LOG} 2>/dev/null | wc -l"))

    life, points = Life(cluster, way), {}
    for request in life.requests():
        before = passed(request.machine)
        request.act()
        points[request.name] = passed(request.machine) - before
        life.check(request)
    assert cluster.leftovers() == {}
    assert all(points.values())
    return points


def _survives(cluster: Cluster, request: Request, step: int) -> bool:
    """Make a request of a driver that dies at a step; whether it was answered. The driver is started anew if so."""
    with suppress(LabError):  # it may die before it listens
        _restart(cluster, request.machine, f"SNODE_CRASH_AT={step}")
    driver = request.machine.driver
    assert driver is not None
    while driver.process.rc is None:
        try:
            request.act()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.05)
            continue
        _restart(cluster, request.machine)
        return True
    assert driver.process.rc == -9, driver.process.out[-2000:]
    return False


def _restart(cluster: Cluster, machine: Machine, *environment: str) -> None:
    """End a driver that still runs, and start it."""
    if machine.driver is not None and machine.driver.process.rc is None:
        machine.driver.kill9()
    cluster.start_driver(machine, environment=["SNODE_TEST=1", *environment] if environment else [])
