"""No acknowledged byte is lost: not when a volume grows, a thin pool is full, or the SNODE loses its power."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from tests.lab.channel import Command
from tests.lab.cluster import MIB, Cluster, Machine, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.faults import initiator
from tests.lab.faults.pools import capacity, doctor, program
from tests.lab.guest import Guest
from tests.lab.keeper import POOLS, Keeper
from tests.lab.oracle import Oracle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

RAW = capability(block=True)
_O_DIRECT = 0o40000
_SMALL = """
[pools.small]
type = "lvm-thin"
vg = "vg0"
thin_pool = "small"
overcommit_ratio = 8.0
"""


@pytest.fixture(scope="module")
def keeper() -> Iterator[Keeper]:
    """Besides the usual pools `small`, a thin pool that a test makes."""
    made = Keeper(pools=POOLS + _SMALL)
    yield made
    made.drop()


def end(writer: Command) -> None:
    """End a writer, at once."""
    writer.signal(9)
    writer.wait(30)


# -- a volume grows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [4, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_a_volume_grows_under_a_writer(cluster: Cluster, say: Say, rounds: int) -> None:
    cnode, oracle, size = cluster.cnodes[0], Oracle("one"), 64 * MIB
    volume_id = cluster.create(size_bytes=size)
    path = cluster.attach(volume_id, cnode)
    writer = oracle.write(cnode.guest, f"{path}/records", pause=0)
    oracle.wait_for(30)
    blocks = f"stat --file-system --format=%b {path}"
    before, stalls = int(cnode.guest.sh(blocks)), []
    for _ in range(rounds):
        size += 4 * MIB
        with stall(oracle) as stalled:
            assert cluster.expand(volume_id, size) == size
            cluster.expand_node(volume_id, cnode, size)
            oracle.wait_for_more(5)
        stalls.append(stalled())
        after = int(cnode.guest.sh(blocks))
        assert after > before
        before = after
    oracle.judge(cnode.guest, f"{path}/records")
    assert oracle.errors == []
    end(writer)
    say(f"{rounds} times 4 MiB more, {oracle.acknowledged} records; longest pause of the writer {max(stalls):.2f} s")
    cluster.detach(volume_id, cnode)
    cluster.snode.guest.sh(["e2fsck", "-f", "-n", f"/dev/vg0/{volume_id}"])
    cluster.delete(volume_id)


@contextmanager
def stall(oracle: Oracle) -> Iterator[Callable[[], float]]:
    """Measures the longest time in seconds during which no record became durable."""
    ended, longest = threading.Event(), 0.0

    def watch() -> None:
        nonlocal longest
        seen, since = oracle.acknowledged, time.monotonic()
        while not ended.wait(0.01):
            now = time.monotonic()
            if oracle.acknowledged != seen:
                seen, since = oracle.acknowledged, now
            longest = max(longest, now - since)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: longest
    finally:
        ended.set()
        watcher.join()


# -- a thin pool is full -----------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("when_full", ["error", pytest.param("queue", marks=pytest.mark.soak)])
def test_a_full_thin_pool_says_so_at_the_write(cluster: Cluster, say: Say, when_full: str) -> None:
    snode, (first, second) = cluster.snode.guest, cluster.cnodes
    snode.sh("lvcreate -qy --type thin-pool -L 96m -c 64k -n small vg0")
    if when_full == "error":  # not what a new pool does
        snode.sh("lvchange -q --errorwhenfull y vg0/small")
    old, one, big = (
        cluster.create(name, size_bytes=size * MIB, parameters={"pool": "small"})
        for name, size in (("old", 16), ("one", 64), ("big", 128))
    )
    old_path, big_path = (cluster.attach(volume_id, second, how=RAW) for volume_id in (old, big))
    assert fill(second.guest, old_path, 0, 64) == (64, "none")
    oracle, path = Oracle("one"), cluster.attach(one, first)
    writer = oracle.write(first.guest, f"{path}/records")
    oracle.wait_for(30)

    used = float(snode.sh("lvs --noheadings -o data_percent vg0/small"))
    blocks = int((0.92 - used / 100) * 96 * 4)
    assert fill(second.guest, big_path, 0, blocks) == (blocks, "none")
    until(lambda: capacity(cluster, "small") == 0, "no capacity above the watermark")
    error = refused(lambda: cluster.create("more", size_bytes=4 * MIB, parameters={"pool": "small"}))
    assert error is not None and error.code().name == "RESOURCE_EXHAUSTED", error
    assert "data is 9" in str(error.details())

    oracle.wait_for_more(5)
    more, problem = fill(second.guest, big_path, blocks, 1000)
    assert 0 < more < 96 * 4
    blocks += more
    until(lambda: bool(oracle.errors), "an error of the writer", 150)
    assert writer.wait(60) == 0
    say(f"thin pool full ({when_full}): {problem} at write {blocks} of one volume, {oracle.errors} of the other")
    assert any("no data space is left" in text for text in doctor(cluster, "pool small"))
    assert wrong_blocks(second.guest, old_path, 64) == 0
    assert wrong_blocks(second.guest, big_path, blocks) == 0

    snode.sh("lvextend -q -L +64m vg0/small")
    cluster.detach(one, first)
    path = cluster.attach(one, first)
    oracle.judge(first.guest, f"{path}/records")
    oracle.errors.clear()
    writer = oracle.write(first.guest, f"{path}/records")
    oracle.wait_for(300)
    oracle.judge(first.guest, f"{path}/records")
    end(writer)
    assert fill(second.guest, big_path, blocks, 8) == (8, "none")
    assert wrong_blocks(second.guest, big_path, blocks + 8) == 0
    until(lambda: capacity(cluster, "small") > 0, "capacity again")
    cluster.delete(cluster.create("more", size_bytes=4 * MIB, parameters={"pool": "small"}))
    remove_small(cluster, {one: first, old: second, big: second})


@pytest.mark.soak
def test_full_metadata_of_a_thin_pool_are_told_before_and_cost_no_record(cluster: Cluster, say: Say) -> None:
    snode, cnode, pool = cluster.snode.guest, cluster.cnodes[0], {"pool": "small"}
    snode.sh("lvcreate -qy --type thin-pool -L 128m -c 64k --poolmetadatasize 4m -n small vg0")
    snode.sh("lvchange -q --errorwhenfull y vg0/small")
    volume_id = cluster.create(size_bytes=64 * MIB, parameters=pool)
    path = cluster.attach(volume_id, cnode)
    oracle = Oracle("one")
    writer = oracle.write(cnode.guest, f"{path}/records")
    oracle.wait_for(10)
    assert filled(snode, "thins", "vg0-small-tpool", 0, 700) == (700, "none")
    until(lambda: capacity(cluster, "small") == 0, "no capacity above the watermark")
    error = refused(lambda: cluster.create("more", size_bytes=4 * MIB, parameters=pool))
    assert error is not None and error.code().name == "RESOURCE_EXHAUSTED", error
    assert "metadata is" in str(error.details())

    made, problem = filled(snode, "thins", "vg0-small-tpool", 700, 1000)
    until(lambda: bool(oracle.errors), "an error of the writer")
    assert writer.wait(60) == 0
    say(f"thin pool's metadata full after {made + 700} volumes ({problem}); the writer: {oracle.errors}")
    assert any("metadata is full" in text for text in doctor(cluster, "pool small"))

    snode.sh("lvextend -q --poolmetadatasize +4m vg0/small")
    cluster.detach(volume_id, cnode)
    path = cluster.attach(volume_id, cnode)
    oracle.judge(cnode.guest, f"{path}/records")
    oracle.errors.clear()
    writer = oracle.write(cnode.guest, f"{path}/records")
    oracle.wait_for(300)
    end(writer)
    remove_small(cluster, {volume_id: cnode})


def remove_small(cluster: Cluster, where: Mapping[str, Machine]) -> None:
    """The volumes of the pool `small`, and the pool."""
    for volume_id, cnode in where.items():
        cluster.detach(volume_id, cnode)
        cluster.delete(volume_id)
    cluster.snode.guest.sh("lvremove -qy vg0/small")


def fill(guest: Guest, path: str, first: int, count: int) -> tuple[int, str]:
    """Write blocks of 256 KiB; how many were acknowledged, and the error or "none"."""
    return filled(guest, "write", path, first, count)


def filled(guest: Guest, command: str, path: str, first: int, count: int) -> tuple[int, str]:
    """What filler.py says of its work."""
    done, _, error = guest.sh(program(guest, "filler.py", command, path, first, count), 240).partition(" ")
    return int(done), error


def wrong_blocks(guest: Guest, path: str, count: int) -> int:
    """How many of so many blocks are not as they were written."""
    return int(guest.sh(program(guest, "filler.py", "check", path, count), 120))


def until(done: Callable[[], bool], what: str, timeout: float = 40) -> None:
    """Return once it is so."""
    ends = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < ends, f"{what}: not after {timeout} s"
        time.sleep(0.05)


# -- flushes -----------------------------------------------------------------------------------------------------


def test_every_flush_of_a_node_reaches_the_disk_of_the_snode(cluster: Cluster, say: Say) -> None:
    snode, cnode = cluster.snode.guest, cluster.cnodes[0].guest
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cluster.cnodes[0], how=RAW)
    cluster.stage(volume_id, cluster.cnodes[0], context, how=RAW)
    path = cluster.mount(volume_id, cluster.cnodes[0], how=RAW)
    disk = initiator.disk_of(cnode, initiator.target_of(context))
    # The node believes in a volatile cache, so it flushes; tgtd has none of its own.
    assert cnode.sh(f"cat /sys/block/{disk}/queue/write_cache") == "write back"
    device = snode.sh(f"readlink -f /dev/vg0/{volume_id}")
    look = f"for fd in /proc/$(pidof tgtd)/fd/*; do [ $(readlink $fd) = {device} ] && cat ${{fd/fd/fdinfo}}; done; true"
    flags = [int(line.split()[1], 8) for line in snode.sh(look).splitlines() if line.startswith("flags")]
    assert flags and all(flag & _O_DIRECT for flag in flags)

    before = flushes(snode)
    write = "import os; fd = os.open('{0}', os.O_WRONLY{1})\nfor n in range(20): os.pwrite(fd, bytes(4096), n << 12){2}"
    count = {}
    for what, flag, then in (
        ("write and fdatasync", "", "; os.fdatasync(fd)"),
        ("write with O_DSYNC", " | os.O_DSYNC", ""),
    ):
        before = flushes(snode)
        cnode.sh(["/usr/bin/python3", "-c", write.format(path, flag, then)])
        count[what] = flushes(snode) - before
    before = flushes(snode)
    cnode.sh(f"dd if=/dev/zero of={path} bs=4096 count=20 oflag=direct status=none")
    count["write alone"] = flushes(snode) - before
    say(f"flushes of the SNODE's disk for 20 of each: {count}")
    cluster.detach(volume_id, cluster.cnodes[0])
    cluster.delete(volume_id)
    assert count["write alone"] < 10 and min(count["write and fdatasync"], count["write with O_DSYNC"]) >= 20


def flushes(snode: Guest) -> int:
    """How often the disk of vg0 was told to make its cache durable."""
    return int(snode.sh("cat /sys/block/ubdb/stat").split()[15])


# -- power -------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_snode_loses_its_power_under_writers(cluster: Cluster, say: Say) -> None:
    """What daemons and the SNODE's kernel hold is lost. The lab's disks have no cache of their own: that flushes reach
    them is another test's matter, that a real disk heeds them is the disk's.
    """
    writers = []
    for pool, cnode in zip(("thick", "thin"), cluster.cnodes, strict=True):
        volume_id = cluster.create(pool, parameters={"pool": pool})
        path = cluster.attach(volume_id, cnode)
        oracle = Oracle(pool)
        writers.append((volume_id, cnode, f"{path}/records", oracle, oracle.write(cnode.guest, f"{path}/records")))
        oracle.wait_for(50)
    for _ in range(20):
        late = cluster.create("late")
        context = cluster.publish(late, cluster.cnodes[0])
        cluster.snode.guest.kill9()
        began = time.monotonic()
        cluster.boot(cluster.snode)
        booted = seconds(began)
        cluster.wait_for_targets(3)
        restored = seconds(began)
        for _, cnode, path, oracle, _ in writers:
            oracle.wait_for_more()
            oracle.judge(cnode.guest, path)
            assert oracle.errors == []
        say(f"SNODE without power: up after {booted}, targets after {restored}, writes go on after {seconds(began)}")
        # What was answered just before the cut holds after it.
        cluster.stage(late, cluster.cnodes[0], context)
        cluster.detach(late, cluster.cnodes[0])
        cluster.delete(late)
    for (volume_id, cnode, _, oracle, writer), other in zip(writers, reversed(cluster.cnodes), strict=True):
        end(writer)
        cluster.detach(volume_id, cnode)
        oracle.judge(other.guest, f"{cluster.attach(volume_id, other)}/records")
        cluster.detach(volume_id, other)
        cluster.delete(volume_id)
