"""No export: the node is the SNODE itself and attaches the volume's file."""

from collections.abc import Callable, Collection, Sequence

from csi.deadline import Deadline
from csi.model import IscsiPath, Publication


class NoExport:
    """See csi.exports.base.Export. Nothing to make, so nothing to remove: the node's own state is the attachment.

    It can't fence. That is enough, because the node whose use must have ended is this machine: its connector refuses
    to detach what is in use.
    """

    protocol: str = "loop"

    def ensure(self, publication: Publication, deadline: Deadline) -> tuple[IscsiPath, ...]:
        """No paths: the connector takes the file itself."""
        del publication, deadline
        return ()

    def remove(self, publication: Publication, deadline: Deadline) -> None:
        """Nothing is there."""
        del publication, deadline

    def grow(self, publication: Publication, deadline: Deadline) -> None:
        """The connector's rescan reads the new size of the file."""
        del publication, deadline

    def fence_strays(self, volume_id: str, *, keep: Collection[str], deadline: Deadline) -> None:
        """Nothing is there."""
        del volume_id, keep, deadline

    def reconcile(
        self, read_wanted: Callable[[], Sequence[Publication]], deadline: Deadline, *, spare: Collection[str] = ()
    ) -> None:
        """Nothing can be lost."""
        del read_wanted, deadline, spare

    def restarted(self) -> bool:
        """There is no server."""
        return False

    def idle_seconds(self, publication: Publication) -> float | None:
        """There are no sessions."""
        del publication
        return None

    def problems(self, deadline: Deadline) -> list[str]:
        """Nothing can be wrong."""
        del deadline
        return []
