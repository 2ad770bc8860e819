"""What the SNODEs tell each other, in Leases of our namespace: who leads, what the leader orders, what each one sees.

The leader's Lease holds the orders, too. It is replaced by its version only, so that an order is the leader's for sure,
and the next leader finds it there and goes on with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from csi.errors import Busy, Conflict, DataLoss
from csi.failover import view as views
from csi.failover.observe import Unchanged
from csi.failover.rules import View
from csi.kube import Kube
from csi.kube_objects import Lease

LEADER = "snode-failover"
_LABEL = "snode.io/failover"
_VIEW, _FENCED, _ORDERS = "snode.io/failover-view", "snode.io/failover-fenced", "snode.io/failover-orders"
_FORMAT = 1
#: A leader that does not renew for so long is replaced, and itself stops before that.
LEADER_SECONDS = 15.0
#: A SNODE that does not report for so long is not counted on.
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Order:
    """To fence a node; it stands until the node is marked."""

    id: str
    node: str
    why: str
    snodes: tuple[str, ...]  # those that have to report it done
    drivers: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()  # "namespace/name" of the claims whose volumes it holds


@dataclass(frozen=True)
class Reports:
    """What the SNODEs tell."""

    views: tuple[View, ...] = ()
    fenced: Mapping[str, frozenset[str]] = field(default_factory=dict)  # by SNODE: ids of orders that are done

    def done(self, order: Order) -> bool:
        """Whether every SNODE concerned has fenced the node."""
        return all(order.id in self.fenced.get(snode, frozenset()) for snode in order.snodes)


class Board:
    """The Leases, as one SNODE uses them. `gap_seconds`: see Unchanged."""

    def __init__(self, kube: Kube, *, snode: str, gap_seconds: float) -> None:
        """snode: our name; one process of that name may run."""
        self._kube = kube
        self._snode = snode
        self._leaders = Unchanged(gap_seconds=gap_seconds)
        self._reports = Unchanged(gap_seconds=gap_seconds)
        self._leader = Lease(LEADER)
        self._own = Lease(f"{LEADER}-{snode}")
        self._renewed_at: float | None = None

    def read(self, now: float) -> tuple[Order, ...]:
        """The orders that stand."""
        self._leader = self._kube.find_lease(LEADER) or Lease(LEADER)
        self._leaders.look({LEADER: self._leader.version} if self._leader.version else {}, now)
        return _orders(self._leader.annotations.get(_ORDERS, ""))

    def report(self, view: View, fenced: Sequence[str]) -> None:
        """Tell what we see, and which orders we have carried out."""
        own = self._own if self._own.version else self._kube.find_lease(self._own.name) or self._own
        annotations = {_VIEW: views.to_text(view), _FENCED: json.dumps(sorted(fenced))}
        try:
            self._own = self._put(replace(own, holder=self._snode, annotations=annotations), kind="view")
        except (Busy, Conflict):
            self._own = Lease(own.name)  # somebody touched it; it is read anew next time

    def lead(self, orders: Sequence[Order], now: float) -> bool:
        """Be the leader, with these orders, if nobody else is; whether we are. Call it after `read`."""
        lease, self._renewed_at = self._leader, None
        theirs = bool(lease.version) and lease.holder not in (self._snode, "")
        if theirs and self._leaders.seconds(now).get(LEADER, 0.0) < LEADER_SECONDS:
            return False
        annotations = {_ORDERS: _orders_text(orders)}
        try:
            self._leader = self._put(replace(lease, holder=self._snode, annotations=annotations), kind="leader")
        except (Busy, Conflict):
            return False
        self._renewed_at = now
        return True

    def leads(self, now: float) -> bool:
        """Whether we are the leader still, for sure."""
        return self._renewed_at is not None and 0 <= now - self._renewed_at < LEADER_SECONDS * 2 / 3

    def reports(self, now: float) -> Reports:
        """What the SNODEs tell that report regularly."""
        leases = {lease.name: lease for lease in self._kube.leases(f"{_LABEL}=view")}
        self._reports.look({name: lease.version for name, lease in leases.items()}, now)
        moving = self._reports.moving(now, within=REPORT_SECONDS)
        fresh = [(lease, views.from_text(lease.annotations.get(_VIEW, ""))) for lease in leases.values()]
        known = [(lease, view) for lease, view in fresh if lease.name in moving and view is not None]
        return Reports(
            tuple(view for _, view in known),
            {view.snode: frozenset(_texts(lease.annotations.get(_FENCED, "[]"))) for lease, view in known},
        )

    def resign(self) -> None:
        """Let another one lead at once. The orders stay."""
        if self._renewed_at is not None:
            self._renewed_at = None
            self._put(replace(self._leader, holder=""), kind="leader")

    def _put(self, lease: Lease, *, kind: str) -> Lease:
        return self._kube.put_lease(lease, labels={_LABEL: kind}, seconds=LEADER_SECONDS)


def _orders_text(orders: Sequence[Order]) -> str:
    fields = [asdict(order) for order in orders]
    return json.dumps({"format": _FORMAT, "orders": fields})


def _orders(text: str) -> tuple[Order, ...]:
    """Raises DataLoss when they can't be read: to drop one would leave a node half given up."""
    if not text:
        return ()
    try:
        fields: dict[str, Any] = json.loads(text)
        if fields["format"] > _FORMAT:
            raise DataLoss(
                f"Lease {LEADER}: its orders are of format {fields['format']}; upgrade `snode failover` here"
            )
        return tuple(_order(one) for one in fields["orders"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(
            f"Lease {LEADER}: its annotation {_ORDERS} can't be read ({error}); look there which nodes were being "
            "given up, then delete the Lease"
        ) from error


def _order(fields: Mapping[str, Any]) -> Order:
    return Order(
        id=str(fields["id"]),
        node=str(fields["node"]),
        why=str(fields["why"]),
        snodes=tuple(fields["snodes"]),
        drivers=tuple(fields["drivers"]),
        claims=tuple(fields["claims"]),
    )


def _texts(text: str) -> list[str]:
    try:
        return [str(one) for one in json.loads(text)]
    except (ValueError, TypeError):
        return []
