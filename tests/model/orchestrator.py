"""An orchestrator: makes calls in any order and keeps account of what was acknowledged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.model.book import Call
from tests.model.caller import Caller
from tests.model.controller_calls import ControllerCalls
from tests.model.ground import Ground, Reply
from tests.model.node_calls import NodeCalls


class Orchestrator(Caller):
    """`sure`, given to `do`: nothing disturbs the call, so its answer is known beforehand in many cases."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        self._kinds = {**ControllerCalls(self).kinds, **NodeCalls(self).kinds}

    def do(self, call: Call, *, sure: bool) -> Reply | None:
        """Make a call. Returns None when the node has no power to answer."""
        return self._kinds[call.kind](call, sure)

    @contextmanager
    def at_once(self, calls: Sequence[Call]) -> Iterator[None]:
        """These calls are made at once, in the time of the block; where the ground does not tell in which order they
        take effect, what they say of one volume is then known less well.
        """
        if self.ground.exact or len(calls) < 2:
            yield
            return
        before = [known.copy() for known in self.volumes]
        self.alone = False
        try:
            yield
        finally:
            self.alone = True
            for index, known in enumerate(self.volumes):
                own = [call for call in calls if call.volume == index]
                if len(own) > 1:
                    known.blur(before[index], own, [(call.node, self._path_of(call)) for call in own])

    def _path_of(self, call: Call) -> Path:
        return self.staging_path(call) if call.kind == "stage" else self.target_path(call)
