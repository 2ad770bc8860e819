"""fio through a published volume, beside fio through targets made by hand.

.venv/bin/python -m tests.bench.data [REPETITIONS [SECONDS]]
"""

import json
import sys
from collections.abc import Mapping
from statistics import median

from tests.bench.hand import STORE, Export, Hand
from tests.bench.page import Section, Table, Target
from tests.lab import Guest, Lab
from tests.lab.cluster import MIB, Cluster

SIZE_BYTES = 384 * MIB
_FILE_MIB = 192

# What fio does, and what of it is shown: operations or MiB in a second, of its reads or its writes.
JOBS: Mapping[str, tuple[str, str, str]] = {
    "4k random write, fsync after each, IOPS": ("--rw=randwrite --bs=4k --fsync=1", "write", "iops"),
    "4k random read, IOPS": ("--rw=randread --bs=4k --direct=1", "read", "iops"),
    "128k sequential write, fsync at the end, MiB/s": ("--rw=write --bs=128k --direct=1 --end_fsync=1", "write", "bw"),
    "128k sequential read, MiB/s": ("--rw=read --bs=128k --direct=1", "read", "bw"),
}
# The ways to the data, the driver's first.
WAYS = ("driver", "by hand, direct", "by hand, tgt's default")

TEXT = """
A file of {file} MiB on ext4 on a thick volume of {size} MiB, on a CNODE with a kernel of its own; fio with one job, one
request at a time, {seconds} s each, medians of {repetitions} in turns. *Direct*: the target by hand has the store that
the driver uses (`{store}`), so both do the same and should be alike. *tgt's default* is buffered: reads come from the
SNODE's memory, and a write that was acknowledged without a flush is lost with the SNODE's power; with `direct` it is on
the disk. So its column shows what that durability costs; an fsync costs about the same with both.
"""

_SAME = (
    "no part of the driver is on this path, and both targets have the same store; the guests share two cores with all "
    "else."
)


class Data:
    """The three ways, all mounted on one CNODE at once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._hand = cluster, Hand(cluster.snode.guest)
        cnode = cluster.cnodes[0]
        self._volume_id = cluster.create("data", size_bytes=SIZE_BYTES)
        self._exports = [Export("direct", 2001, SIZE_BYTES), Export("buffered", 2002, SIZE_BYTES, flags="")]
        paths = [cluster.attach(self._volume_id, cnode)]
        for export in self._exports:
            self._hand.create(export)
            self._hand.publish(export, cnode.guest)
            self._hand.attach(export, cnode.guest)
            paths.append(self._hand.path(export))
        self.paths = dict(zip(WAYS, paths, strict=True))

    def close(self) -> None:
        """Undo all of it."""
        cnode = self._cluster.cnodes[0]
        self._cluster.detach(self._volume_id, cnode)
        self._cluster.delete(self._volume_id)
        for export in self._exports:
            self._hand.leave(export, cnode.guest)
            self._hand.unpublish(export)
            self._hand.delete(export)

    def run(self, job: str, way: str, seconds: float) -> float:
        """One run of fio; returns its figure."""
        options, kind, what = JOBS[job]
        guest = self._cluster.cnodes[0].guest
        file = f"{self.paths[way]}/data"
        fio(guest, f"--filename={file} {options} --time_based --runtime={seconds}")
        found = json.loads((guest.lab.share / "fio.json").read_text())["jobs"][0][kind]
        if not found[what]:
            raise RuntimeError(f"fio has no figure for {job!r} {way} in {seconds} s: let it run longer")
        return float(found[what]) / (1024 if what == "bw" else 1)

    def lay_out(self) -> None:
        """Write every file once, so that all have their blocks."""
        for path in self.paths.values():
            fio(self._cluster.cnodes[0].guest, f"--filename={path}/data --rw=write --bs=1M --direct=1 --end_fsync=1")


def fio(guest: Guest, options: str) -> None:
    """fio in a guest; its report is fio.json in the lab's shared folder."""
    common = f"--name=job --size={_FILE_MIB}M --ioengine=psync --output-format=json --output=/host/fio.json"
    guest.sh(f"fio {common} {options}", 120)


def section(cluster: Cluster, repetitions: int = 3, seconds: float = 2) -> Section:
    """Run it."""
    data = Data(cluster)
    data.lay_out()
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(repetitions):
        for job in JOBS:
            for way in WAYS:
                found.setdefault((job, way), []).append(data.run(job, way, seconds))
    data.close()
    figures = {job: [median(found[job, way]) for way in WAYS] for job in JOBS}
    rows = [
        (job, *(f"{figure:.0f}" for figure in each), f"{each[0] / each[1]:.2f}", f"{each[0] / each[2]:.2f}")
        for job, each in figures.items()
    ]
    head = ("fio", *WAYS, "driver / direct by hand", "driver / default by hand")
    text = TEXT.format(file=_FILE_MIB, size=SIZE_BYTES // MIB, seconds=seconds, repetitions=repetitions, store=STORE)
    return Section(
        "The data path",
        f".venv/bin/python -m tests.bench.data {repetitions} {seconds:g}",
        text,
        [Table(head, rows)],
        [
            Target(f"fio, {job.rpartition(',')[0]}: driver beside the hand", each[0] / each[1], 0.9, "", True, _SAME)
            for job, each in figures.items()
        ],
    )


def main(repetitions: int = 3, seconds: float = 2) -> None:
    """Print it."""
    with Lab() as lab:
        print(section(Cluster(lab, cnodes=1, log_level="info"), repetitions, seconds))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
