"""The iSCSI sessions of this machine that are ours, and their disks, as sysfs shows them. Starts no process."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from csi.connectors.devices import read_attribute
from csi.model import TARGET_PREFIX, VOLUME_ID

_OURS = re.compile(rf"{re.escape(TARGET_PREFIX)}:({VOLUME_ID.pattern}):([0-9a-z]{{1,64}})")


def split_target(target: str) -> tuple[str, str] | None:
    """Volume id and generation of a target name of this driver; None for anybody else's."""
    match = _OURS.fullmatch(target)
    return (match[1], match[2]) if match else None


@dataclass(frozen=True)
class Session:
    """One session in the kernel. `folder` is its device folder: .../hostH/sessionS."""

    number: int
    target: str
    volume_id: str
    generation: str
    folder: Path

    @property
    def logged_in(self) -> bool:
        """True while the connection stands; False while iscsid tries to get it back."""
        return read_attribute(self.folder / "iscsi_session" / self.folder.name / "state") == "LOGGED_IN"

    @property
    def exists(self) -> bool:
        """False once the kernel has forgotten it. The number is never given to another session."""
        return self.folder.exists()

    def disks(self) -> list[str]:
        """The kernel's names of all disks of the session."""
        return [name for unit in self.units() if (name := disk_of(unit))]

    def units(self) -> list[Path]:
        """The folders of all SCSI devices of the session, disks or not."""
        return sorted(self.folder.glob("target*/[0-9]*:[0-9]*:[0-9]*:[0-9]*"))

    def unit(self, lun: int) -> Path | None:
        """The folder of the SCSI device with this LUN, or None."""
        return next((unit for unit in self.units() if unit.name.endswith(f":{lun}")), None)

    def disk(self, lun: int) -> str:
        """The kernel's name of the disk at this LUN; "" while there is none."""
        unit = self.unit(lun)
        return disk_of(unit) if unit else ""

    def scan_line(self, lun: int) -> str:
        """What to write into the host's `scan` to look at exactly this LUN."""
        target_id = read_attribute(self.folder / "iscsi_session" / self.folder.name / "target_id")
        return f"0 {target_id if target_id.isdecimal() else 0} {lun}"

    def scan_file(self, sysfs: Path) -> Path:
        """The `scan` file of the session's host; every session of iscsi_tcp has a host of its own."""
        return sysfs / "class" / "scsi_host" / self.folder.parent.name / "scan"


def disk_of(unit: Path) -> str:
    """The kernel's name of the disk on a SCSI device; "" when the device is no disk or not yet one."""
    return next((path.name for path in sorted(unit.glob("block/*"))), "")


class Sessions:
    """Finds our sessions by the exact target name; nothing is parsed from a tool's text."""

    def __init__(self, sysfs: Path) -> None:
        self._sysfs = sysfs

    def ours(self) -> list[Session]:
        """All sessions to targets of this driver, oldest first."""
        found = []
        for entry in (self._sysfs / "class" / "iscsi_session").glob("session*"):
            target = read_attribute(entry / "targetname")
            parts = split_target(target)
            number = entry.name.removeprefix("session")
            if parts and number.isdecimal():
                folder = (entry / "device").resolve()
                found.append(Session(int(number), target, parts[0], parts[1], folder))
        return sorted(found, key=lambda session: session.number)

    def of_volume(self, volume_id: str) -> list[Session]:
        """The sessions of a volume, of any generation, oldest first."""
        return [session for session in self.ours() if session.volume_id == volume_id]

    def find(self, volume_id: str, targets: Collection[str]) -> Session | None:
        """The session to one of these targets, or None."""
        return next((session for session in self.of_volume(volume_id) if session.target in targets), None)
