"""A program that runs beside the demo until it is stopped. The driver itself starts none."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from csi.run import SEARCH_PATH, find_program


class Service:
    """The program, in a process group of its own, with its output in a file."""

    def __init__(self, argv: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Start argv. Raises Unavailable when the program is missing."""
        program = find_program(argv[0])
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": SEARCH_PATH, "LC_ALL": "C", **(environment or {})},
                process_group=0,
            )
        self.log = log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    def stop(self, *, seconds: float = 30.0) -> None:
        """SIGTERM, and SIGKILL to the whole group if it has not ended after `seconds`."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it ended by itself in this moment
            os.killpg(self._process.pid, number)
