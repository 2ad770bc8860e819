"""The judge itself: whatever is lost, foreign or old is found, and nothing else is complained of."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from tests.lab import writer
from tests.lab.guest import Guest
from tests.lab.oracle import Oracle


@dataclass
class Writer:
    """Stands for a command in the guest. rc: None while it runs, and for ever if its machine lost its power."""

    rc: int | None = None


class Local:
    """Stands for a guest: the records are put into a local file by the test, and read back by the real checker."""

    name = "cnode1"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamps: list[str] = []
        self.writers: list[Writer] = []
        self._hear: Callable[[str], None] = lambda _line: None

    def spawn(self, argv: Sequence[str], *, name: str, on_line: Callable[[str], None]) -> "Writer":
        self.stamps.append(argv[4])
        self._hear = on_line
        self.writers.append(Writer())
        return self.writers[-1]

    def sh(self, argv: Sequence[str], timeout: float) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=timeout).stdout

    def write(self, oracle: Oracle, *, acknowledged: int, more: int = 0) -> None:
        """A writer that makes so many records durable, and some more that nobody hears of."""
        oracle.write(cast(Guest, self), str(self.path))
        for number in range(1, acknowledged + more + 1):
            self.put(number)
            if number <= acknowledged:
                self._hear(f"ack {number}\n")

    def put(self, number: int, *, writer_number: int = -1, block: bytes | None = None) -> None:
        """Put a record, or something else, where it belongs."""
        with self.path.open("r+b") as file:
            file.seek(number % writer.ROUND * writer.BLOCK)
            file.write(block if block is not None else writer.block_of(self.stamps[writer_number], number))


@pytest.fixture
def guest(tmp_path: Path) -> Local:
    path = tmp_path / "records"
    path.touch()
    return Local(path)


def judge(oracle: Oracle, guest: Local) -> int:
    return oracle.judge(cast(Guest, guest), str(guest.path))


@pytest.mark.parametrize("acknowledged", [0, 1, 100, writer.ROUND - 1, writer.ROUND, writer.ROUND + 100])
def test_what_was_written_is_right(guest: Local, acknowledged: int) -> None:
    oracle = Oracle("one")
    guest.write(oracle, acknowledged=acknowledged, more=2)
    assert judge(oracle, guest) == acknowledged + 2


def test_a_writer_after_another_one(guest: Local) -> None:
    oracle = Oracle("one")
    guest.write(oracle, acknowledged=100, more=1)
    guest.write(oracle, acknowledged=20, more=1)
    assert judge(oracle, guest) == 21
    guest.write(oracle, acknowledged=0)
    assert judge(oracle, guest) == 0


def _lost(guest: Local) -> None:
    guest.put(50, block=bytes(writer.BLOCK))


def _old_writer_lost(guest: Local) -> None:
    with guest.path.open("r+b") as file:
        file.truncate(50 * writer.BLOCK)


def _all_lost(guest: Local) -> None:
    with guest.path.open("r+b") as file:
        file.truncate(0)


def _fenced_goes_on(guest: Local) -> None:
    for number in range(101, 200):
        guest.put(number, writer_number=0)


def _old_over_new(guest: Local) -> None:
    guest.put(5, writer_number=0)


def _old_lap(guest: Local) -> None:
    guest.put(150 + writer.ROUND)


def _tail(guest: Local) -> None:
    with guest.path.open("r+b") as file:
        file.seek(7 * writer.BLOCK + 112)
        file.write(b"another tenant's data")


def _beyond(guest: Local) -> None:
    with guest.path.open("r+b") as file:
        file.seek((writer.ROUND + 900) * writer.BLOCK)
        file.write(b"another tenant's data".ljust(writer.BLOCK))


def _unheard_of(guest: Local) -> None:
    for number in range(21, 1000):
        guest.put(number)


def _another_oracle(guest: Local) -> None:
    other = Local(guest.path)
    other.write(Oracle("one"), acknowledged=3)


def _wrong_place(guest: Local) -> None:
    guest.put(60, block=writer.block_of(guest.stamps[0], 61))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_lost, "1 acknowledged records are lost"),
        (_old_writer_lost, "51 acknowledged records are lost"),
        (_all_lost, "100 acknowledged records are lost"),
        (_fenced_goes_on, "may not be there, first .'record 165 of one/.*/1/cnode1 instead of nothing"),
        (_old_over_new, "record 5 of one/.*/1/cnode1 instead of record 5 of one/.*/2/cnode1"),
        (_old_lap, "may not be there"),
        (_tail, "foreign or damaged records: .'bad 7 no valid"),
        (_beyond, "foreign or damaged records: .'bad 4096 the file has"),
        (_unheard_of, "may not be there, first .'record 85 of"),
        (_another_oracle, "foreign or damaged records"),
        (_wrong_place, "foreign or damaged records: .'bad 60 record 61"),
    ],
)
def test_what_is_wrong_is_found(guest: Local, spoil: Callable[[Local], Any], words: str) -> None:
    oracle = Oracle("one")
    guest.write(oracle, acknowledged=100)
    guest.write(oracle, acknowledged=20)
    judge(oracle, guest)
    spoil(guest)
    with pytest.raises(AssertionError, match=words):
        judge(oracle, guest)


def test_a_fenced_writer_that_ended_wrote_one_record_at_most(guest: Local) -> None:
    oracle = Oracle("one")
    guest.write(oracle, acknowledged=100, more=1)
    guest.writers[0].rc = 0
    guest.write(oracle, acknowledged=20)
    judge(oracle, guest)
    guest.put(102, writer_number=0)
    with pytest.raises(AssertionError, match=r"record 102 of one/.*/1/cnode1 instead of nothing"):
        judge(oracle, guest)


def test_a_record_of_an_earlier_lap_is_found(guest: Local) -> None:
    oracle = Oracle("one")
    guest.write(oracle, acknowledged=writer.ROUND + 500)
    judge(oracle, guest)
    guest.put(300)
    with pytest.raises(AssertionError, match=f"record 300 of .* instead of record {writer.ROUND + 300} of"):
        judge(oracle, guest)
