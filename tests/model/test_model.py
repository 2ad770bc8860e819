"""A random orchestrator against the whole driver: any request in any order, repeated, killed, disturbed, together with
others; and what must hold then. Here on fakes; tests/lab/test_model.py does the same with real kernels.

The normal run is short and plays the same seeds each time, so that a change is judged by what it changes.
SNODE_MODEL_SECONDS=3600 plays new ones for an hour. A failure prints its seed, which plays the same again:
SNODE_MODEL_SEED=… python -m pytest tests/model/test_model.py
"""

import pytest

from tests.model.play import play, play_for, seconds
from tests.model.rules import Model

_SECONDS = 8.0
_EXAMPLES, _STEPS = 5, 40


@pytest.mark.timeout(seconds(_SECONDS) + 900)  # a failure takes its time to be made small
def test_any_order_of_anything() -> None:
    def one(seed: int, _end: float) -> None:
        play(Model, seed, examples=_EXAMPLES, steps=_STEPS, test="tests/model/test_model.py", shrink=True)

    played = play_for(_SECONDS, one)
    print(f"{played * _EXAMPLES} runs of {_STEPS} steps")
