"""Playing a model from seeds. A failure tells its seed, and how to play it again."""

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.rules import Model

#: One seed to be played, "" = many.
SEED = os.environ.get("SNODE_MODEL_SEED", "")


def seconds(usual: float) -> float:
    """How long to play."""
    return float(os.environ.get("SNODE_MODEL_SECONDS", usual))


def play(
    model: type[Model], seed: int, *, examples: int, steps: int, test: str, shrink: bool, until: float = math.inf
) -> None:
    """Some runs from a seed. shrink: a failure is made small, which needs a ground where it comes every time."""
    machine: Any = hypothesis.seed(seed)(type(model.__name__, (model,), {"until": until}))
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
    )
    try:
        run_state_machine_as_test(machine, settings=chosen)
    except BaseException as error:
        error.add_note(f"Play it again: SNODE_MODEL_SEED={seed} python -m pytest {test}")
        raise


def play_for(usual: float, one: Callable[[int, float], None]) -> int:
    """Play seeds until the time is over: the same ones in each usual run, other ones where SNODE_MODEL_SECONDS is set:
    those that SNODE_MODEL_SEEDS leads to (any text, such as a commit's id), or new ones each time.

    one: plays a seed, until a time by the monotonic clock. Returns how many were played.
    """
    if SEED:
        one(int(SEED), math.inf)
        return 1
    end = time.monotonic() + seconds(usual)
    source = _other_seeds() if "SNODE_MODEL_SECONDS" in os.environ else itertools.count(1)
    played = 0
    while time.monotonic() < end:
        played += 1
        one(next(source), end)
    return played


def _other_seeds() -> Iterator[int]:
    text = os.environ.get("SNODE_MODEL_SEEDS", "")
    draw = random.Random(text) if text else random.SystemRandom()
    while True:
        yield draw.randrange(1 << 32)
