"""A trouble of the model comes at every moment of a request: at each boundary, request to tgtd and command of it."""

import itertools
from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from unittest import mock

import pytest

from tests.model.book import ON_NODE, Call, Event, Trouble
from tests.model.lengths import PERCENTS, Length, nth, script
from tests.model.on_fakes import OnFakes, actions, measure, measured

#: What changes anything, and so passes boundaries.
_KINDS = (
    "create", "delete", "publish", "unpublish", "expand", "stage", "unstage",
    "node publish", "node unpublish", "node expand", "tend", "tend node",
)  # fmt: skip


@pytest.mark.parametrize("kind", _KINDS)
def test_every_step_can_be_chosen(kind: str) -> None:
    for number in filter(None, astuple(measured()[kind])):
        assert {nth(percent, number) for percent in PERCENTS} == set(range(1, number + 1))


def test_every_kind_of_trouble_has_something_to_come_at() -> None:
    assert all(measured()[kind].steps for kind in _KINDS)
    assert {kind for kind in _KINDS if measured()[kind].requests} == {"publish", "unpublish", "expand", "tend"}
    assert {kind for kind in _KINDS if measured()[kind].commands} == ON_NODE & {*_KINDS} - {"tend node"}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_kill_comes_at_the_last_step(kind: str) -> None:
    run, index = _run_with_the_longest(kind)
    ground = OnFakes()
    try:
        parts = actions(ground, run)
        for _, act in itertools.islice(parts, index):
            act()
        what, act = next(parts)
        service = ground.nodes[what.node] if kind in ON_NODE else ground.world
        with mock.patch.object(service, "start", wraps=service.start) as start:
            ground.disturbed(Trouble("kill", PERCENTS[-1]), what, act, lambda: None)
        assert start.call_count == 1, "it was not killed"
        assert len(service.steps.names) == measured()[kind].steps
    finally:
        ground.close(failed=False)


@cache
def _lengths() -> list[list[Length]]:
    return [measure(run) for run in script()]


def _run_with_the_longest(kind: str) -> tuple[Sequence[Call | Event], int]:
    for run, lengths in zip(script(), _lengths(), strict=True):
        for index, (what, length) in enumerate(zip(run, lengths, strict=True)):
            if what.kind == kind and length.steps == measured()[kind].steps:
                return run, index
    raise AssertionError(f"each time it is measured, {kind} has another number of steps")
