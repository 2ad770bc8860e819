"""How long `snode` takes from its start to its first ready Probe, and what it holds in memory when idle.

    .venv/bin/python -m tests.bench.start [RUNS]

Each run starts the real process on a fresh folder. The first start of a folder also makes the node's key; later ones
read it.
"""

import sys
import time
from statistics import median

from tests.bench.page import Section, Table, Target
from tests.driver import Driver
from tests.scratch_folder import ON_DISK, scratch_folder

_CONFIG = '[pools.files]\ntype = "files"\ndirectory = "{folder}/pool"\n'
_ROLES = ("controller", "all")  # a node alone is ready only where iscsid is
_IDLE_SECONDS = 5.0
_LIMIT_SECONDS, _LIMIT_MIB = 0.5, 60.0

TEXT = """
On this machine itself: from the start of the process to its first ready Probe, and resident memory {idle:g} s later.
The first start of a state folder makes the node's key, for which `cryptography` is loaded. The test run asserts CPU
seconds and memory (`tests/sanity/test_limits.py`).
"""
WHERE = "loading gRPC, protobuf and structlog is most of it; a busy machine adds to the time"


def measure(role: str, runs: int) -> tuple[list[float], list[float]]:
    """Seconds until ready and MiB when idle, of a first start and `runs` later ones."""
    with scratch_folder("bench", base=ON_DISK) as folder:
        times, sizes = [], []
        driver = Driver(folder, _CONFIG.format(folder=folder), role=role)
        for _ in range(runs + 1):
            times.append(driver.start())
            time.sleep(_IDLE_SECONDS)
            sizes.append(driver.resident_mib())
            driver.stop()
        return times, sizes


def section(runs: int = 5) -> Section:
    """Run it."""
    found = {role: measure(role, runs) for role in _ROLES}
    rows = [
        (role, f"{times[0]:.2f}", f"{median(times[1:]):.2f}", f"{max(sizes[1:]):.1f}", f"{sizes[0]:.1f}")
        for role, (times, sizes) in found.items()
    ]
    slowest = max(median(times[1:]) for times, _ in found.values())
    largest = max(max(sizes) for _, sizes in found.values())
    return Section(
        "Start and idle memory",
        f".venv/bin/python -m tests.bench.start {runs}",
        TEXT.format(idle=_IDLE_SECONDS),
        [Table(("role", "first start, s", "later starts, median s", "idle MiB", "idle MiB, first start"), rows)],
        [
            Target("start to the first ready Probe", slowest, _LIMIT_SECONDS, "s", where=WHERE),
            Target("resident memory when idle", largest, _LIMIT_MIB, "MiB", where=WHERE),
        ],
    )


if __name__ == "__main__":
    print(section(*map(int, sys.argv[1:])))
