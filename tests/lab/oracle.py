"""The judge of every fault run: no acknowledged record may be lost, and no foreign or older one may be there.

A writer in a guest reports a record to this process only after its fdatasync, over the serial line, which works with
the network cut. After the fault a checker reads all blocks back from the disk, and `Oracle.judge` compares each with
what may be there.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .channel import Command
from .guest import Guest
from .writer import ROUND

_PROGRAM = Path(__file__).with_name("writer.py")
#: A writer begins a record when the one before it is durable, so one at most is written and not acknowledged. But while
#: it runs some acknowledgements are on the line, and if its machine loses its power they never arrive.
_UNHEARD = 64


@dataclass
class _Writer:
    """One that wrote, and the last record that it was heard to have made durable (0 = none)."""

    stamp: str
    acknowledged: int = 0
    command: Command | None = None

    @property
    def most(self) -> int:
        """The last record that it may have written."""
        ended = self.command is not None and self.command.rc is not None
        return self.acknowledged + (1 if ended else _UNHEARD)


class Oracle:
    """What was acknowledged of one file of a volume, or of a raw volume, by writer after writer."""

    def __init__(self, volume: str) -> None:
        self.volume = volume
        # Records of another run, or of an earlier volume of this name, are foreign.
        self._nonce = secrets.token_hex(4)
        self._writers: list[_Writer] = []
        self.errors: list[str] = []
        self._news = threading.Condition()

    def write(self, guest: Guest, path: str, *, pause: float = 0.01) -> Command:
        """Start a writer in a guest on a file of the mounted volume (or its device); it writes until it is ended."""
        number = len(self._writers) + 1
        stamp = f"{self.volume}/{self._nonce}/{number}/{guest.name}"
        argv = ["/usr/bin/python3", str(_PROGRAM), "write", path, stamp, str(pause)]
        command = guest.spawn(argv, name=f"writer-{number}", on_line=self.follow(stamp))
        self._writers[-1].command = command
        return command

    def follow(self, stamp: str) -> Callable[[str], None]:
        """Takes the lines of a writer that somebody else started with this stamp; it is the last one from now on."""
        writer = _Writer(stamp)
        self._writers.append(writer)

        def hear(line: str) -> None:
            word, _, rest = line.strip().partition(" ")
            with self._news:
                if word == "ack":
                    writer.acknowledged = int(rest)
                elif word == "error":
                    self.errors.append(f"{writer.stamp}: {rest}")
                self._news.notify_all()

        return hear

    @property
    def acknowledged(self) -> int:
        """The number of the last record that the last writer has made durable."""
        with self._news:
            return self._last()

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
        """Read everything back in a guest and compare; returns the number of the last writer's last record there.

        A block must hold the last acknowledged record that went there, whoever wrote it, or a later one that was not
        acknowledged yet; nothing else.
        """
        before = self.heard()  # the last writer may still run
        out = guest.sh(["/usr/bin/python3", str(_PROGRAM), "check", path], timeout=120)
        return self.compare(out.splitlines(), before)

    def heard(self) -> list[int]:
        """The number of the last acknowledged record of each writer."""
        with self._news:
            return [writer.acknowledged for writer in self._writers]

    def compare(self, found: Sequence[str], before: Sequence[int]) -> int:
        """As `judge`, of what a checker printed that somebody else started after `heard` gave `before`."""
        with self._news:
            most = [writer.most for writer in self._writers]
        lines = [line.rsplit(" ", 1) for line in found]
        writers = {writer.stamp: index for index, writer in enumerate(self._writers)}
        foreign = [" ".join(line) for line in lines if line[0] not in writers]
        assert foreign == [], f"{self.volume}: foreign or damaged records: {foreign[:5]}"
        records = [(writers[stamp], int(number)) for stamp, number in lines]
        there = {number % ROUND: (index, number) for index, number in records}
        lost, stale = [], []
        for place in range(ROUND):
            expected, record = _due(before, place), there.get(place)
            if record is None and expected is not None:
                lost.append(self._named(expected))
            elif record is not None and record != expected and not _is_later(record, expected, before, most):
                stale.append(f"{self._named(record)} instead of {self._named(expected)}")
        assert lost == [], f"{self.volume}: {len(lost)} acknowledged records are lost, first {lost[:5]}"
        assert stale == [], f"{self.volume}: {len(stale)} records that may not be there, first {stale[:5]}"
        return max((number for index, number in records if index == len(self._writers) - 1), default=0)

    def _named(self, record: tuple[int, int] | None) -> str:
        return f"record {record[1]} of {self._writers[record[0]].stamp}" if record else "nothing"

    def _last(self) -> int:
        return self._writers[-1].acknowledged if self._writers else 0


def _due(acknowledged: Sequence[int], place: int) -> tuple[int, int] | None:
    """The last acknowledged record of a place: whose, and its number."""
    for index in reversed(range(len(acknowledged))):
        number = acknowledged[index] - (acknowledged[index] - place) % ROUND
        if number >= 1:
            return index, number
    return None


def _is_later(
    found: tuple[int, int], expected: tuple[int, int] | None, before: Sequence[int], most: Sequence[int]
) -> bool:
    """Whether a record was written after the expected one, and not acknowledged before the look."""
    index, number = found
    return before[index] < number <= most[index] and (expected is None or index >= expected[0])
