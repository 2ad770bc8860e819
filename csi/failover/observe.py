"""How long something has stayed the same, as seen by us, on our clock.

Timestamps of others are compared with themselves only: a clock that jumps, ours or theirs, changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class _Value:
    text: str
    since: float
    moved: bool  # it was seen to change


class Unchanged:
    """For each name: how long its value was seen to be the same. What was not looked at counts as changed."""

    def __init__(self, *, gap_seconds: float) -> None:
        """gap_seconds: a longer time between two looks is no observation; everything then counts from anew."""
        self._gap = gap_seconds
        self._values: dict[str, _Value] = {}
        self._looked_at: float | None = None

    def look(self, values: Mapping[str, str], now: float) -> None:
        """Take in what stands there now; names that are missing are forgotten. now: monotonic seconds."""
        known = self._values if self._is_fresh(now) else {}
        self._values = {name: _next(known.get(name), text, now) for name, text in values.items()}
        self._looked_at = now

    def seconds(self, now: float) -> dict[str, float]:
        """How long each value is the same; {} when the last look is too long ago to say anything."""
        return {name: now - value.since for name, value in self._values.items()} if self._is_fresh(now) else {}

    def moving(self, now: float, *, within: float) -> frozenset[str]:
        """Those that were seen to change within the last seconds: a first look proves no life."""
        if not self._is_fresh(now):
            return frozenset()
        return frozenset(name for name, value in self._values.items() if value.moved and now - value.since < within)

    def text(self, name: str) -> str | None:
        """The value at the last look."""
        value = self._values.get(name)
        return None if value is None else value.text

    def _is_fresh(self, now: float) -> bool:
        return self._looked_at is not None and 0 <= now - self._looked_at <= self._gap


def _next(last: _Value | None, text: str, now: float) -> _Value:
    if last is None:
        return _Value(text, now, False)
    return last if last.text == text else _Value(text, now, True)
