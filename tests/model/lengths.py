"""How long each kind of request and event is on fakes, measured: so that a trouble comes at any moment of it.

Nothing is counted by hand. A fixed run plays each kind undisturbed, in the ways that take the most steps, and what it
passes is counted. It leaves out waits for what does not answer, which repeat the same steps until the time is over.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tests.model.book import MIB, Call, Event

#: A trouble's `percent` is one of so many.
PERCENTS = range(100)


@dataclass(frozen=True)
class Length:
    """How many boundaries, requests to tgtd and commands of a node there are from the beginning to the end."""

    steps: int = 0
    requests: int = 0
    commands: int = 0

    def longer(self, other: "Length") -> "Length":
        """The larger one of each number."""
        return Length(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(Length)))


def nth(percent: int, number: int) -> int:
    """Which of so many a trouble comes at, from 1; with up to 100 of them, each has a percentage."""
    return percent * number // len(PERCENTS) + 1


def script() -> list[Sequence[Call | Event]]:
    """Runs that begin with nothing. Between them they pass everything that a request may have to do."""
    return [_there_and_back("ext4"), _there_and_back("block"), _lost_and_found()]


def longest(measure: Callable[[Sequence[Call | Event]], Iterable[Length]]) -> dict[str, Length]:
    """By kind. measure: plays one run on a ground of its own, and tells the length of each part."""
    found: dict[str, Length] = {}
    for run in script():
        for what, length in zip(run, measure(run), strict=True):
            found[what.kind] = found.get(what.kind, Length()).longer(length)
    return found


def _there_and_back(way: str) -> Sequence[Call | Event]:
    """A volume is used on a node, grows, and goes; it is fenced off while it is staged."""
    used: dict[str, Any] = {"way": way}
    large = {**used, "size": 330 * MIB}
    return [
        Call("create", size=320 * MIB, **used),
        Call("publish", **used),
        Call("stage", **used),
        Call("node publish", **used),
        Call("node publish", place=1, readonly=True, **used),
        Call("expand", **large),
        Call("node expand", **large),
        Call("stats", **used),
        Call("node unpublish", **used),
        Call("node unpublish", place=1, **used),
        Call("unstage", **used),
        Call("stage", **used),
        Call("unpublish", **used),
        Event("tend node"),
        Call("unstage", **used),
        Event("damage"),
        Call("delete", **used),
    ]


def _lost_and_found() -> Sequence[Call | Event]:
    """tgtd and a node lose all they know; two nodes share one volume."""
    shared: dict[str, Any] = {"volume": 1, "way": "shared block"}
    return [
        Call("create"),
        Call("create", **shared),
        Call("publish"),
        Call("publish", **shared),
        Call("publish", node=1, **shared),
        Call("stage"),
        Call("stage", **shared),
        Call("stage", node=1, **shared),
        Event("tgtd restarts"),
        Event("restart controller"),
        Event("tend"),
        Event("reboot"),
        Event("tend node"),
        Event("tgtd restarts"),
        Call("publish"),
        Call("unpublish", odd=True, **shared),
        Call("unpublish"),
        Event("damage"),
        Call("delete"),
        Call("delete", **shared),
        Event("tend"),
    ]
