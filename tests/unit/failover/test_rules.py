"""Who is given up, and in which false alarms nobody is."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest

from csi.failover.observe import Unchanged
from csi.failover.rules import Held, Holdings, Reason, Rules, Silence, Situation, View, in_doubt, judge, suspects

RULES = Rules()
DRIVER = "csi.snode.io"
LOST, FRESH = 30.0, 3.0


def silence(seconds: float, *volumes: str, had_session: bool = True) -> Silence:
    return Silence(seconds, frozenset(volumes), had_session)


def situation(
    *views: View, stale: Collection[str] = ("a",), nodes: str = "abcdef", given_up: Collection[str] = ()
) -> Situation:
    """Six nodes and the SNODE's own, `s`."""
    leases = {node: LOST if node in stale else FRESH for node in [*nodes, "s"]}
    return Situation(leases, views, "s", frozenset(given_up))


def view(nodes: Mapping[str, Silence], *, snode: str = "s", driver: str = DRIVER) -> View:
    return View(snode, driver, nodes)


def held(*handles: str, driver: str = DRIVER, attached: bool = True) -> Holdings:
    return Holdings([Held(driver, handle, attached) for handle in handles], started=True)


SEES = view({"a": silence(20, "v1", "v2"), "b": silence(1)})


def verdicts(found: Situation, **holdings: Holdings) -> dict[str, Reason | None]:
    names = suspects(found, RULES)
    assert set(names) == set(holdings), "the suspects are not those of the test"
    return {verdict.node: verdict.reason for verdict in judge(found, RULES, holdings)}


def test_a_dead_node_is_given_up() -> None:
    found = situation(SEES)
    assert suspects(found, RULES) == ["a"]
    (verdict,) = judge(found, RULES, {"a": held("v1", "v2")})
    assert (verdict.reason, verdict.text) == (None, "no live session for 20 s, Lease not renewed for 30 s")


def test_the_only_node_with_volumes_may_be_given_up() -> None:
    assert verdicts(situation(view({"a": silence(20, "v1")})), a=held("v1")) == {"a": None}


@pytest.mark.parametrize(
    ("why", "found"),
    [
        ("kubelet is stopped: its sessions live", situation(view({"a": silence(2), "b": silence(1)}))),
        ("the network to the SNODE is cut: its Lease is fresh", situation(SEES, stale=())),
        ("it was heard of a moment ago", situation(view({"a": silence(14.9), "b": silence(1)}))),
        ("another SNODE hears of it", situation(SEES, view({"a": silence(1)}, snode="t", driver="t.io"))),
        ("it holds no volume of ours", situation(view({"b": silence(1)}))),
        ("no SNODE reports", situation()),
        ("it is being given up already", situation(SEES, given_up="a")),
        ("its Lease was removed with the node", situation(SEES, nodes="bcdef", stale=())),
    ],
)
def test_one_witness_is_not_enough(why: str, found: Situation) -> None:
    assert suspects(found, RULES) == [], why


@pytest.mark.parametrize(
    ("reason", "found", "holds"),
    [
        # Everybody is silent: the SNODE's network is cut, or tgtd hangs.
        (Reason.CUT_OFF, situation(view({"a": silence(20, "v1"), "b": silence(20, "v2")})), held("v1")),
        # The other one is not silent for long enough to be lost, nor heard of lately.
        (Reason.CUT_OFF, situation(view({"a": silence(20, "v1"), "b": silence(9)})), held("v1")),
        # No kubelet can renew its Lease, and storage happens to be silent for one.
        (Reason.API, situation(SEES, stale="abcdefs"), held("v1")),
        (Reason.API, situation(SEES, stale="as"), held("v1")),
        (Reason.API, situation(SEES, stale="abcd"), held("v1")),
        (Reason.FOREIGN, situation(SEES), held("x", driver="ebs.csi.aws.com")),
        (Reason.FOREIGN, situation(SEES), held("x", driver="ebs.csi.aws.com", attached=False)),
        (Reason.UNKNOWN, situation(SEES), held("v1", "v9")),
        (Reason.UNUSED, situation(view({"a": silence(20, "v1", had_session=False)})), Holdings([], started=False)),
        (Reason.TAINTED, situation(SEES), Holdings([], started=True, out_of_service=True)),
        # One is given up already, and 34 % of 7 nodes is 2: two more are too many.
        (Reason.MANY, situation(view({"a": silence(20), "b": silence(1)}), given_up="cd"), held()),
    ],
)
def test_a_suspect_is_left_alone(reason: Reason, found: Situation, holds: Holdings) -> None:
    assert verdicts(found, a=holds) == {"a": reason}


