"""One cluster for the tests of a module, whole again before each of them, and nothing left behind after any."""

from collections.abc import Iterator

import pytest

from tests.lab.cluster import Cluster
from tests.lab.keeper import Keeper

_FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="package")
def keeper() -> Iterator[Keeper]:
    """Of all modules but those that need other pools, which have a fixture of this name."""
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
