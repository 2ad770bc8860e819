"""The model run on real kernels: any request in any order, repeated, killed, at once with others, machines that lose
power and network, data written through all of it; and what must hold then. The same rules as tests/model/test_model.py.

The normal run takes some seconds and plays the same seeds each time, `.ci/run` plays those of the commit for some
minutes, and `make soak` new ones for 20. SNODE_MODEL_SECONDS=3600 plays new ones for an hour. A failure prints its
seed, which plays the same again on new guests (but for the instants at which things take effect), and the calls and
events up to it:
SNODE_MODEL_SEED=… python -m pytest tests/lab/test_model.py
"""

import threading
import time
from typing import ClassVar

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from tests.lab.keeper import Keeper
from tests.lab.oracle import Oracle
from tests.model.book import SHARED, Call
from tests.model.guests import Guests
from tests.model.play import play, play_for, seconds
from tests.model.rules import CONTROLLER, NODE, Model, calls, step

from .conftest import Say
from .conftest import seconds as took

pytestmark = pytest.mark.lab

_SECONDS, _SOAK_SECONDS = 10.0, 1200.0
_STEPS = 25
#: I/O of a lost session fails early, so that a run need not wait for it.
_NODE = "replacement_timeout = 5"


KEEPER = Keeper(node=_NODE)


class OnGuests(Guests):
    """The ground of the kept cluster."""

    def __init__(self) -> None:
        super().__init__(KEEPER.get(), pools=("thick", "thin", "mirror"))

    def close(self, *, failed: bool) -> None:
        with (self.cluster.lab.logs / "model.log").open("a") as log:  # $SNODE_LAB_LOGS keeps it
            log.write("\n".join([*self.trail, "", ""]))
        if failed:
            KEEPER.drop()


class LabModel(Model):
    """What only real kernels show: several requests at the very same time, and applications that write on and on."""

    ground: OnGuests
    failures: ClassVar[list[BaseException]] = []  # of this session, the first is what counts

    def __init__(self) -> None:
        super().__init__()
        self.ground.trail = self.orchestrator.trail
        self._begun = False

    def make_ground(self) -> OnGuests:
        return OnGuests()

    @initialize(begin=st.sampled_from([False, *[True] * 9]))
    def begin(self, begin: bool) -> None:
        """Hypothesis begins with the run of the simplest draws, in which nothing happens: this leaves it out."""
        assume(begin)
        if self.failures:
            raise self.failures[0]  # once is enough: Hypothesis would play it again
        self._begun = True

    @step(some=st.lists(calls(*CONTROLLER, *NODE), min_size=2, max_size=4))
    def together(self, some: list[Call]) -> None:
        """Several requests at once, some of them twice."""
        errors: list[BaseException] = []

        def one(call: Call) -> None:
            try:
                self.orchestrator.do(call, sure=False)
            except BaseException as error:
                errors.append(error)

        with self.orchestrator.at_once(some):
            threads = [threading.Thread(target=one, args=(call,)) for call in some]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for error in errors:
            raise error

    @step(call=calls("stream"))
    def stream(self, call: Call) -> None:
        """An application begins to write on and on, where one can write."""
        known, node = self.orchestrator.volumes[call.volume], self.ground.nodes[call.node]
        path = self.orchestrator.target_path(call)
        published = known.published.get(call.node)
        if (call.node, path) not in known.shown or published is None or published.way in SHARED:
            return
        if any(other.is_writing(place) for other in self.ground.nodes for _, place in known.shown):
            return
        before = len(known.acknowledged)
        self.write(call)
        if len(known.acknowledged) > before:  # and what an earlier one wrote was judged
            oracles = self.ground.oracles
            if known.volume_id not in oracles and not node.is_blank(path):
                return  # a raw device, on which the making of a filesystem was broken off
            oracle = oracles.setdefault(known.volume_id, Oracle(f"{known.name}.{known.life}"))
            node.begin_writing(path, oracle)

    def teardown(self) -> None:
        if not self._begun:
            return
        try:
            super().teardown()
        finally:
            error = self.failure()
            if error is not None:
                error.add_note("\n".join(["What happened:", *self.orchestrator.trail[-120:]]))
                self.failures.append(error)


def _play_for(usual: float, say: Say) -> None:
    def one(seed: int, end: float) -> None:
        try:
            play(LabModel, seed, examples=1, steps=_STEPS, test="tests/lab/test_model.py", shrink=False, until=end)
        except BaseException as error:
            if not LabModel.failures or LabModel.failures[0] is error:
                raise
            LabModel.failures[0].add_note(error.__notes__[-1])
            raise LabModel.failures[0] from None

    LabModel.failures.clear()
    began = time.monotonic()
    try:
        played = play_for(usual, one)
    finally:
        KEEPER.drop()
    say(f"{played} runs of up to {_STEPS} steps in {took(began)}")


@pytest.mark.timeout(seconds(_SECONDS) + 600)  # a failure is played again
def test_any_order_of_anything_on_real_kernels(say: Say) -> None:
    _play_for(_SECONDS, say)


@pytest.mark.soak
@pytest.mark.timeout(seconds(_SOAK_SECONDS) + 600)
def test_any_order_of_anything_on_real_kernels_for_long(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNODE_MODEL_SECONDS", str(seconds(_SOAK_SECONDS)))  # new seeds
    _play_for(_SOAK_SECONDS, say)
