"""The whole way of a volume, and the loss of a CNODE: the driver beside the hand, in the same guests, in turns.

.venv/bin/python -m tests.bench.way [REPETITIONS]
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

from tests.bench.hand import Export, Hand
from tests.bench.page import Section, Table, Target
from tests.bench.relays import Relays
from tests.lab import Lab
from tests.lab.cluster import MIB, Cluster, Machine

SIZE_BYTES = 96 * MIB

Times = dict[str, list[float]]
Steps = Mapping[str, tuple[str, Sequence[str]]]

# A step of the way: how the RPC is called, and the parts of the hand that do the same.
STEPS: Steps = {
    "create": ("CreateVolume", ["create"]),
    "publish": ("ControllerPublishVolume", ["publish"]),
    "stage": ("NodeStageVolume", ["record", "login", "disk", "mkfs", "mount"]),
    "bind": ("NodePublishVolume", ["bind"]),
    "unbind": ("NodeUnpublishVolume", ["unbind"]),
    "unstage": ("NodeUnstageVolume", ["umount", "logout"]),
    "unpublish": ("ControllerUnpublishVolume", ["unpublish"]),
    "delete": ("DeleteVolume", ["zero", "lvremove"]),
}
_THERE, _BACK = list(STEPS)[:4], list(STEPS)[4:]
LOSS: Steps = {
    "fence": ("ControllerUnpublishVolume", ["fence", "unpublish"]),
    "publish": ("ControllerPublishVolume", ["publish"]),
    "stage": ("NodeStageVolume", ["record", "login", "disk", "mount"]),
    "bind": ("NodePublishVolume", ["bind"]),
}


class Race:
    """The driver and the hand on one cluster; `driver` and `hand` hold the seconds of each step by name."""

    def __init__(self, cluster: Cluster, relays: Relays) -> None:
        self.cluster = cluster
        self._relay_seconds = relays.seconds(cluster.snode)
        self.by_hand = Hand(cluster.snode.guest)
        self.driver: Times = {}
        self.hand: Times = {}
        self._number = 0

    def way(self) -> None:
        """A volume's whole way by both, the other one first each time."""
        self._number += 1
        racers: list[Callable[[], None]] = [self._way_of_driver, self._way_of_hand]
        for racer in racers if self._number % 2 else reversed(racers):
            racer()
            settle(self.cluster)

    def loss(self) -> None:
        """The loss of a CNODE by both."""
        self._number += 1
        racers: list[Callable[[], None]] = [self._loss_of_driver, self._loss_of_hand]
        for racer in racers if self._number % 2 else reversed(racers):
            racer()
            self.cluster.restore()
            # What the hand had on the lost CNODE; iscsiadm can't remove a record that the power cut made empty.
            self.cluster.cnodes[0].guest.sh(
                "rm -rf /etc/iscsi/{nodes,static}/*:hand* /var/lib/iscsi/{nodes,static}/*:hand*"
            )
            settle(self.cluster)

    def forget(self) -> None:
        """Forget all times."""
        self.driver.clear()
        self.hand.clear()

    def _way_of_driver(self) -> None:
        cluster, cnode, clock = self.cluster, self.cluster.cnodes[0], Clock(self.driver, less=self._relay_seconds)
        with clock.step("create"):
            volume_id = cluster.create(f"driver{self._number}", size_bytes=SIZE_BYTES)
        with clock.step("publish"):
            context = cluster.publish(volume_id, cnode)
        with clock.step("stage"):
            cluster.stage(volume_id, cnode, context)
        with clock.step("bind"):
            cluster.mount(volume_id, cnode)
        with clock.step("unbind"):
            cluster.unmount(volume_id, cnode)
        with clock.step("unstage"):
            cluster.unstage(volume_id, cnode)
        with clock.step("unpublish"):
            cluster.unpublish(volume_id, cnode)
        with clock.step("delete"):
            cluster.delete(volume_id)

    def _way_of_hand(self) -> None:
        hand, guest, export = self.by_hand, self.cluster.cnodes[0].guest, self._export()
        note(self.hand, hand.create(export), hand.publish(export, guest), hand.attach(export, guest))
        note(self.hand, hand.leave(export, guest), hand.unpublish(export), hand.delete(export))

    def _loss_of_driver(self) -> None:
        cluster, clock, (lost, other) = self.cluster, Clock(self.driver, less=self._relay_seconds), self.cluster.cnodes
        volume_id = cluster.create(f"driver{self._number}", size_bytes=SIZE_BYTES)
        lose(lost, cluster.attach(volume_id, lost))
        with clock.step("fence"):
            cluster.unpublish(volume_id, lost)
        with clock.step("publish"):
            context = cluster.publish(volume_id, other)
        with clock.step("stage"):
            cluster.stage(volume_id, other, context)
        with clock.step("bind"):
            path = cluster.mount(volume_id, other)
        other.guest.sh(["test", "-s", f"{path}/file"])
        cluster.detach(volume_id, other)
        cluster.delete(volume_id)

    def _loss_of_hand(self) -> None:
        hand, export, (lost, other) = self.by_hand, self._export(), self.cluster.cnodes
        hand.create(export)
        hand.publish(export, lost.guest)
        hand.attach(export, lost.guest)
        lose(lost, hand.path(export))
        note(self.hand, hand.fence(export, lost.guest), hand.unpublish(export))
        export = replace(export, tid=export.tid + 500, chap=Export("", 0, 0).chap)
        note(self.hand, hand.publish(export, other.guest), hand.attach(export, other.guest, mkfs=False))
        other.guest.sh(["test", "-s", f"{hand.path(export)}/file"])
        hand.leave(export, other.guest)
        hand.unpublish(export)
        hand.delete(export)

    def _export(self) -> Export:
        return Export(f"hand{self._number}", 1000 + self._number, SIZE_BYTES)

    # -- what was found ------------------------------------------------------------------------------------------

    def rows(self, steps: Steps, sums: Mapping[str, Iterable[str]]) -> Table:
        """A row for each step and each sum of steps."""
        rows = [
            (rpc, " + ".join(parts), *self._figures([step], steps), self._parts(parts))
            for step, (rpc, parts) in steps.items()
        ]
        rows += [(f"**{name}**", "", *self._figures(list(part), steps), "") for name, part in sums.items()]
        return Table(("RPC", "by hand", "driver, ms", "hand, ms", "driver / hand", "parts of the hand, ms"), rows)

    def lines(self, steps: Steps) -> list[str]:
        """A line for each step and one for all, to be read in a terminal."""
        rows = [(rpc, [step]) for step, (rpc, _) in steps.items()] + [("in all", list(steps))]
        figures = [(name, *self._figures(part, steps)) for name, part in rows]
        return [f"{name:<26}{driver:>6} ms, by hand{hand:>6} ms" for name, driver, hand, _ in figures]

    def ratio(self, steps: Steps, part: Sequence[str]) -> float:
        """Median of the driver's time for some steps over that of the hand."""
        return median(self._sums_of_driver(part)) / median(self._sums_of_hand(part, steps))

    def _figures(self, part: Sequence[str], steps: Steps) -> tuple[str, str, str]:
        driver, hand = median(self._sums_of_driver(part)), median(self._sums_of_hand(part, steps))
        return f"{driver * 1000:.0f}", f"{hand * 1000:.0f}", f"{driver / hand:.2f}"

    def _parts(self, parts: Sequence[str]) -> str:
        return ", ".join(f"{part} {median(self.hand[part]) * 1000:.0f}" for part in parts) if len(parts) > 1 else ""

    def _sums_of_driver(self, part: Sequence[str]) -> list[float]:
        return [sum(each) for each in zip(*(self.driver[step] for step in part), strict=True)]

    def _sums_of_hand(self, part: Sequence[str], steps: Steps) -> list[float]:
        return [sum(each) for each in zip(*(self.hand[p] for step in part for p in steps[step][1]), strict=True)]


