"""When a node is given up, and when not. Values in, verdicts out: no clock, no API, no tool.

Two witnesses that know nothing of each other must agree: the node's Lease, which its kubelet renews every 10 s, and the
SNODE, which hears from the node's iSCSI sessions every 5 s. And nothing is done as long as the silence may be our own:
where everybody is silent, it is we who are cut off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True)
class Rules:
    """Settings of [failover]."""

    after_seconds: float = 15.0  # no live session for so long
    lease_seconds: float = 25.0  # its Lease not renewed for so long
    most_percent: int = 34  # of the nodes may be given up at once, but one always may

    @property
    def alive_seconds(self) -> float:
        """Who was heard of within this time is alive for sure: sessions ping every 5 s."""
        return self.after_seconds / 2

    def most(self, nodes: int) -> int:
        """How many of so many nodes may be given up at once."""
        return max(1, nodes * self.most_percent // 100)


@dataclass(frozen=True)
class Silence:
    """What a SNODE knows of a node that holds volumes of it."""

    seconds: float  # since it was last heard of
    volumes: frozenset[str] = frozenset()  # ids; told when it is silent for some seconds only
    had_session: bool = False  # it was heard of at all, since the SNODE looks


@dataclass(frozen=True)
class View:
    """What one SNODE sees."""

    snode: str
    driver: str
    nodes: Mapping[str, Silence] = field(default_factory=dict)

    def cut_off(self, rules: Rules) -> bool:
        """Whether it hears of nobody, although there are several: then it is the SNODE that is cut off."""
        return len(self.nodes) > 1 and all(silence.seconds >= rules.alive_seconds for silence in self.nodes.values())


@dataclass(frozen=True)
class Situation:
    """Everything that is known in one moment."""

    leases: Mapping[str, float]  # of every node: seconds since its Lease was seen to change
    views: Sequence[View]  # of the SNODEs that report
    own_node: str  # the one we run on
    given_up: frozenset[str] = frozenset()  # nodes that we gave up before and that are not back
    doubted: float | None = None  # seconds since `in_doubt` was true; None = it never was


@dataclass(frozen=True)
class Held:
    """A volume that Kubernetes has attached to a node, or is about to."""

    driver: str
    handle: str
    attached: bool


@dataclass(frozen=True)
class Holdings:
    """What a suspect holds."""

    volumes: Sequence[Held]
    started: bool  # a pod of it that mounts one of our volumes has run
    out_of_service: bool = False  # has the taint from somebody else


class Reason(Enum):
    """Why a suspect is left alone; the value is a word for Events and metrics, fixed once released."""

    CUT_OFF = "SnodeCutOff"
    API = "ApiServerTrouble"
    SETTLING = "JustRecovered"
    MANY = "TooManyNodes"
    FOREIGN = "VolumesOfOthers"
    UNKNOWN = "VolumesUnaccounted"
    UNUSED = "VolumesNotInUse"
    TAINTED = "OutOfServiceAlready"


@dataclass(frozen=True)
class Verdict:
    """What is to be done about a suspect: give it up if `reason` is None."""

    node: str
    reason: Reason | None
    text: str


def in_doubt(situation: Situation, rules: Rules) -> bool:
    """Whether the fault may be ours: some time after that nobody is given up, as not all come back at once."""
    return any(view.cut_off(rules) for view in situation.views) or bool(_api_trouble(situation, rules))


def suspects(situation: Situation, rules: Rules) -> list[str]:
    """The nodes on which both witnesses agree, sorted."""
    return [
        node
        for node, seconds in sorted(situation.leases.items())
        if seconds >= rules.lease_seconds and node not in situation.given_up and _dark(situation, node, rules)
    ]


def judge(situation: Situation, rules: Rules, holdings: Mapping[str, Holdings]) -> list[Verdict]:
    """A verdict on each suspect. holdings: of each of them."""
    own = {node: _own_reason(situation, rules, node, held) for node, held in holdings.items()}
    # Those whom nothing of their own saves; others do not count against the share.
    lost = [node for node, reason in own.items() if reason is None]
    shared = _shared_reason(situation, rules, lost)
    return [
        _verdict(situation, node, reason or shared) for node, reason in sorted(own.items(), key=lambda item: item[0])
    ]


def _verdict(situation: Situation, node: str, reason: tuple[Reason, str] | None) -> Verdict:
    if reason is not None:
        return Verdict(node, reason[0], reason[1])
    silent = min(view.nodes[node].seconds for view in situation.views if node in view.nodes)
    lease = situation.leases[node]
    return Verdict(node, None, f"no live session for {silent:.0f} s, Lease not renewed for {lease:.0f} s")


def _dark(situation: Situation, node: str, rules: Rules) -> bool:
    """Whether SNODEs know the node, and none has heard of it."""
    known = [view.nodes[node] for view in situation.views if node in view.nodes]
    return bool(known) and all(silence.seconds >= rules.after_seconds for silence in known)


def _own_reason(situation: Situation, rules: Rules, node: str, held: Holdings) -> tuple[Reason, str] | None:
    """Why this node is left alone, whatever the others do."""
    views = [view for view in situation.views if node in view.nodes]
    if held.out_of_service:
        return Reason.TAINTED, "it is out of service already, by somebody else's taint"
    if not held.started and not any(view.nodes[node].had_session for view in views):
        return Reason.UNUSED, "no pod of it has begun to use a volume of ours"
    ours = {view.driver for view in situation.views}
    foreign = sorted({volume.driver for volume in held.volumes} - ours)
    if foreign:
        return Reason.FOREIGN, (
            f"it also holds volumes of {', '.join(foreign)}, from which we can't fence it; the taint would free those "
            "too. Make sure that it is off, then taint it yourself"
        )
    accounted = {(view.driver, volume) for view in views for volume in view.nodes[node].volumes}
    missing = sorted(v.handle for v in held.volumes if v.attached and (v.driver, v.handle) not in accounted)
    if missing:
        return Reason.UNKNOWN, (
            f"no SNODE that reports has exported {_some(missing)} to it, so nobody could fence it from there; see that "
            "`snode failover` runs on every SNODE"
        )
    cut_off = sorted(view.snode for view in views if view.cut_off(rules))
    if cut_off:
        return Reason.CUT_OFF, f"SNODE {', '.join(cut_off)} hears of no node at all: it is cut off itself"
    return None


def _shared_reason(situation: Situation, rules: Rules, lost: Sequence[str]) -> tuple[Reason, str] | None:
    """Why none of them is given up, if all of them would be."""
    if trouble := _api_trouble(situation, rules):
        return Reason.API, trouble
    if situation.doubted is not None and situation.doubted < rules.after_seconds:
        return Reason.SETTLING, (
            f"{situation.doubted:.0f} s ago more than this node was silent; not all come back at the same moment"
        )
    leases = situation.leases
    most, given_up = rules.most(len(leases)), situation.given_up & leases.keys()
    if len(lost) + len(given_up) > most:
        names = ", ".join(sorted({*lost, *given_up})[:10])
        return Reason.MANY, (
            f"{len(lost) + len(given_up)} of {len(leases)} nodes would be given up ({names}), and "
            f"failover.most_percent ({rules.most_percent}) allows {most}"
        )
    return None


def _api_trouble(situation: Situation, rules: Rules) -> str:
    """What says that Leases are not renewed for another reason than their nodes."""
    leases = situation.leases
    stale = {node for node, seconds in leases.items() if seconds >= rules.lease_seconds}
    if situation.own_node in stale:
        return f"the Lease of our own node {situation.own_node} is not renewed either"
    running = leases.keys() - situation.given_up
    if 2 * len(running & stale) > len(running):
        return f"the Leases of {len(stale)} of {len(leases)} nodes are not renewed: it is not the nodes"
    return ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"volume {', '.join(names[:3])}{more}"
