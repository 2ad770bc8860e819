"""Failover without a human, a round at a time. What it decides by stands in rules.py; here it is looked up and done.

Each SNODE looks at its sessions, carries out the orders that stand, and reports both. The one that leads also judges,
orders, marks the nodes that all have fenced, and unmarks them when they are back and clean. Everything that must
outlive a crash stands in the API: the orders in the leader's Lease, the marks on the nodes.
"""

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from csi.deadline import Deadline
from csi.errors import Busy, DriverError, NotFound
from csi.failover import rules as rules_
from csi.failover.board import Board, Order, Reports
from csi.failover.nodes import Nodes, mark_of
from csi.failover.observe import Unchanged
from csi.failover.rules import Holdings, Rules, Situation, Verdict, View
from csi.failover.teller import Teller
from csi.failover.view import Sight
from csi.kube import Kube
from csi.kube_objects import Node
from csi.log import get_logger
from csi.model import Publication

#: Seconds from the end of a round to the next, and while an order stands.
ROUND_SECONDS, HURRY_SECONDS = 2.0, 0.1
#: A longer pause (the API did not answer) is no observation.
GAP_SECONDS = 8.0
_FENCES_AT_ONCE = 4

#: Fences a node from a volume: ControllerUnpublishVolume of this SNODE.
Fence = Callable[[Publication], None]


