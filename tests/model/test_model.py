"""A random orchestrator against the whole driver: any request in any order, repeated, killed, disturbed, together with
others; and what must hold then.

The normal run takes half a minute and plays the same seeds each time, so that a change is judged by what it changes.
SNODE_MODEL_SECONDS=3600 plays new ones for an hour. A failure prints its seed, which plays the same again:
SNODE_MODEL_SEED=… python -m pytest tests/model/test_model.py
"""

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.fakes.crash import Crash
from tests.model.book import CAPABILITIES, MIB, Call
from tests.model.checks import Checks
from tests.model.events import KINDS, MEANWHILE, Event, Events
from tests.model.orchestrator import Orchestrator
from tests.model.patience import crash
from tests.model.world import World

SECONDS = float(os.environ.get("SNODE_MODEL_SECONDS", "22"))
SEED = os.environ.get("SNODE_MODEL_SEED", "")
_EXAMPLES, _STEPS = 5, 40

# No draw depends on the state of the world: what a thread did in time must not change what is drawn.
_VOLUMES = st.sampled_from([0, 0, 0, 0, 1, 1, 2])
_NODES = st.sampled_from([0, 0, 1])
_PLACES = st.sampled_from([0, 0, 0, 0, 1, 2])
_ODD = st.sampled_from([False, False, False, True])
_WAYS = st.sampled_from(["ext4", "ext4", "ext4", *CAPABILITIES])
_SIZES = st.sampled_from([16 * MIB] * 5 + [24 * MIB] * 2 + [MIB, 320 * MIB, 330 * MIB])
_CONTROLLER = ("create", "delete", "publish", "unpublish", "expand", "list", "get", "validate", "capacity", "probe")
_NODE = ("stage", "unstage", "node publish", "node unpublish", "stats", "node expand", "info")
#: Records, calls to tgtd and commands, before and after each, of the longest request of a kind.
_MOST_STEPS = {
    "create": 5,
    "delete": 4,
    "publish": 26,
    "unpublish": 20,
    "expand": 24,
    "stage": 60,
    "unstage": 16,
    "node publish": 9,
    "node unpublish": 6,
    "node expand": 7,
    "tend": 24,
    "tend node": 12,
}


def calls(*kinds: str) -> st.SearchStrategy[Call]:
    """Any call of these kinds."""
    return st.builds(
        Call,
        kind=st.sampled_from(kinds),
        volume=_VOLUMES,
        node=_NODES,
        way=_WAYS,
        size=_SIZES,
        place=_PLACES,
        readonly=_ODD,
        odd=_ODD,
    )


@dataclass(frozen=True)
class Trouble:
    """What happens at a step of a request: its service is killed, tgtd or a command fails, or something else comes."""

    kind: str
    percent: int  # how far the request is then, of the most steps that it may have
    how: str = ""
    after: bool = False
    meanwhile: Call | Event | None = None

    def step(self, kind: str, *, each: int = 1) -> int:
        """The number of the step (or of every so many) for a request or event of this kind."""
        return self.percent * _MOST_STEPS.get(kind, 4) // each // 100 + 1


def _troubles(*kinds: str) -> st.SearchStrategy[Trouble | None]:
    steps = st.integers(0, 99)
    known: dict[str, st.SearchStrategy[Trouble | None]] = {
        "": st.none(),
        "kill": st.builds(Trouble, st.just("kill"), steps),
        "tgtd": st.builds(
            Trouble, st.just("tgtd"), steps, st.sampled_from(["cut", "half", "die", "refuse"]), st.booleans()
        ),
        "command": st.builds(Trouble, st.just("command"), steps, after=st.booleans()),
        "meanwhile": st.builds(
            Trouble, st.just("meanwhile"), steps, meanwhile=calls(*_CONTROLLER, *_NODE) | events(*MEANWHILE)
        ),
    }
    return st.sampled_from(kinds).flatmap(lambda kind: known[kind])


def events(*kinds: str) -> st.SearchStrategy[Event]:
    """Any event of these kinds."""
    return st.builds(Event, kind=st.sampled_from(kinds), node=_NODES, volume=_VOLUMES)


_SOME = _troubles("", "", "kill", "tgtd", "meanwhile")
_MORE = _troubles("", "", "kill", "tgtd", "command", "meanwhile")
_KILLS = _troubles("", "kill", "kill", "meanwhile")