def test_not_all_come_back_at_the_same_moment() -> None:
    """A switch was off: when it is on again, the first one is heard of before the second."""
    off = situation(view({"a": silence(20, "v1"), "b": silence(20)}), stale="ab")
    assert in_doubt(off, RULES) and in_doubt(situation(SEES, stale="as"), RULES)
    assert not in_doubt(situation(SEES), RULES)
    for seconds, reason in ((2.0, Reason.SETTLING), (14.0, Reason.SETTLING), (16.0, None)):
        assert verdicts(replace(situation(SEES), doubted=seconds), a=held("v1")) == {"a": reason}


def test_above_the_share_nobody_is_given_up() -> None:
    three = situation(view({n: silence(20) for n in "abc"} | {"d": silence(1)}), stale="abc")
    assert verdicts(three, a=held(), b=held(), c=held()) == dict.fromkeys("abc", Reason.MANY)
    two = situation(view({n: silence(20) for n in "ab"} | {"d": silence(1)}), stale="ab")
    assert verdicts(two, a=held(), b=held()) == {"a": None, "b": None}
    # One that is left alone for a reason of its own does not count.
    assert verdicts(three, a=held(), b=held(), c=held("x", driver="y")) == {"a": None, "b": None, "c": Reason.FOREIGN}


def test_one_node_always_may_be_given_up() -> None:
    small = Situation({"a": LOST, "s": FRESH}, [SEES], "s")
    assert verdicts(small, a=held()) == {"a": None}
    assert [Rules(most_percent=34).most(nodes) for nodes in (1, 2, 3, 6, 100)] == [1, 1, 1, 2, 34]


def test_a_lost_node_counts_until_it_is_back() -> None:
    """Two of three CNODEs, one after the other: the second one stays."""
    found = Situation(
        {"a": LOST, "b": LOST, "c": FRESH, "s": FRESH}, [view({"b": silence(20), "c": silence(1)})], "s", frozenset("a")
    )
    assert verdicts(found, b=held()) == {"b": Reason.MANY}


def test_volumes_of_several_snodes() -> None:
    other = view({"a": silence(25, "w1"), "b": silence(1)}, snode="t", driver="t.io")
    holds = Holdings([Held(DRIVER, "v1", True), Held("t.io", "w1", True)], started=True)
    assert verdicts(situation(SEES, other), a=holds) == {"a": None}
    # Its SNODE does not report: what it has exported can't be fenced.
    assert verdicts(situation(SEES), a=holds) == {"a": Reason.FOREIGN}
    # One SNODE that is cut off can't be sure, whatever the other sees.
    cut = view({"a": silence(25, "w1"), "b": silence(25)}, snode="t", driver="t.io")
    assert verdicts(situation(SEES, cut), a=holds) == {"a": Reason.CUT_OFF}


def test_a_volume_that_is_being_attached_needs_no_fence() -> None:
    holds = Holdings([Held(DRIVER, "v1", True), Held(DRIVER, "v9", False)], started=True)
    assert verdicts(situation(SEES), a=holds) == {"a": None}


# -- what stays the same ---------------------------------------------------------------------------------------------


def test_age_is_what_was_seen() -> None:
    leases = Unchanged(gap_seconds=8)
    leases.look({"a": "1", "b": "1"}, 100.0)
    assert leases.seconds(100.0) == {"a": 0, "b": 0}, "however old it is: it was not seen before"
    leases.look({"a": "1", "b": "2"}, 106.0)
    assert leases.seconds(107.0) == {"a": 7, "b": 1}
    assert leases.moving(107.0, within=5) == {"b"}
    leases.look({"b": "2", "c": "1"}, 110.0)
    assert leases.seconds(112.0) == {"b": 6, "c": 2}
    assert leases.moving(112.0, within=5) == frozenset(), "a first look proves no life"


@pytest.mark.parametrize("later", [109.0, 99.0, 1e9])
def test_what_was_not_looked_at_counts_as_changed(later: float) -> None:
    """The API server was gone, we were, or the clock is another one."""
    leases = Unchanged(gap_seconds=8)
    leases.look({"a": "1"}, 0.0)
    leases.look({"a": "1"}, 100.0)
    assert leases.seconds(later) == {} == dict.fromkeys(leases.moving(later, within=1e10))
    leases.look({"a": "1"}, later)
    assert leases.seconds(later) == {"a": 0}
