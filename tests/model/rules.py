"""The rules of the model: what an orchestrator, its machines and its applications may do, on any ground."""

import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from hypothesis import strategies as st
from hypothesis.errors import StopTest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.model.book import CAPABILITIES, KINDS, MEANWHILE, MIB, Call, Event, Trouble
from tests.model.checks import Checks
from tests.model.events import Events
from tests.model.ground import Ground
from tests.model.on_fakes import OnFakes
from tests.model.orchestrator import Orchestrator

# No draw depends on the state of the world: what a thread did in time must not change what is drawn.
_VOLUMES = st.sampled_from([0, 0, 0, 0, 1, 1, 2])
_NODES = st.sampled_from([0, 0, 1])
_PLACES = st.sampled_from([0, 0, 0, 0, 1, 2])
_ODD = st.sampled_from([False, False, False, True])
_WAYS = st.sampled_from(["ext4", "ext4", "ext4", *CAPABILITIES])
_SIZES = st.sampled_from([16 * MIB] * 5 + [24 * MIB] * 2 + [MIB, 320 * MIB, 330 * MIB])
CONTROLLER = ("create", "delete", "publish", "unpublish", "expand", "list", "get", "validate", "capacity", "probe")
NODE = ("stage", "unstage", "node publish", "node unpublish", "stats", "health", "node expand", "info")


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


def events(*kinds: str) -> st.SearchStrategy[Event]:
    """Any event of these kinds."""
    return st.builds(Event, kind=st.sampled_from(kinds), node=_NODES, volume=_VOLUMES)


def troubles(*kinds: str) -> st.SearchStrategy[Trouble | None]:
    """Any trouble of these kinds; "" = none."""
    percent = st.integers(0, 99)
    known: dict[str, st.SearchStrategy[Trouble | None]] = {
        "": st.none(),
        "kill": st.builds(Trouble, st.just("kill"), percent),
        "tgtd": st.builds(
            Trouble, st.just("tgtd"), percent, st.sampled_from(["cut", "half", "die", "refuse"]), st.booleans()
        ),
        "command": st.builds(Trouble, st.just("command"), percent, after=st.booleans()),
        "meanwhile": st.builds(
            Trouble, st.just("meanwhile"), percent, meanwhile=calls(*CONTROLLER, *NODE) | events(*MEANWHILE)
        ),
    }
    return st.sampled_from(kinds).flatmap(lambda kind: known[kind])


_SOME = troubles("", "", "kill", "tgtd", "meanwhile")
_MORE = troubles("", "", "kill", "tgtd", "command", "meanwhile")
_KILLS = troubles("", "kill", "kill", "meanwhile")


def step(**draws: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that does nothing any more once the time of the model is over."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def act(model: "Model", *given: Any, **named: Any) -> None:
            if not model.is_over:
                function(model, *given, **named)

        decorated: Callable[..., None] = cast(Any, rule)(**draws)(act)
        return decorated

    return decorate


class Model(RuleBasedStateMachine):
    """The rules, on fakes; a subclass gives another ground. `until`: when its time is over, by the monotonic clock."""

    until = math.inf

    def __init__(self) -> None:
        super().__init__()
        self.ground = self.make_ground()
        self.orchestrator = Orchestrator(self.ground)
        self.events = Events(self.orchestrator)
        self.checks = Checks(self.orchestrator, self.events)

    def make_ground(self) -> Ground:
        """What this model acts on."""
        return OnFakes()

    @step(call=calls(*CONTROLLER), trouble=_SOME)
    def controller(self, call: Call, trouble: Trouble | None) -> None:
        """A request to the SNODE."""
        self._do(call, trouble)

    @step(call=calls(*NODE), trouble=_MORE)
    def node(self, call: Call, trouble: Trouble | None) -> None:
        """A request to a CNODE."""
        self._do(call, trouble)

    @step(call=calls("", ""), upto=st.integers(2, 5), trouble=_MORE, at=st.integers(0, 3))
    def attach(self, call: Call, upto: int, trouble: Trouble | None, at: int) -> None:
        """The way to a running container, or a part of it, disturbed at one of its requests and then repeated."""
        self._chain(("create", "publish", "stage", "node publish")[:upto], call, trouble, at)
        if upto == 5:
            self.write(call)

    @step(call=calls(""), upto=st.integers(1, 4), trouble=_MORE, at=st.integers(0, 3))
    def detach(self, call: Call, upto: int, trouble: Trouble | None, at: int) -> None:
        """The way back."""
        self._chain(("node unpublish", "unstage", "unpublish", "delete")[:upto], call, trouble, at)

    @step(call=calls(""), trouble=_KILLS, new=st.booleans(), damaged=st.booleans(), odd=st.booleans())
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

    @step(call=calls("expand"), trouble=_MORE, at=st.integers(0, 1))
    def grow(self, call: Call, trouble: Trouble | None, at: int) -> None:
        """Growth on both sides."""
        self._chain(("expand", "node expand"), call, trouble, at)

    @step(event=events(*KINDS), trouble=troubles("", "", "kill", "tgtd", "command", "meanwhile"))
    def event(self, event: Event, trouble: Trouble | None) -> None:
        """Something happens beside the requests."""
        self._disturbed(trouble, event, lambda sure: self.events.happen(event, sure=sure))

    @step(call=calls("write"))
    def write(self, call: Call) -> None:
        """An application writes where its volume is published, and reads what is there."""
        known, node = self.orchestrator.volumes[call.volume], self.ground.nodes[call.node]
        path = self.orchestrator.target_path(call)
        as_block = known.shown.get((call.node, path))
        published = known.published.get(call.node)
        if as_block is None or known.damaged or as_block != node.is_block(path):
            return
        record = known.next_record()
        if node.write(path, record):
            assert published is not None and not published.readonly, "a node wrote that may only read, or nothing"
            known.acknowledged.append(record)
            known.raw = as_block
        self.checks.complete(known, node.read(path))

    @step(volume=_VOLUMES, node=_NODES)
    def usable(self, volume: int, node: int) -> None:
        """From any state there is a way back to a volume that works."""
        self.checks.usable(self.orchestrator.volumes[volume], node)

    @invariant()
    def always(self) -> None:
        """What must hold between any two steps."""
        if not self.is_over:
            self.checks.always()

    @property
    def is_over(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.until

    def teardown(self) -> None:
        """Nothing is left in the end. Not looked at after a failure, which it would hide."""
        failed = True
        try:
            if self.failure() is None:
                self.checks.end()
                failed = False
        finally:
            self.ground.close(failed=failed)

    @staticmethod
    def failure() -> BaseException | None:
        """What ends the run just now, unless it is Hypothesis itself."""
        error = sys.exception()
        return None if isinstance(error, StopTest) else error

    # -- parts ---------------------------------------------------------------------------------------------------

    def _chain(self, kinds: Sequence[str], call: Call, trouble: Trouble | None, at: int) -> None:
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
        self.orchestrator.refused_by_hand = trouble.how == "refuse" or trouble.kind == "command"
        other = trouble.meanwhile

        def meanwhile() -> None:
            assert other is not None
            if isinstance(other, Event):
                self.events.happen(other)
            else:
                self.orchestrator.do(other, sure=False)

        self.orchestrator.note(f"{what.kind}: {trouble}")
        both = [call for call in (what, other) if isinstance(call, Call)]
        try:
            with self.orchestrator.at_once(both if len(both) == 2 else []):
                self.ground.disturbed(trouble, what, lambda: act(False), meanwhile)
        finally:
            self.orchestrator.refused_by_hand = False
