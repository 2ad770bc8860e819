"""Fixtures of the lab's tests."""

import time
from collections.abc import Callable, Iterator

import pytest

from . import Lab


def seconds(began: float) -> str:
    """Time since `began` (monotonic), for a line of `say`."""
    return f"{time.monotonic() - began:.2f} s"


Say = Callable[[str], None]


#: Lines of `say` travel in a test's report under this name, when it runs in one of several processes.
SAID = "said"


@pytest.fixture
def say(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Say:
    """Prints a line for the reader of the test run, past pytest's capture."""

    def line(text: str) -> None:
        if hasattr(request.config, "workerinput"):
            request.node.user_properties.append((SAID, text))
            return
        with capsys.disabled():
            print(f"\n    {text}", end="", flush=True)

    return line


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab without guests."""
    with Lab() as made:
        yield made