class Model(RuleBasedStateMachine):
    """The rules: what an orchestrator, its machines and its applications may do."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.orchestrator = Orchestrator(self.world)
        self.events = Events(self.orchestrator)
        self.checks = Checks(self.orchestrator, self.events)

    @rule(call=calls(*_CONTROLLER), trouble=_SOME)
    def controller(self, call: Call, trouble: Trouble | None) -> None:
        """A request to the SNODE."""
        self._do(call, trouble)

    @rule(call=calls(*_NODE), trouble=_MORE)
    def node(self, call: Call, trouble: Trouble | None) -> None:
        """A request to a CNODE."""
        self._do(call, trouble)

    @rule(call=calls("", ""), upto=st.integers(2, 5), trouble=_MORE, at=st.integers(0, 3))
    def attach(self, call: Call, upto: int, trouble: Trouble | None, at: int) -> None:
        """The way to a running container, or a part of it, disturbed at one of its requests and then repeated."""
        self._chain(("create", "publish", "stage", "node publish")[:upto], call, trouble, at)
        if upto == 5:
            self.write(call)

    @rule(call=calls(""), upto=st.integers(1, 4), trouble=_MORE, at=st.integers(0, 3))
    def detach(self, call: Call, upto: int, trouble: Trouble | None, at: int) -> None:
        """The way back."""
        self._chain(("node unpublish", "unstage", "unpublish", "delete")[:upto], call, trouble, at)

    @rule(call=calls(""), trouble=_KILLS, new=st.booleans(), damaged=st.booleans(), odd=st.booleans())
    def stage_again(self, call: Call, trouble: Trouble | None, new: bool, damaged: bool, odd: bool) -> None:
        """A container ends and another one starts on the same node, within one publication, on what is left by then."""
        if new:
            self._chain(("node unpublish", "unstage", "unpublish", "delete"), call, None, 0)
        self._chain(("create", "publish", "stage", "node publish"), call, trouble, 2)
        self.write(call)
        self._chain(("node unpublish", "unstage"), call, None, 0)
        if damaged:
            self.events.happen(Event("damage", volume=call.volume))
        self._do(replace(call, kind="stage", odd=odd), None)
        self._do(replace(call, kind="node publish"), None)
        self.write(call)

    @rule(call=calls("expand"), trouble=_MORE, at=st.integers(0, 1))
    def grow(self, call: Call, trouble: Trouble | None, at: int) -> None:
        """Growth on both sides."""
        self._chain(("expand", "node expand"), call, trouble, at)

    @rule(event=events(*KINDS), trouble=_troubles("", "", "kill", "tgtd", "command", "meanwhile"))
    def event(self, event: Event, trouble: Trouble | None) -> None:
        """Something happens beside the requests."""
        self._disturbed(trouble, event, lambda sure: self.events.happen(event, sure=sure))

    @rule(call=calls("write"))
    def write(self, call: Call) -> None:
        """An application writes where its volume is published, and reads what is there."""
        known, node = self.orchestrator.volumes[call.volume], self.world.nodes[call.node]
        path = self.orchestrator.target_path(call)
        as_block = known.shown.get((call.node, path))
        published = known.published.get(call.node)
        if as_block is None or as_block != node.is_block(path):
            return
        record = known.next_record()
        if node.write(path, record):
            assert published is not None and not published.readonly, "a node wrote that may only read, or nothing"
            known.acknowledged.append(record)
        seen = node.read(path)
        assert seen is None or set(known.acknowledged) <= set(seen)

    @rule(volume=_VOLUMES, node=_NODES)
    def usable(self, volume: int, node: int) -> None:
        """From any state there is a way back to a volume that works."""
        self.checks.usable(self.orchestrator.volumes[volume], node)

    @invariant()
    def always(self) -> None:
        """What must hold between any two steps."""
        self.checks.always()

    def teardown(self) -> None:
        """Nothing is left in the end."""
        try:
            self.checks.end()
        finally:
            self.world.close()

    # -- parts ---------------------------------------------------------------------------------------------------

    def _chain(self, kinds: tuple[str, ...], call: Call, trouble: Trouble | None, at: int) -> None:
        at %= len(kinds)
        for index, kind in enumerate(kinds):
            step = Call(kind, call.volume, call.node, call.way, call.size, call.place, call.readonly)
            self._do(step, trouble if index == at else None)
            if index == at and trouble is not None:
                self._do(step, None)

    def _do(self, call: Call, trouble: Trouble | None) -> None:
        def act(sure: bool) -> None:
            self.orchestrator.do(call, sure=sure)

        self._disturbed(trouble, call, act)

    def _disturbed(self, trouble: Trouble | None, what: Call | Event, act: Callable[[bool], None]) -> None:
        if trouble is None:
            act(True)
            return
        on_node = what.kind in _NODE or what.kind == "tend node"
        node = self.world.nodes[what.node]
        steps = node.steps if on_node else self.world.steps
        joins: list[Callable[[], None]] = []
        self.orchestrator.refused_by_hand = trouble.how == "refuse" or trouble.kind == "command"
        if trouble.kind == "kill":
            steps.arm(trouble.step(what.kind), crash)
        elif trouble.kind == "tgtd":
            self.world.tgtd.fail("*", nth=trouble.step(what.kind, each=2), after=trouble.after, how=trouble.how)
        elif trouble.kind == "command":
            node.runner.fail(nth=trouble.step(what.kind, each=3), after=trouble.after)
        else:
            other = trouble.meanwhile
            assert other is not None
            beside = self.world.patience.beside
            steps.arm(trouble.step(what.kind), lambda _name: joins.append(beside(lambda: self._other(other))))
        try:
            act(False)
        except Crash:
            (node if on_node else self.world).start()
        finally:
            for join in joins:
                join()
            steps.disarm()
            self.world.tgtd.forgive()
            node.runner.forgive()
            self.orchestrator.refused_by_hand = False

    def _other(self, other: Call | Event) -> None:
        if isinstance(other, Event):
            self.events.happen(other)
        else:
            self.orchestrator.do(other, sure=False)


def _play(seed: int) -> None:
    """Some examples from a seed. A failure is made small, and its seed is told."""
    machine: Any = hypothesis.seed(seed)(type("Model", (Model,), {}))
    chosen = settings(
        max_examples=_EXAMPLES,
        stateful_step_count=_STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    try:
        run_state_machine_as_test(machine, settings=chosen)
    except BaseException as error:
        error.add_note(f"Play it again: SNODE_MODEL_SEED={seed} python -m pytest tests/model/test_model.py")
        raise


@pytest.mark.timeout(SECONDS + 900)  # a failure takes its time to be made small
def test_any_order_of_anything() -> None:
    if SEED:
        _play(int(SEED))
        return
    end = time.monotonic() + SECONDS
    fresh = "SNODE_MODEL_SECONDS" in os.environ
    played = 0
    while time.monotonic() < end:
        played += 1
        _play(secrets.randbelow(1 << 32) if fresh else played)
    print(f"{played * _EXAMPLES} runs of {_STEPS} steps")
