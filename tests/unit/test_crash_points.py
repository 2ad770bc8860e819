"""The controller is killed at every step of every request, started again, and the request repeated.

A step is the moment before or after a record, a call to tgtd, or an external command. Afterwards there is one volume,
one target for each publication, and nothing else; deleting everything leaves nothing.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.crash import Crash, CrashAt
from tests.fakes.tgt import FakeTgtd
from tests.unit.snode import MIB, Snode, soon


@dataclass(frozen=True)
class Case:
    """A request, and what must have happened before it."""

    before: Callable[[Snode], None]
    act: Callable[[Snode], object]


def _create(snode: Snode) -> None:
    snode.create()


def _publish(snode: Snode) -> None:
    snode.publish(snode.create().volume_id)


def _unpublish(snode: Snode) -> None:
    snode.unpublish(_only(snode), snode.node)


def _expand(snode: Snode) -> None:
    snode.volumes.expand(_only(snode), required_bytes=16 * MIB, limit_bytes=0, deadline=soon())


def _delete(snode: Snode) -> None:
    for entry in snode.volumes.list_volumes(starting_token="", max_entries=0, deadline=soon()).entries:
        snode.volumes.delete(entry.volume.volume_id, soon())


def _only(snode: Snode) -> str:
    (entry,) = snode.volumes.list_volumes(starting_token="", max_entries=0, deadline=soon()).entries
    return entry.volume.volume_id


CASES = {
    "create": Case(lambda _: None, _create),
    "delete": Case(_create, _delete),
    "publish": Case(_create, lambda snode: snode.publish(_only(snode))),
    "publish again": Case(_publish, lambda snode: snode.publish(_only(snode))),
    "unpublish": Case(_publish, _unpublish),
    "expand": Case(_create, _expand),
    "expand published": Case(_publish, _expand),
}


@pytest.fixture
def tgtd() -> Iterator[FakeTgtd]:
    with tempfile.TemporaryDirectory(prefix="snode") as folder:
        fake = FakeTgtd(Path(folder) / "tgtd.0")
        fake.start()
        yield fake
        fake.stop()
        assert fake.unexpected == []


def _state(snode: Snode) -> tuple[object, ...]:
    """What a client can tell: volumes, their sizes and nodes, and how many targets there are."""
    page = snode.volumes.list_volumes(starting_token="", max_entries=0, deadline=soon())
    entries = [(entry.volume.volume_id, entry.volume.size_bytes, entry.node_ids) for entry in page.entries]
    assert snode.targets() == {publication.target for publication in snode.publications.all()}
    return entries, len(snode.targets()), {name.split(".")[-1] for name in snode.files()}, len(snode.files())


def _steps(case: Case, folder: Path, tgtd: FakeTgtd, *, lvm: bool) -> tuple[int, tuple[object, ...]]:
    """How many steps a request has, and the state after it."""
    snode = Snode(folder, tgtd, lvm=lvm)
    case.before(snode)
    count = CrashAt()
    snode.start(count)
    case.act(snode)
    steps = len(count.names)
    snode.settle()
    state = _state(snode)
    snode.unpublish_all()
    _delete(snode)
    snode.settle()
    assert snode.files() == set()
    return steps, state


@pytest.mark.parametrize("background_first", [False, True], ids=["", "background first"])
@pytest.mark.parametrize("lvm", [False, True], ids=["files", "lvm"])
@pytest.mark.parametrize("name", CASES)
def test_kill_at_every_step_then_repeat(
    name: str, lvm: bool, background_first: bool, tmp_path: Path, tgtd: FakeTgtd
) -> None:
    case = CASES[name]
    steps, expected = _steps(case, tmp_path / "count", tgtd, lvm=lvm)
    print(f"{name} on {'lvm' if lvm else 'files'}: {steps} steps")
    assert steps > 0 or name == "publish again"
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        snode = Snode(folder, tgtd, lvm=lvm)
        case.before(snode)
        # The nodes' keys differ in each folder, so only counts are compared with the run that was not killed.
        snode.start(CrashAt(step))
        with pytest.raises(Crash):
            case.act(snode)
        snode.start()
        if background_first:
            snode.volumes.tend(soon())
        case.act(snode)
        snode.settle()
        entries, *rest = _state(snode)
        expected_entries, *expected_rest = expected
        where = f"{name}, killed at step {step} of {steps}"
        assert rest == expected_rest, where
        assert _sizes(entries) == _sizes(expected_entries), where
        snode.unpublish_all()
        _delete(snode)
        snode.settle()
        assert (snode.files(), snode.targets(), tgtd.accounts) == (set(), set(), {}), where


def _sizes(entries: object) -> list[tuple[str, int, int]]:
    assert isinstance(entries, list)
    return [(volume_id, size_bytes, len(nodes)) for volume_id, size_bytes, nodes in entries]
