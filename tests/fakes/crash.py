"""A kill at a chosen step, inside one process: the objects are thrown away and made anew from what is on disk."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

_DRIVER = f"{Path(__file__).resolve().parents[2] / 'csi'}/"

#: A call in the driver's source: the file below csi/, and the lines and columns of its beginning and end.
Place = tuple[str, int, int, int, int]


class Crash(BaseException):
    """Unwinds like a kill: no `except Exception` of the driver catches it."""


class CrashAt:
    """A boundary that raises Crash at the `step`-th call (from 1; 0 = never), and remembers the names of all steps.

    `places`: the calls in the driver that were under way at any step, when nothing is killed.
    """

    def __init__(self, step: int = 0) -> None:
        self._step = step
        self.names: list[str] = []
        self.places: set[Place] = set()

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if not self._step:
            self.places.update(_calls_under_way())
        if len(self.names) == self._step:
            raise Crash(f"step {self._step}: {name}")


def _calls_under_way() -> Iterator[Place]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_DRIVER):
            line, end_line, column, end_column = _positions(code)[frame.f_lasti // 2]
            yield code.co_filename.removeprefix(_DRIVER), line or 0, column or 0, end_line or 0, end_column or 0
        frame = frame.f_back


@cache
def _positions(code: CodeType) -> list[tuple[int | None, int | None, int | None, int | None]]:
    """Where the source of each instruction is."""
    return list(code.co_positions())
