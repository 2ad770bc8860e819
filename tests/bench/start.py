"""How long `snode` takes from its start to its first ready Probe, and what it holds in memory when idle.

    .venv/bin/python -m tests.bench.start [RUNS]

Each run starts the real process on a fresh folder. The first start of a folder also makes the node's key; later ones
read it. Limits that the project sets itself: 0.5 s, 60 MiB.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.driver import Driver

_CONFIG = '[pools.files]\ntype = "files"\ndirectory = "{folder}/pool"\n'
_IDLE_SECONDS = 5.0


def main(runs: int) -> None:
    """Print a line for each role."""
    print(f"{'role':<12}{'start':>8}{'first start, s':>16}{'later, median s':>17}{'idle MiB':>10}{'first MiB':>11}")
    for role in ("controller", "all"):  # a node alone is ready only where iscsid is
        folder = Path(tempfile.mkdtemp(prefix="snode-bench-", dir="/var/tmp"))
        try:
            times, sizes = [], []
            driver = Driver(folder, _CONFIG.format(folder=folder), role=role)
            for _ in range(runs + 1):
                times.append(driver.start())
                time.sleep(_IDLE_SECONDS)
                sizes.append(driver.resident_mib())
                driver.stop()
            later = statistics.median(times[1:])
            print(f"{role:<12}{runs:>6} x{times[0]:>16.2f}{later:>17.2f}{max(sizes[1:]):>10.1f}{sizes[0]:>11.1f}")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
