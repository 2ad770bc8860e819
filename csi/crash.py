"""The crash switch of the tests: end this process, as kill -9 does, at a chosen step.

A service that is started with SNODE_TEST=1 and SNODE_CRASH_AT=N ends itself at the N-th boundary that it passes: before
or after a changing command, a changing call to tgtd, and each file that is made, written, synced, renamed or removed.
With SNODE_CRASH_LOG=FILE it appends the name of every boundary to the file. Without SNODE_TEST=1 nothing of this is
active, and the settings refuse the other two.
"""

import itertools
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from csi.errors import Invalid
from csi.run import Boundary, no_boundary


def boundary_from(environment: Mapping[str, str]) -> Boundary:
    """The boundary that the environment asks for; `no_boundary` when it asks for none. Raises Invalid."""
    if environment.get("SNODE_TEST") != "1":
        return no_boundary
    crash_at, log = environment.get("SNODE_CRASH_AT", "0"), environment.get("SNODE_CRASH_LOG", "")
    if not crash_at.isdecimal():
        raise Invalid(f"environment variable SNODE_CRASH_AT: {crash_at!r} is not a whole number")
    if not int(crash_at) and not log:
        return no_boundary
    numbers = itertools.count(1)  # next() on it is atomic

    def boundary(name: str) -> None:
        number = next(numbers)
        if log:
            with Path(log).open("a") as file:
                file.write(f"{name}\n")
        if number == int(crash_at):
            os.kill(os.getpid(), signal.SIGKILL)

    return boundary
