"""The controller is killed at every step of a volume's life on LVM and tgtd, started, and the request repeated."""

import time
from collections.abc import Callable
from contextlib import suppress

import grpc
import pytest

from . import Lab, roles
from .cluster import MIB, Cluster
from .conftest import Say
from .errors import LabError

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]


def test_kill_9_of_the_controller_at_every_step(lab: Lab, say: Say) -> None:
    cluster = Cluster(lab, cnodes=1)
    snode, cnode = cluster.snode, cluster.cnodes[0]
    assert snode.driver is not None
    snode.driver.stop()
    ids: list[str] = []

    def create() -> None:
        ids.append(cluster.create())

    requests: dict[str, Callable[[], object]] = {
        "create": create,
        "publish": lambda: cluster.publish(ids[-1], cnode),
        "expand": lambda: cluster.expand(ids[-1], 160 * MIB),
        "unpublish": lambda: cluster.unpublish(ids[-1], cnode),
        "delete": lambda: cluster.delete(ids[-1]),
    }
    counts = {}
    for name, request in requests.items():
        counts[name] = _until_it_survives(cluster, request)
        assert len(set(ids)) == 1
        volumes = snode.guest.run("lvs --noheadings -o lv_name | grep -c v-")[1].strip()
        targets = snode.guest.run("tgtadm --lld iscsi --op show --mode target | grep -c '^Target.*io.snode'")[1].strip()
        expected = {"create": ("1", "0"), "publish": ("1", "1"), "expand": ("1", "1"), "unpublish": ("1", "0")}
        assert (volumes, targets) == expected.get(name, ("0", "0")), name
    say(f"killed at {sum(counts.values())} steps: {counts}")
    assert sum(counts.values()) > 40
    cluster.start_driver(snode)
    assert cluster.leftovers() == {}


def _until_it_survives(cluster: Cluster, request: Callable[[], object]) -> int:
    """Repeat a request; each start of the controller dies one step later than the one before. Returns how often."""
    step = 0
    while True:
        step += 1
        with suppress(LabError):  # it may die before it listens
            cluster.start_driver(cluster.snode, environment=["SNODE_TEST=1", f"SNODE_CRASH_AT={step}"])
        driver = cluster.snode.driver
        assert driver is not None
        if _answers(driver, request):
            driver.stop()
            return step - 1
        assert driver.process.rc == -9, driver.process.out[-2000:]


def _answers(driver: roles.Driver, request: Callable[[], object]) -> bool:
    """Whether the request is answered; False when the controller dies. A connection that is not there is waited for."""
    while driver.process.rc is None:
        try:
            request()
            return True
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.1)
    return False