class Clock:
    """Notes the seconds of steps, without those that the lab's relays take of each."""

    def __init__(self, times: Times, *, less: float) -> None:
        self._times, self._less = times, less

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note how long the block takes."""
        began = time.monotonic()
        yield
        self._times.setdefault(name, []).append(time.monotonic() - began - self._less)


def note(times: Times, *found: Mapping[str, float]) -> None:
    """Add what some steps took."""
    for name, seconds in (pair for each in found for pair in each.items()):
        times.setdefault(name, []).append(seconds)


def lose(cnode: Machine, path: str) -> None:
    """Cut the power of a CNODE that has written to its volume."""
    cnode.guest.sh(f"seq 100000 > {path}/file && sync {path}/file && seq 200000 > {path}/more")
    cnode.guest.kill9()


def settle(cluster: Cluster) -> None:
    """Wait until the wipe of deleted volumes is over, so that it does not slow the next step."""
    assert cluster.leftovers() == {}


WAY_TEXT = """
A volume of 96 MiB with ext4, from CreateVolume to the container's path and back, {repetitions} times. The driver does
more than the hand: a record on disk before each step that could be cut off, an identity for the disk, every step read
back; on the CNODE a look at identity, size and signature before mkfs and before each mount. NodeStageVolume is one RPC
for five steps of the hand. DeleteVolume returns when the volume is renamed; its data is zeroed after that, before its
extents are given on; the hand zeroes first and removes then, with the same result. Nearly all of DeleteVolume is that
lvrename: of an active volume it takes some 300 ms in such a guest, of an inactive one 85, for LVM suspends the device
and waits for udev. It is what lets a volume of the same name be made at once.
"""
LOSS_TEXT = """
CNODE1 loses its power after it has written to the mounted volume; the figures begin after that and end when CNODE2 has
the volume at a container's path and the journal is replayed, {repetitions} times. The hand does the same steps: it
shuts the target, closes its connections, removes it, and makes another one for CNODE2. (To grant CNODE2 the old target
is quicker, and not safe: CNODE1, back again, would find it and go on writing.) The driver also runs e2fsck -p first.
"""
WHERE = """the RPCs with the largest difference are {largest}. What the driver does on top (records, identity, reading \
back) is many small system calls, and each is some ten times dearer in the guests than on bare metal."""


def where(race: Race, steps: Steps) -> str:
    """Where the driver loses most, in words."""

    def difference(step: str) -> float:
        return median(race.driver[step]) - sum(median(race.hand[part]) for part in steps[step][1])

    worst = sorted(steps, key=difference, reverse=True)[:2]
    return WHERE.format(largest=", ".join(f"{steps[step][0]} ({difference(step) * 1000:+.0f} ms)" for step in worst))


def way_section(race: Race, repetitions: int) -> Section:
    """Run the whole way, once more than is counted: the first one loads what the others find loaded."""
    race.way()
    race.forget()
    for _ in range(repetitions):
        race.way()
    table = race.rows(STEPS, {"there": _THERE, "back": _BACK, "in all": list(STEPS)})
    ratio = race.ratio(STEPS, list(STEPS))
    return Section(
        "The whole way of a volume",
        f".venv/bin/python -m tests.bench.way {repetitions}",
        WAY_TEXT.format(repetitions=repetitions),
        [table],
        [Target("the whole way of a volume, beside the hand", ratio, 1.0, where=where(race, STEPS))],
    )


def loss_section(race: Race, repetitions: int) -> Section:
    """Run the loss of a CNODE, once more than is counted."""
    race.loss()
    race.forget()
    for _ in range(repetitions):
        race.loss()
    ratio = race.ratio(LOSS, list(LOSS))
    return Section(
        "The loss of a CNODE",
        f".venv/bin/python -m tests.bench.way {repetitions}",
        LOSS_TEXT.format(repetitions=repetitions),
        [race.rows(LOSS, {"in all": list(LOSS)})],
        [Target("fence, attach and mount on another CNODE, beside the hand", ratio, 1.0, where=where(race, LOSS))],
    )


def main(repetitions: int = 5) -> None:
    """Print both."""
    with Lab() as lab:
        cluster, relays = Cluster(lab, log_level="info"), Relays()
        print(way_section(Race(cluster, relays), repetitions))
        print(loss_section(Race(cluster, relays), repetitions))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
