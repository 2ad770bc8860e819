"""The judge of every fault run: no acknowledged record may be lost, and no foreign or older one may be there.

A writer in a guest reports a record to this process only after its fdatasync, over the serial line, which works with
the network cut. After the fault a checker reads all records back, and `Oracle.judge` compares.
"""

import threading
from pathlib import Path

from .channel import Command
from .guest import Guest

_PROGRAM = Path(__file__).with_name("writer.py")
#: Records go round in so many blocks (writer.py).
_ROUND = 4096


class Oracle:
    """What was acknowledged of one volume, by writer after writer."""

    def __init__(self, volume: str) -> None:
        self.volume = volume
        self._writers = 0
        self._acknowledged: dict[str, int] = {}
        self.errors: list[str] = []
        self._news = threading.Condition()

    def write(self, guest: Guest, path: str, *, pause: float = 0.01) -> Command:
        """Start a writer in a guest on a file of the mounted volume (or its device); it writes until it is ended."""
        self._writers += 1
        stamp = f"{self.volume}/{self._writers}/{guest.name}"
        self._acknowledged[stamp] = 0

        def hear(line: str) -> None:
            word, _, rest = line.strip().partition(" ")
            with self._news:
                if word == "ack":
                    self._acknowledged[stamp] = int(rest)
                elif word == "error":
                    self.errors.append(f"{stamp}: {rest}")
                self._news.notify_all()

        argv = ["/usr/bin/python3", str(_PROGRAM), "write", path, stamp, str(pause)]
        return guest.spawn(argv, name=f"writer-{self._writers}", on_line=hear)

    @property
    def acknowledged(self) -> int:
        """The number of the last record that the last writer has made durable."""
        with self._news:
            return list(self._acknowledged.values())[-1] if self._acknowledged else 0

    def wait_for(self, number: int, timeout: float = 60) -> None:
        """Return once the last writer has made this record durable; AssertionError if it does not in time."""
        with self._news:
            done = self._news.wait_for(lambda: self._last() >= number or bool(self.errors), timeout)
        assert done and self._last() >= number, (
            f"{self.volume}: record {number} is not durable after {timeout} s (at {self._last()}), {self.errors}"
        )

    def wait_for_more(self, count: int = 20, timeout: float = 60) -> None:
        """Return once `count` more records are durable than now."""
        self.wait_for(self.acknowledged + count, timeout)

    def judge(self, guest: Guest, path: str) -> int:
        """Read everything back in a guest and compare; returns the number of the last record that is there.

        The last writer's acknowledged records must all be there, in its own words; records that it wrote but that were
        not acknowledged yet may be there; nothing else may.
        """
        with self._news:  # before the look: the writer may still run
            stamp, last = list(self._acknowledged.items())[-1]
        out = guest.sh(["/usr/bin/python3", str(_PROGRAM), "check", path], timeout=120)
        lines = [line.rsplit(" ", 1) for line in out.splitlines()]
        foreign = [" ".join(line) for line in lines if line[0] != stamp and not self._older(line[0])]
        assert foreign == [], f"{self.volume}: foreign or damaged records: {foreign[:5]}"
        found = {int(number) for name, number in lines if name == stamp}
        lost = [number for number in range(max(1, last - _ROUND + 1), last + 1) if number not in found]
        overwritten = {number for number in lost if number + _ROUND in found}
        lost = [number for number in lost if number not in overwritten]
        assert lost == [], f"{self.volume}: {len(lost)} acknowledged records of {stamp} are lost, first {lost[:5]}"
        return max(found, default=0)

    def _older(self, stamp: str) -> bool:
        """Whether an earlier writer of this same volume wrote it, which the last one need not have overwritten."""
        return stamp in self._acknowledged

    def _last(self) -> int:
        return list(self._acknowledged.values())[-1]
