"""A request is killed at each of its steps, its service started again, and the request repeated.

A step is a boundary: the moment before or after a change (csi/crash.py). Whatever the step was, the end must be that of
a request that was not killed, all invariants must hold, and deleting everything must leave nothing.

The cases are in crash_controller.py, crash_node.py and crash_loop.py; test_crash_sites.py sees to it that they pass
every place in the source that changes anything.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
import structlog

from csi.run import Boundary, no_boundary
from tests.fakes.crash import Crash, CrashAt
from tests.model.patience import Patience
from tests.scratch_folder import in_memory, scratch_folder


class Ground(Protocol):
    """What a request acts on: services in this process, over things that outlive them."""

    def begin(self) -> None:
        """From nothing to the moment before the request."""
        ...

    def start(self, boundary: Boundary) -> None:
        """Make the service that is killed anew, from what is on disk."""
        ...

    def act(self) -> None:
        """The request; repeated after a kill."""
        ...

    def tend(self) -> None:
        """A turn of the background, as it may come before the repetition."""
        ...

    def state(self) -> object:
        """What there is once the background has come to its end, alike for each way there. Checks the invariants."""
        ...

    def end(self) -> None:
        """Delete everything, and see that nothing is left."""
        ...


G = TypeVar("G", bound=Ground)


@dataclass(frozen=True)
class Case:
    """`request`: the RPC, or "background" or "start". `ground`: made for all the kills of one case."""

    request: str
    name: str
    ground: Callable[[], AbstractContextManager[Ground]]

    def __str__(self) -> str:
        return f"{self.request}, {self.name}" if self.name else self.request


def after(*acts: Callable[[G], object]) -> Callable[[G], object]:
    """One after the other."""

    def all_of(ground: G) -> None:
        for act in acts:
            act(ground)

    return all_of


def killed(act: Callable[[G], object], name: str) -> Callable[[G], object]:
    """A request that was killed at the first boundary of this name."""

    def killed_act(ground: G) -> None:
        def boundary(passed: str) -> None:
            if passed == name:
                raise Crash(name)

        ground.start(boundary)
        with pytest.raises(Crash):
            act(ground)

    return killed_act


def count(ground: Ground) -> tuple[CrashAt, object]:
    """The steps of a request that is not killed, and what there is after it."""
    ground.begin()
    steps = CrashAt()
    ground.start(steps)
    ground.act()
    ground.start(no_boundary)
    state = ground.state()
    ground.end()
    return steps, state


def visit(case: Case, *, tend_first: int) -> int:
    """Kill the case's request at each step; returns how many there were.

    tend_first: the background has a turn before the repetition at every even step (0) or odd one (1).
    """
    with case.ground() as ground:
        steps, expected = count(ground)
        for step, name in enumerate(steps.names, 1):
            where = f"{case}: killed at step {step} of {len(steps.names)}, {name}"
            try:
                _kill(ground, step, tend_first=step % 2 == tend_first)
                assert ground.state() == expected
                ground.end()
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error
        return len(steps.names)


def _kill(ground: Ground, step: int, *, tend_first: bool) -> None:
    ground.begin()
    with pytest.raises(Crash):
        ground.start(CrashAt(step))
        ground.act()
    ground.start(no_boundary)
    if tend_first:
        ground.tend()
    ground.act()


@contextmanager
def scratch(*, real_waits: bool = False) -> Iterator[Path]:
    """A folder in memory, and waits that take no time, until the end of the block."""
    waits = nullcontext() if real_waits else Patience(lambda: None).use()
    with scratch_folder("crash", base=in_memory()) as folder, _quiet(), waits:
        yield folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Thousands of kills make a log that nobody reads."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False
    )
    try:
        yield
    finally:
        structlog.configure(**before)
