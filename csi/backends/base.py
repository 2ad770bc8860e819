"""The seam between the use cases and the makers of volumes."""

from collections.abc import Mapping
from typing import Protocol

from csi.deadline import Deadline
from csi.model import Capacity, Volume


class Backend(Protocol):
    """Makes and keeps volumes in one pool. Callers hold the volume's lock; a backend locks its own pool.

    Every method decides by reading back, never by an exit code alone, and may be repeated after a crash at any point.
    """

    @property
    def pool(self) -> str:
        """The pool's name."""
        ...

    def round_size(self, size_bytes: int) -> int:
        """The size that a volume of at least `size_bytes` really gets (multiple of the extent, minimum size)."""
        ...

    def create(
        self, volume_id: str, *, name: str, size_bytes: int, parameters: Mapping[str, str], deadline: Deadline
    ) -> Volume:
        """Make a volume that does not exist yet; size_bytes comes from `round_size`.

        Raises NoSpace when the pool, its metadata or a watermark does not allow it, with figures in the message.
        """
        ...

    def find(self, volume_id: str, deadline: Deadline) -> Volume | None:
        """The volume, or None. Cached reads are allowed as long as our own changes are seen."""
        ...

    def list_volumes(self, deadline: Deadline) -> list[Volume]:
        """All volumes of this pool, read afresh, in any order; volumes that are being deleted are not among them."""
        ...

    def delete(self, volume: Volume, deadline: Deadline) -> None:
        """Make the volume vanish at once; its space returns to the pool only after its data is gone."""
        ...

    def grow(self, volume: Volume, *, size_bytes: int, deadline: Deadline) -> Volume:
        """Enlarge to at least `size_bytes` (from `round_size`); never shrinks. Raises NoSpace."""
        ...

    def open_for_export(self, volume: Volume, deadline: Deadline) -> Volume:
        """See that the device node is there (activate after a reboot) and is this volume's; no process if it is.

        Also takes the backend's own look at the data: the returned volume is `blank` only if it was never marked as
        used and no signature is found on it now.
        Raises Unavailable when the device can't be had.
        """
        ...

    def mark_used(self, volume: Volume) -> None:
        """Remember for good that the volume holds data, so that nobody may format it any more.

        Durable when it returns; starts no process.
        """
        ...

    def capacity(self, deadline: Deadline) -> Capacity:
        """What can still be made here."""
        ...

    def problems(self, deadline: Deadline) -> list[str]:
        """What is wrong with the pool, each as `what is wrong -> the repair`; empty when all is well."""
        ...

    def tend(self, deadline: Deadline) -> None:
        """Background work in small steps: resume wipes, write marks into metadata. Called again and again."""
        ...
