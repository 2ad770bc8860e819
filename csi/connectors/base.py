"""The seam between the use cases and the ways to attach a volume on a node."""

from typing import Protocol

from csi.deadline import Deadline
from csi.model import Attachment, Complaint, Device


class Connector(Protocol):
    """Attaches volumes of one protocol. Callers hold the volume's lock. State is read from sysfs, never remembered."""

    @property
    def protocol(self) -> str:
        """ "iscsi" or "loop"."""
        ...

    def connect(self, attachment: Attachment, deadline: Deadline) -> Device:
        """Attach, or adopt the same attachment; the device is verified (identity, size) before it is returned.

        Raises InUse while an attachment of an older generation exists, Unavailable when the target or portal does not
        answer, DataLoss when the device is not the volume.
        """
        ...

    def find(self, volume_id: str) -> Device | None:
        """The attached device of a volume of any generation, or None. Starts no process."""
        ...

    def disconnect(self, volume_id: str, deadline: Deadline) -> None:
        """Flush, remove the device, detach, and remove every trace of the volume on this node; absent is fine.

        Raises InUse while the device is mounted or held (device mapper, LVM, RAID); the message names the holder.
        """
        ...

    def rescan(self, volume_id: str, *, size_bytes: int, deadline: Deadline) -> Device:
        """Learn the new size of a grown volume, at least `size_bytes`; verifies identity again."""
        ...

    def complaints(self, volume_id: str) -> list[Complaint]:
        """What keeps an attached volume from being used; [] = nothing, or it is not attached.

        Starts no process and asks nothing of the disk, which may never answer.
        """
        ...

    def left_over(self) -> list[str]:
        """The ids of all volumes of which there is a trace on this node: attached, or remembered by the initiator."""
        ...

    def problems(self, deadline: Deadline) -> list[str]:
        """What is wrong with the initiator side, each as `what is wrong -> the repair`; empty when all is well."""
        ...
