"""Whether a target of tgtd is what a publication says."""

import os
from dataclasses import dataclass

from csi.exports.tgt_show import Target, shown_mb
from csi.model import Publication, scsi_id_of

#: The LUN of every published volume. LUN 0 is tgtd's controller.
LUN = 1


@dataclass(frozen=True)
class Differences:
    """How a target differs from its publication."""

    remake: tuple[str, ...]  # it must be made anew
    reopen: tuple[str, ...]  # its device must be opened again: a grown or an interrupted one
    unknown: str = ""  # it can't be read, so nothing may be decided

    def __bool__(self) -> bool:
        return bool(self.remake or self.reopen or self.unknown)

    def __str__(self) -> str:
        return self.unknown or ", ".join(self.remake + self.reopen)


def differences(publication: Publication, target: Target, *, with_rule: bool = True) -> Differences:
    """Compare in all points that decide who reaches which data. with_rule: the access rule must stand already."""
    if target.problem:
        return Differences((), (), unknown=target.problem)
    lun = target.lun(LUN)
    want: dict[str, object] = {
        "number": publication.tid,
        "driver": "iscsi",
        "LUNs": [0, LUN],
        "accounts": (publication.chap.user,),
        "outgoing account": (publication.chap.mutual_user,),
        "rules": (publication.node.initiator,) if with_rule else (),
    }
    have: dict[str, object] = {
        "number": target.tid,
        "driver": target.driver,
        "LUNs": [unit.number for unit in target.luns],
        "accounts": target.incoming,
        "outgoing account": target.outgoing,
        "rules": target.acl,
    }
    reopen: dict[str, str] = {}
    if lun is not None:
        want |= {
            "type": "disk",
            "SCSI id": scsi_id_of(publication.volume_id),
            "serial": publication.volume_id,
            "read-only": publication.readonly,
            "removable": False,
            "thin": False,
            "store": ("rdwr", "direct"),
        }
        have |= {
            "type": lun.type,
            "SCSI id": lun.scsi_id,
            "serial": lun.scsi_sn,
            "read-only": lun.readonly,
            "removable": lun.removable,
            "thin": lun.thin,
            "store": (lun.store, lun.flags),
        }
        if lun.path:  # none is open after an interrupted growth
            want["device"], have["device"] = os.fspath(publication.device), lun.path
        if not lun.online or not lun.path:
            reopen["device"] = "not open"
        # Volumes never shrink, so more than the record says is a growth whose record is not written yet.
        elif lun.size_mb < shown_mb(publication.size_bytes):
            reopen["size"] = f"{lun.size_mb} MB, not {shown_mb(publication.size_bytes)} MB"
    if target.state != "ready":
        reopen["state"] = target.state
    return Differences(
        remake=tuple(f"{key} {have[key]!r}, not {value!r}" for key, value in want.items() if have[key] != value),
        reopen=tuple(f"{key} {value}" for key, value in reopen.items()),
    )
