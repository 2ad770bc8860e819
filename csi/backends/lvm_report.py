"""What LVM says of a volume group, as plain values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from csi.errors import CommandFailed

#: One command for all of it, so that the numbers belong together. `seg` and `pvseg` can't be left out, only kept short.
SECTIONS = {
    "vg": "vg_name,vg_uuid,vg_extent_size,vg_mda_size,vg_mda_free,vg_missing_pv_count",
    "pv": "pv_name,pv_free,pv_allocatable,pv_missing",
    "lv": (
        "lv_name,lv_uuid,lv_size,lv_tags,lv_attr,lv_layout,pool_lv,data_percent,metadata_percent,sync_percent,"
        "lv_health_status,lv_device_open"
    ),
    "pvseg": "pvseg_start",
    "seg": "segtype",
}


@dataclass(frozen=True)
class Lv:
    """One logical volume."""

    name: str
    uuid: str  # without dashes, as device-mapper has it; "" when not known yet
    size_bytes: int
    tags: tuple[str, ...] = ()
    attr: str = ""
    layout: frozenset[str] = frozenset()  # words such as linear, raid, raid1, thin, pool
    pool_lv: str = ""
    data_percent: float | None = None  # None = not active, or not known
    metadata_percent: float | None = None
    sync_percent: float | None = None
    health: str = ""  # "", partial, refresh needed, mismatches exist, out_of_data, metadata_read_only, failed …
    is_open: bool = False

    @property
    def zeroes(self) -> bool:
        """True if it is a thin pool that zeroes each block before its first use."""
        return self.attr[7:8] == "z"

    @property
    def is_thin_pool(self) -> bool:
        """True for the pool itself, not for the volumes in it."""
        return self.layout >= {"thin", "pool"}


@dataclass(frozen=True)
class Pv:
    """One disk of the group."""

    name: str
    free_bytes: int
    allocatable: bool


@dataclass(frozen=True)
class Report:
    """A volume group at one moment."""

    vg: str
    vg_uuid: str  # without dashes
    extent_bytes: int
    mda_size_bytes: int
    mda_free_bytes: int
    missing_pvs: int
    pvs: tuple[Pv, ...] = ()
    lvs: Mapping[str, Lv] = field(default_factory=dict)

    def with_lv(self, lv: Lv) -> "Report":
        """The same group with one volume more, or changed."""
        return replace(self, lvs={**self.lvs, lv.name: lv})

    def without_lv(self, name: str) -> "Report":
        """The same group without a volume."""
        return replace(self, lvs={key: lv for key, lv in self.lvs.items() if key != name})


def parse(text: str) -> Report:
    """The report in the output of `lvm fullreport`. Raises CommandFailed when LVM answers in another form."""
    try:
        (report,) = json.loads(text)["report"]
        (vg,) = report["vg"]
        lvs = [_lv(row) for row in report.get("lv", [])]
        return Report(
            vg=vg["vg_name"],
            vg_uuid=_uuid(vg["vg_uuid"]),
            extent_bytes=int(vg["vg_extent_size"]),
            mda_size_bytes=int(vg["vg_mda_size"]),
            mda_free_bytes=int(vg["vg_mda_free"]),
            missing_pvs=int(vg["vg_missing_pv_count"]),
            pvs=tuple(_pv(row) for row in report.get("pv", [])),
            lvs={lv.name: lv for lv in lvs},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CommandFailed(f"lvm fullreport: answer not understood ({error!r}): {text[:500]}") from error


def parse_rows(text: str, section: str) -> list[dict[str, Any]]:
    """The rows of a plain report such as `pvs`."""
    try:
        return [row for report in json.loads(text)["report"] for row in report.get(section, [])]
    except (KeyError, ValueError, TypeError) as error:
        raise CommandFailed(f"LVM report of {section}: answer not understood ({error!r}): {text[:500]}") from error


def _lv(row: Mapping[str, str]) -> Lv:
    return Lv(
        name=row["lv_name"],
        uuid=_uuid(row["lv_uuid"]),
        size_bytes=int(row["lv_size"]),
        tags=tuple(row["lv_tags"].split(",")) if row["lv_tags"] else (),
        attr=row["lv_attr"],
        layout=frozenset(row["lv_layout"].split(",")),
        pool_lv=row["pool_lv"],
        data_percent=_percent(row["data_percent"]),
        metadata_percent=_percent(row["metadata_percent"]),
        sync_percent=_percent(row["sync_percent"]),
        health=row["lv_health_status"],
        is_open=row["lv_device_open"] in ("open", "1"),
    )


def _pv(row: Mapping[str, str]) -> Pv:
    usable = row["pv_allocatable"] in ("allocatable", "1") and row["pv_missing"] not in ("missing", "1")
    return Pv(name=row["pv_name"], free_bytes=int(row["pv_free"]), allocatable=usable)


def _percent(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _uuid(text: str) -> str:
    return text.replace("-", "")
