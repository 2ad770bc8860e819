"""Says what is decided: a line in the log, an Event on the node, a count. Not the same thing over and over."""

from collections import Counter
from collections.abc import Collection

from csi.errors import DriverError, NotFound
from csi.kube import Kube
from csi.log import get_logger

#: What stays as it is, is said again after so long.
AGAIN_SECONDS = 600.0


class Teller:
    """Events are for people: one that can't be written is logged, and stops nothing."""

    def __init__(self, kube: Kube, *, reporter: str) -> None:
        """reporter: our own name."""
        self._kube = kube
        self._reporter = reporter
        self._said: dict[tuple[str, str], float] = {}
        self.counts: Counter[str] = Counter()  # by reason
        self._log = get_logger("failover")

    def tell(self, node: str, reason: str, message: str, *, warning: bool, now: float, about: str = "") -> None:
        """Say something of a node. Of the same reason (and `about`) it is said once until `forget`, or for a while."""
        key = (node, reason + about)
        said = self._said.get(key)
        if said is not None and now - said < AGAIN_SECONDS:
            return
        self._said[key] = now
        self.counts[reason] += 1
        (self._log.warning if warning else self._log.info)(reason, node=node, why=message)
        try:
            self._kube.tell(
                self._kube.node(node), reason=reason, message=message, warning=warning, reporter=self._reporter
            )
        except NotFound:
            return  # the node was removed from the cluster
        except DriverError as error:
            self._log.warning("event not written", node=node, reason=reason, error=str(error))

    def forget_others(self, nodes: Collection[str]) -> None:
        """Nodes that are fine again: what is said of them next is news."""
        self._said = {key: said for key, said in self._said.items() if key[0] in nodes}
