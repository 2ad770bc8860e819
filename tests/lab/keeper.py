"""One cluster for many tests or runs, until one of them spoils it."""

from collections.abc import Callable
from contextlib import ExitStack

from . import roles
from .cluster import Cluster
from .guest import Guest
from .lab import Lab

#: What there is beside `thick`, the default pool of a Cluster; needs at least two `legs`.
POOLS = """
[pools.thin]
type = "lvm-thin"
vg = "vg0"
thin_pool = "thin"
overcommit_ratio = 4.0

[pools.mirror]
type = "lvm"
vg = "vg1"
layout = "raid1"
"""


class Keeper:
    """Boots the cluster when it is first asked for, and anew after `drop`."""

    def __init__(
        self, *, pools: str = POOLS, node: str = "", prepare: Callable[[Guest], None] = roles.ensure_thin_pool
    ) -> None:
        """pools, node, prepare: see Cluster."""
        self._pools = pools
        self._node = node
        self._prepare = prepare
        self._stack = ExitStack()
        self._cluster: Cluster | None = None

    def get(self) -> Cluster:
        """The cluster: a SNODE with three legs, and two CNODEs."""
        if self._cluster is None:
            lab = self._stack.enter_context(Lab())
            self._cluster = Cluster(lab, pools=self._pools, legs=3, node=self._node, prepare=self._prepare)
        return self._cluster

    def drop(self) -> None:
        """End it, whatever its state."""
        self._cluster = None
        self._stack.close()
