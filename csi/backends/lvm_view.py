"""Logical volumes as volumes: which of them are a pool's, and what they are."""

from collections.abc import Sequence

from csi.backends import lvm_tags
from csi.backends.device_nodes import DeviceNodes
from csi.backends.lvm_marks import Marks
from csi.backends.lvm_report import Lv, Report
from csi.backends.lvm_space import Space
from csi.errors import Conflict, DataLoss, NotFound
from csi.model import VOLUME_ID, Volume

#: Most volumes that one sentence names.
_MOST_NAMED = 4


def label_of(lv: Lv, *, pool: str, space: Space) -> lvm_tags.Label | None:
    """The label of a logical volume if it is this pool's (volume or deleted volume), else None."""
    label = lvm_tags.decode(lv.tags)
    return label if label is not None and label.pool == pool and space.owns(lv) else None


def is_of_pool(lv: Lv, *, pool: str, space: Space) -> bool:
    """Whether a logical volume is this pool's."""
    return label_of(lv, pool=pool, space=space) is not None


class View:
    """Reads volumes out of reports. Starts no process."""

    def __init__(self, pool: str, *, space: Space, nodes: DeviceNodes, marks: Marks) -> None:
        self._pool = pool
        self._space = space
        self._nodes = nodes
        self._marks = marks

    def volume(self, report: Report, lv: Lv) -> Volume | None:
        """The volume, or None when the logical volume is not (foreign, another pool's, deleted, incomplete)."""
        label = label_of(lv, pool=self._pool, space=self._space)
        if label is None or not VOLUME_ID.fullmatch(lv.name) or self._marks.is_incomplete(lv):
            return None
        if label.format > lvm_tags.FORMAT:
            raise DataLoss(
                f"volume {lv.name}: its tags are of format {label.format}, this release reads up to {lvm_tags.FORMAT}; "
                "upgrade"
            )
        return Volume(
            volume_id=lv.name,
            name=label.name,
            pool=self._pool,
            size_bytes=lv.size_bytes,
            device=self._nodes.path(report.vg, lv.name),
            blank=label.blank and not self._marks.is_used(lv),
            parameters=label.parameters,
            health=label.damage or self._space.health(report, lv),
        )

    def get(self, report: Report, volume_id: str) -> Volume:
        """The volume. Raises NotFound, or Conflict when something foreign has its name."""
        lv = report.lvs.get(volume_id)
        if lv is None or self._marks.is_incomplete(lv):
            raise NotFound(f"volume {volume_id}: does not exist in volume group {report.vg}")
        volume = self.volume(report, lv)
        if volume is None:
            raise Conflict(
                f"volume {volume_id}: the logical volume of this name in {report.vg} is not of pool {self._pool}; see "
                f"its tags (`lvs -o +tags {report.vg}/{volume_id}`) and rename it (lvrename)"
            )
        return volume


def sick(report: Report, *, pool: str, space: Space, told: Sequence[str]) -> list[str]:
    """What is wrong with the pool's volumes, one sentence for each kind of trouble: a lost disk may be a thousand's.

    told: what is said of the pool already; a trouble of the whole pool is not repeated.
    """
    troubles: dict[str, list[str]] = {}
    for lv in report.lvs.values():
        label = label_of(lv, pool=pool, space=space)
        if label is None or not VOLUME_ID.fullmatch(lv.name):
            continue
        health = label.damage or space.health(report, lv)
        if health != "ok" and not any(text.endswith(health) for text in told):
            troubles.setdefault(health, []).append(lv.name)
    return [f"volume {_some(names)}: {health}" for health, names in troubles.items()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
