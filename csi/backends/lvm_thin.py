"""Where a thin volume's blocks come from: a thin pool, which must never become full."""

from dataclasses import replace

from csi.backends.lvm_report import Lv, Report
from csi.errors import NoSpace, Unavailable
from csi.figures import figure

_HEALTH = {
    "out_of_data": "no data space is left in the thin pool, writes fail -> enlarge it (lvextend) now",
    "metadata_read_only": "the thin pool's metadata is full or damaged, writes fail -> enlarge or repair it",
    "failed": "the thin pool has failed -> repair it (lvconvert --repair)",
}


class Thin:
    """Blocks are taken when they are written. New volumes are refused before the pool can run full."""

    #: The pool zeroes each block before its next use.
    wipes = False

    def __init__(
        self,
        thin_pool: str,
        *,
        overcommit_ratio: float = 1.0,
        data_watermark_percent: float = 90.0,
        metadata_watermark_percent: float = 70.0,
    ) -> None:
        """thin_pool: its name in the group. overcommit_ratio: bytes promised for each byte of the pool."""
        self._thin_pool = thin_pool
        self._overcommit_ratio = overcommit_ratio
        self._data_watermark = data_watermark_percent
        self._metadata_watermark = metadata_watermark_percent

    # -- size ----------------------------------------------------------------------------------------------------

    def unit_bytes(self, report: Report) -> int:
        """Sizes are multiples of an extent."""
        return report.extent_bytes

    def shape(self, report: Report, size_bytes: int) -> list[str]:
        """The arguments of lvcreate. (LVM refuses --zero for a thin volume: it reads as zeros anyway.)"""
        return ["--wipesignatures=y", "--type=thin", f"--virtualsize={size_bytes}b", f"--thinpool={self._thin_pool}"]

    def made(self, lv: Lv) -> Lv:
        """A volume made by `shape`, as the next report will show it."""
        return replace(lv, layout=frozenset({"thin", "sparse"}), pool_lv=self._thin_pool)

    def owns(self, lv: Lv) -> bool:
        """Whether a volume of the group may be of this pool."""
        return lv.pool_lv == self._thin_pool

    # -- space ---------------------------------------------------------------------------------------------------

    def check(self, report: Report, lv: Lv | None, size_bytes: int) -> None:
        """Raise NoSpace if a new volume (lv None), or the growth of `lv`, to size_bytes is not safe."""
        pool = self._pool(report)
        wrong = self._useless(report)
        if wrong:
            raise Unavailable(wrong)
        if pool.health:
            raise Unavailable(f"thin pool {report.vg}/{pool.name}: {_HEALTH.get(pool.health, pool.health)}")
        full = self._above_watermark(report, pool)
        if full:
            raise NoSpace(full)
        extra = size_bytes - (lv.size_bytes if lv else 0)
        room = self._promisable(report, pool)
        if extra > room:
            raise NoSpace(
                f"thin pool {report.vg}/{pool.name}: {figure(extra)} asked, {figure(room)} can still be promised "
                f"(pool of {figure(pool.size_bytes)}, overcommit_ratio {self._overcommit_ratio:g}); delete "
                "volumes, enlarge the pool (lvextend) or raise the ratio"
            )

    def available(self, report: Report) -> int:
        """What can still be promised, in bytes; nothing above a watermark."""
        pool = report.lvs.get(self._thin_pool)
        if pool is None or pool.health or self._useless(report) or self._above_watermark(report, pool):
            return 0
        return self._promisable(report, pool)

    def inactive(self, report: Report) -> str:
        """The pool, if it has to be activated before its fill level is known."""
        pool = report.lvs.get(self._thin_pool)
        return self._thin_pool if pool is not None and pool.is_thin_pool and pool.data_percent is None else ""

    def _pool(self, report: Report) -> Lv:
        pool = report.lvs.get(self._thin_pool)
        if pool is None:
            raise Unavailable(self._missing(report))
        return pool

    def _missing(self, report: Report) -> str:
        return (
            f"thin pool {report.vg}/{self._thin_pool}: does not exist -> make it with `lvcreate --type=thin-pool "
            f"--zero=y --size=SIZE --name={self._thin_pool} {report.vg}`"
        )

    def _promisable(self, report: Report, pool: Lv) -> int:
        promised = sum(lv.size_bytes for lv in report.lvs.values() if lv.pool_lv == pool.name)
        room = int(pool.size_bytes * self._overcommit_ratio) - promised
        return max(0, room) // report.extent_bytes * report.extent_bytes

    def _above_watermark(self, report: Report, pool: Lv) -> str:
        levels = (
            ("data", pool.data_percent, self._data_watermark, "lvextend --size=+SIZE"),
            ("metadata", pool.metadata_percent, self._metadata_watermark, "lvextend --poolmetadatasize=+SIZE"),
        )
        for what, percent, limit, repair in levels:
            if percent is None:
                return f"thin pool {report.vg}/{pool.name}: its {what} level is not known -> activate it (lvchange -ay)"
            if percent >= limit:
                return (
                    f"thin pool {report.vg}/{pool.name}: {what} is {percent:.1f} % full, nothing new from {limit:g} % "
                    f"-> delete data, or enlarge it: `{repair} {report.vg}/{pool.name}`"
                )
        return ""

    # -- health --------------------------------------------------------------------------------------------------

    def health(self, report: Report, lv: Lv) -> str:
        """ "ok", or what is wrong with a volume; a sick pool is the sickness of all its volumes."""
        pool = report.lvs.get(self._thin_pool)
        word = lv.health or (pool.health if pool else "")
        if word:
            return _HEALTH.get(word, f"LVM says of the volume: {word} -> see `lvs -a {report.vg}`")
        if pool is not None and pool.data_percent is not None and pool.data_percent >= 100:
            return _HEALTH["out_of_data"]
        return "ok"

    def problems(self, report: Report) -> list[str]:
        """What makes the thin pool useless."""
        wrong = self._useless(report)
        return [wrong] if wrong else []

    def warnings(self, report: Report) -> list[str]:
        """A sick or nearly full thin pool. Its volumes must stay deletable, so this is no reason not to serve."""
        pool = report.lvs.get(self._thin_pool)
        if pool is None or self._useless(report):
            return []
        sick = [f"thin pool {report.vg}/{pool.name}: {_HEALTH.get(pool.health, pool.health)}"] if pool.health else []
        full = self._above_watermark(report, pool)
        return [*sick, *([full] if full else [])]

    def _useless(self, report: Report) -> str:
        pool = report.lvs.get(self._thin_pool)
        if pool is None:
            return self._missing(report)
        where = f"thin pool {report.vg}/{pool.name}"
        if not pool.is_thin_pool:
            return f"{where}: is not a thin pool -> correct `thin_pool` in the configuration"
        if not pool.zeroes:
            return (
                f"{where}: does not zero its blocks, so a new volume would show data of a deleted one -> run `lvchange "
                f"--zero=y {report.vg}/{pool.name}`"
            )
        return ""
