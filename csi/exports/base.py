"""The seam between the use cases and the ways to offer a volume to a node."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from csi.deadline import Deadline
from csi.model import IscsiPath, Publication


class Export(Protocol):
    """Offers published volumes. Callers hold the volume's lock and have the publication's record on disk already."""

    @property
    def protocol(self) -> str:
        """What the node's connector is called: "iscsi" or "loop"."""
        ...

    def ensure(self, publication: Publication, deadline: Deadline) -> tuple[IscsiPath, ...]:
        """Offer the volume exactly as the publication says, and nothing wider at any moment; returns the paths to it.

        Adopts what is there only if it matches in all points, else removes and makes it anew.
        Raises Unavailable when the server does not answer, NoSpace when its limits are reached.
        """
        ...

    def remove(self, publication: Publication, deadline: Deadline) -> None:
        """Fence: when it returns, no command of the node can reach the volume any more and none is in flight.

        Works without the node's help; absent is fine.
        """
        ...

    def grow(self, publication: Publication, deadline: Deadline) -> None:
        """Make the new size of the device (publication.size_bytes) visible to the node, without an I/O error there."""
        ...

    def fence_strays(self, volume_id: str, *, keep: Collection[str], deadline: Deadline) -> None:
        """Fence every target of a volume that is not in `keep` (target names).

        Records can be lost; a node that nobody knows of must not go on writing when another one gets the volume.
        """
        ...

    def reconcile(
        self, read_wanted: Callable[[], Sequence[Publication]], deadline: Deadline, *, spare: Collection[str] = ()
    ) -> None:
        """Make the server hold exactly what `read_wanted` returns: restore after its restart, remove our strays, close
        foreign sessions. read_wanted is called under the server's lock, so that a publication made or revoked meanwhile
        is seen. spare: names of targets of which nothing is known now; they stay as they are.
        """
        ...

    def restarted(self) -> bool:
        """Whether the server was started anew since `reconcile` last did all: a hint, which costs next to nothing."""
        ...

    def idle_seconds(self, publication: Publication) -> float | None:
        """Seconds since the node's session was last heard of; None when nothing can be said. Never too much.

        Counts from the end of the first `reconcile` at the earliest; see csi.exports.liveness.
        """
        ...

    def problems(self, deadline: Deadline) -> list[str]:
        """What is wrong with the server, each as `what is wrong -> the repair`; empty when all is well."""
        ...
