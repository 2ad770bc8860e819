"""Whether a disk is the volume it is taken for. In doubt it is not: nothing is mounted, formatted or grown."""

from pathlib import Path

from csi.connectors.devices import Devices
from csi.connectors.sessions import Session
from csi.deadline import Deadline, wait_until
from csi.errors import DataLoss, InUse, Timeout, Unavailable
from csi.model import Attachment

_RUNNING_SECONDS = 15.0


class Identity:
    """Asks the disk itself, afresh: sysfs keeps what the kernel once read, until a rescan."""

    def __init__(self, devices: Devices, *, sysfs: Path) -> None:
        self._devices = devices
        self._sysfs = sysfs

    def verify(
        self, session: Session, name: str, attachment: Attachment, deadline: Deadline, *, is_new: bool = False
    ) -> None:
        """See that the disk is the published volume, as published.

        is_new: the session was made just now, so that the kernel has read all of the disk afresh.
        Raises DataLoss for another disk, Unavailable when it can't be told or is not as published, InUse when
        multipathd has taken it.
        """
        volume_id = attachment.volume_id
        if not is_new:
            self.refresh(name, deadline)
        self.verify_name(name, volume_id, attachment.scsi_id)
        size_bytes = self._devices.size_bytes(name)
        if size_bytes < attachment.size_bytes:
            # Larger is fine: the volume may have grown after the publish context was made.
            raise DataLoss(
                f"volume {volume_id}: {name} has {size_bytes} bytes, the volume has {attachment.size_bytes}; nothing "
                "was changed; compare the target's LUN with the volume on the SNODE"
            )
        self._verify_mode(name, attachment)
        if multipath := self._devices.multipath_map(name):
            raise InUse(
                f"volume {volume_id}: multipathd has taken {name} into {multipath}; blacklist the vendor SNODE in "
                f"/etc/multipath.conf, run `multipath -f {multipath.split(' ')[0]}`, and repeat"
            )
        if not session.logged_in:
            raise Unavailable(f"volume {volume_id}: the session to {session.target} was lost; repeat later")

    def verify_name(self, name: str, volume_id: str, scsi_id: str) -> None:
        """See that both the kernel and the disk itself, by an INQUIRY sent now, give the volume's SCSI identity."""
        wanted = f"naa.{scsi_id}"
        cached = self._devices.attribute(name, "device/wwid")
        told = self._devices.names(name)
        if cached != wanted or wanted not in told:
            shown = ", ".join(sorted(told)) or "nothing"
            raise DataLoss(
                f"volume {volume_id}: {name} is another disk: expected {wanted}, sysfs has {cached or 'nothing'}, the "
                f"disk says {shown}; nothing was changed; see which LUN the target has, unpublish and publish again"
            )

    def refresh(self, name: str, deadline: Deadline) -> None:
        """Make the kernel read size, identity and write protection again; raises Unavailable when it can't."""
        self._wait_running(name, deadline)
        if self._devices.write(self._sysfs / "block" / name / "device" / "rescan", "1", deadline) != 0:
            raise Unavailable(f"{name}: the kernel can't rescan the disk; see whether its session lives; repeat later")

    def _wait_running(self, name: str, deadline: Deadline) -> None:
        """A rescan of a blocked disk would hang uninterruptibly until its session is back or given up."""
        try:
            wait_until(
                lambda: self._devices.attribute(name, "device/state") == "running",
                deadline.within(_RUNNING_SECONDS),
                what="the disk",
            )
        except Timeout as error:
            state = self._devices.attribute(name, "device/state") or "gone"
            raise Unavailable(
                f"{name}: the disk is {state}, its session lost; iscsid tries on; repeat later"
            ) from error

    def _verify_mode(self, name: str, attachment: Attachment) -> None:
        words = {True: "read-only", False: "writable"}
        readonly = self._devices.attribute(name, "ro") == "1"
        if readonly != attachment.readonly:
            raise Unavailable(
                f"volume {attachment.volume_id}: published {words[attachment.readonly]}, but {name} is "
                f"{words[readonly]}; unpublish the volume and publish it again"
            )
