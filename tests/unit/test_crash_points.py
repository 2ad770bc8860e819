"""The driver is killed at every step of every request, started again, and the request repeated; see crash_points.py."""

import pytest

from tests.unit import crash_controller, crash_loop, crash_node
from tests.unit.crash_points import Case, visit

CASES = [*crash_controller.cases(), *crash_node.cases(), *crash_loop.cases()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kill_at_every_step_then_repeat(case: Case) -> None:
    assert visit(case, tend_first=0) > 0


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kill_at_every_step_then_repeat_the_other_way_around(case: Case) -> None:
    """Where the background had a turn before the repetition it has none, and the reverse."""
    assert visit(case, tend_first=1) > 0