class Failover:
    """One SNODE's part in it."""

    def __init__(
        self,
        kube: Kube,
        watch: Sight,
        fence: Fence,
        *,
        name: str,
        rules: Rules,
        act: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """name: of our node. act: False = decide and tell, and do nothing."""
        self._kube = kube
        self._watch = watch
        self._fence = fence
        self.name = name
        self._rules = rules
        self._act = act
        self._clock = clock
        self._nodes = Nodes(kube)
        self._board = Board(kube, snode=name, gap_seconds=GAP_SECONDS)
        self._leases = Unchanged(gap_seconds=GAP_SECONDS)
        self.teller = Teller(kube, reporter=name)
        self.leading = False
        self.view: View | None = None
        self.given_up: frozenset[str] = frozenset()
        self._fenced: frozenset[str] = frozenset()  # ids of orders
        self._began: dict[str, float] = {}  # ids of orders: when we saw them first
        self._doubted_at: float | None = None
        self._done: set[str] = set()  # nodes that hold nothing of ours any more
        self._log = get_logger("failover")

    def round(self, deadline: Deadline) -> float:
        """Do what there is to do now; returns the seconds until the next round. Raises what can't be had now."""
        orders: Sequence[Order] = self._board.read(self._clock())
        self._began = {order.id: self._began.get(order.id, self._clock()) for order in orders}
        self._carry_out(orders)
        blind = self._look(deadline)
        if self.view is not None:
            self._board.report(self.view, sorted(self._fenced))
        self.leading = self._board.lead(orders, self._clock())
        if self.leading:
            orders = self._lead(orders)
        if blind is not None:
            raise blind
        hurry = any(self._clock() - self._began.get(order.id, self._clock()) < GAP_SECONDS for order in orders)
        return HURRY_SECONDS if hurry else ROUND_SECONDS

    def stop(self) -> None:
        """Let another one lead."""
        self._board.resign()

    # -- every SNODE ---------------------------------------------------------------------------------------------

    def _look(self, deadline: Deadline) -> DriverError | None:
        """See our sessions; the error when they can't be seen: then we report nothing, and are not counted on."""
        self.view = None
        try:
            self.view = self._watch.look(deadline)
        except DriverError as error:
            return error
        return None

    def _carry_out(self, orders: Sequence[Order]) -> None:
        """Fence the nodes that are to be given up, here. What can't be done now is tried again in the next round."""
        self._fenced = frozenset(order.id for order in orders if self._fence_node(order))

    def _fence_node(self, order: Order) -> bool:
        held = [one for one in self._watch.publications() if one.node.name == order.node]
        if not held:
            return True
        with ThreadPoolExecutor(_FENCES_AT_ONCE, thread_name_prefix="fence") as pool:
            failures = [failure for failure in pool.map(self._try_fence, held) if failure]
        if failures:
            self._tell(order.node, "FencingFailed", f"{failures[0]}; it is repeated")
        return not any(one.node.name == order.node for one in self._watch.publications())

    def _try_fence(self, publication: Publication) -> str:
        try:
            self._fence(publication)
        except DriverError as error:
            return f"volume {publication.volume_id}: {error}"
        return ""

    # -- the leader ----------------------------------------------------------------------------------------------

    def _lead(self, orders: Sequence[Order]) -> Sequence[Order]:
        """Mark who is fenced, unmark who is back, give up who is lost; returns the orders that stand now."""
        reports = self._board.reports(self._clock())
        self._leases.look(self._kube.node_leases(), self._clock())
        marked = self._nodes.marked()
        self.given_up = frozenset({*marked, *(order.node for order in orders)})
        self._done &= marked.keys()
        after = [order for order in orders if not self._finish(order, reports)]
        for node in marked.values():
            with suppress(NotFound):
                self._follow_up(node)
        after += self._judge(reports)
        if after != list(orders) and not self._board.lead(after, self._clock()):
            raise Busy(f"node {self.name}: another SNODE leads now")
        return after

    def _judge(self, reports: Reports) -> list[Order]:
        """New orders, one for each node that is to be given up."""
        now = self._clock()
        situation = Situation(self._leases.seconds(now), reports.views, self.name, self.given_up)
        if rules_.in_doubt(situation, self._rules):
            self._doubted_at = now
        elif self._doubted_at is not None:
            situation = replace(situation, doubted=now - self._doubted_at)
        found = rules_.suspects(situation, self._rules)
        self.teller.forget_others({*found, *self.given_up})
        drivers = {view.driver for view in situation.views}
        looked: dict[str, tuple[Holdings, frozenset[str]]] = {}
        for node in found:
            with suppress(NotFound):  # its Lease outlives it for a moment
                looked[node] = self._nodes.holdings(node, drivers)
        orders = []
        for verdict in rules_.judge(situation, self._rules, {node: held for node, (held, _) in looked.items()}):
            node, text = verdict.node, verdict.text
            if verdict.reason is not None:
                self._tell(node, "FailoverRefused", f"{verdict.reason.value}: {text}", about=verdict.reason.value)
            elif not self._act:
                self._tell(node, "FailoverWouldAct", f"{text}; nothing is done, since failover.mode is observe")
            elif self._kube.node_lease(node) == self._leases.text(node):
                views = [view for view in situation.views if node in view.nodes]
                orders.append(_order(verdict, views, looked[node][1]))
                self._tell(node, "FailoverBegins", f"{text}; its volumes are taken from it, then it is out of service")
        return orders

    def _finish(self, order: Order, reports: Reports) -> bool:
        """Mark a node that every SNODE has fenced; False = not yet."""
        if not reports.done(order):
            if self._clock() - self._began[order.id] > GAP_SECONDS:
                missing = [one for one in order.snodes if order.id not in reports.fenced.get(one, frozenset())]
                self._tell(order.node, "FailoverWaiting", f"not fenced yet by SNODE {', '.join(missing)}")
            return False
        if not self._board.leads(self._clock()):
            raise Busy(f"node {self.name}: the round took too long, it does not lead any more")
        try:
            self._nodes.mark(order)
        except NotFound:
            return True  # removed from the cluster
        self._nodes.forget_pods(order.claims, order.node)
        self._tell(order.node, "FailoverMarked", f"fenced by SNODE {', '.join(order.snodes)}: out of service")
        return True

    def _follow_up(self, node: Node) -> None:
        """Clear a node that was given up; take the mark off when it is back and clean."""
        mark = mark_of(node)
        if not self._nodes.is_tainted(node):
            self._nodes.unmark(node.name)
            self._tell(node.name, "FailoverEnded", "somebody else took the taint away", warning=False)
            return
        back = node.ready and node.name in self._leases.moving(self._clock(), within=self._rules.lease_seconds)
        if not back:
            if node.name not in self._done:
                self._nodes.forget_pods(mark.claims, node.name)
                left = self._nodes.leftovers(node)
                if not (left.pods or left.attachments):
                    self._done.add(node.name)
                    self._tell(node.name, "FailoverDone", "no volume of ours is attached to it", warning=False)
            return
        left = self._nodes.leftovers(node)
        if left:
            self._tell(node.name, "FailoverWaiting", f"the node is back, but not clean yet: {left}", about="back")
            return
        self._nodes.unmark(node.name)
        self._tell(node.name, "FailoverEnded", "the node is back and clean: in service again", warning=False)

    def _tell(self, node: str, reason: str, message: str, *, warning: bool = True, about: str = "") -> None:
        self.teller.tell(node, reason, message, warning=warning, now=self._clock(), about=about)


def _order(verdict: Verdict, views: Sequence[View], claims: Collection[str]) -> Order:
    return Order(
        id=secrets.token_hex(8),
        node=verdict.node,
        why=verdict.text,
        snodes=tuple(sorted(view.snode for view in views)),
        drivers=tuple(sorted({view.driver for view in views})),
        claims=tuple(sorted(claims)),
    )
