"""One cluster for the tests of a module, whole again before each of them, and nothing left behind after any."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.lab import Lab, roles
from tests.lab.cluster import Cluster
from tests.lab.guest import Guest

POOLS = """
[pools.thin]
type = "lvm-thin"
vg = "vg0"
thin_pool = "thin"
overcommit_ratio = 4.0

[pools.mirror]
type = "lvm"
vg = "vg1"
layout = "raid1"
"""
_FAILED = pytest.StashKey[bool]()


class Keeper:
    """Boots the cluster when it is first asked for, and anew after a test that failed or left something.

    A module that needs other pools has a fixture `keeper` of its own.
    """

    def __init__(self, *, pools: str = POOLS, prepare: Callable[[Guest], None] | None = None) -> None:
        self._pools = pools
        self._prepare = prepare or add_thin_pool
        self._stack = ExitStack()
        self._cluster: Cluster | None = None

    def get(self) -> Cluster:
        if self._cluster is None:
            lab = self._stack.enter_context(Lab())
            self._cluster = Cluster(lab, pools=self._pools, legs=3, prepare=self._prepare)
        return self._cluster

    def drop(self) -> None:
        self._cluster = None
        self._stack.close()


def add_thin_pool(snode: Guest) -> None:
    """The pool `thin`, unless the disk has it from before a reboot."""
    if snode.run(["lvs", "vg0/thin"])[0]:
        roles.add_thin_pool(snode)


@pytest.fixture(scope="package")
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.drop()


@pytest.fixture
def cluster(keeper: Keeper, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A SNODE with the pools thick (the default), thin and mirror, and two CNODEs, all running the driver.

    A test may kill, cut and pause what it likes; it deletes its volumes. Afterwards all is started that is not running,
    and then nothing of a volume may be left anywhere.
    """
    made = keeper.get()
    yield made
    if request.node.stash.get(_FAILED, False):
        keeper.drop()
        return
    try:
        made.restore()
        left = made.leftovers()
    except BaseException:
        keeper.drop()
        raise
    if left:
        keeper.drop()
    assert left == {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" and call.excinfo is not None:
        item.stash[_FAILED] = True
    return report
