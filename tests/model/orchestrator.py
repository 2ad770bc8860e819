"""An orchestrator: makes calls in any order and keeps account of what was acknowledged."""

from tests.model.book import Call
from tests.model.caller import Caller
from tests.model.controller_calls import ControllerCalls
from tests.model.node_calls import NodeCalls
from tests.model.world import Reply, World


class Orchestrator(Caller):
    """`sure`, given to `do`: nothing disturbs the call, so its answer is known beforehand in many cases."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._kinds = {**ControllerCalls(self).kinds, **NodeCalls(self).kinds}

    def do(self, call: Call, *, sure: bool) -> Reply | None:
        """Make a call. Returns None when the node has no power to answer."""
        return self._kinds[call.kind](call, sure)
