"""What happens to volume groups: a guest makes one inside its volume, metadata fill up, lvcreate dies, a disk dies."""

import random
import secrets
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.lab import roles
from tests.lab.cluster import MIB, Cluster, capability, refused
from tests.lab.conftest import Say, seconds
from tests.lab.faults import initiator, legs
from tests.lab.faults.pools import doctor, program, restart_driver, volumes_of
from tests.lab.guest import Guest
from tests.lab.keeper import POOLS, Keeper
from tests.lab.oracle import Oracle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

RAW = capability(block=True)
GROUPS = "vgs --noheadings -o vg_name 2>/dev/null"
SECRET = "the-last-tenants-secret"
_PLAIN = """
[pools.plain]
type = "lvm"
vg = "vg1"
"""
_CROWDED = f"""
[pools.crowded]
type = "lvm"
vg = "{legs.SMALL_GROUP}"
"""


@pytest.fixture(scope="module")
def keeper() -> Iterator[Keeper]:
    """Besides the usual pools, `plain` on the same disks as `mirror`, and `crowded` with little room for metadata."""

    def prepare(snode: Guest) -> None:
        roles.ensure_thin_pool(snode)
        legs.make(snode)

    made = Keeper(pools=POOLS + _PLAIN + _CROWDED, prepare=prepare)
    yield made
    made.drop()


# -- a volume group inside a volume ------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_volume_group_in_a_volume_is_the_guests_alone(cluster: Cluster) -> None:
    snode, cnode = cluster.snode.guest, cluster.cnodes[0]
    one = cluster.create()
    context = cluster.publish(one, cnode, how=RAW)
    cluster.stage(one, cnode, context, how=RAW)
    cluster.mount(one, cnode, how=RAW)
    disk = f"/dev/{initiator.disk_of(cnode.guest, initiator.target_of(context))}"
    cnode.guest.sh(f"modprobe dm-mod; vgcreate -qy vg0 {disk} && lvcreate -qy -l1 -n mine vg0")
    # A machine whose LVM is told to look into volumes too sees two groups of one name.
    snode.write("/etc/lvm/lvmlocal.conf", "devices { scan_lvs = 1 }\n")
    assert snode.sh(GROUPS).split().count("vg0") == 2
    restart_driver(cluster)

    two = cluster.create("two")
    cluster.expand(two, 128 * MIB)
    cluster.attach(two, cnode)
    cluster.detach(two, cnode)
    cluster.delete(two)
    assert doctor(cluster, "pool thick") == []
    assert "scan_lvs = 0" in doctor(cluster, "lvm")[0]
    snode.sh("rm /etc/lvm/lvmlocal.conf")

    error = refused(lambda: cluster.leave(one, cnode))
    assert error is not None and error.code().name == "FAILED_PRECONDITION", error
    assert "vg0-mine" in str(error.details())
    cnode.guest.sh("lvs vg0/mine && vgchange -q -an vg0")
    cluster.detach(one, cnode)
    cluster.delete(one)
    assert cluster.leftovers() == {}
    assert snode.sh(f"{GROUPS} --config 'devices {{ scan_lvs = 1 }}'").split().count("vg0") == 1


# -- metadata ----------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_volumes_are_refused_before_the_metadata_of_the_group_are_full(cluster: Cluster, say: Say) -> None:
    snode, cnode, group = cluster.snode.guest, cluster.cnodes[0], legs.SMALL_GROUP
    pool = {"pool": "crowded"}
    first = cluster.create("first", size_bytes=16 * MIB, parameters=pool)
    snode.sh(f"lvcreate -qy -an -l1 -n foreign {group}")
    room = "lvm vgs --noheadings --nosuffix --units b -o vg_mda_free,vg_mda_size"
    while True:
        free, size = map(int, snode.sh(f"{room} {group}").split())
        spare = free - 0.101 * size
        if spare < 2000:
            break
        tags = (f"--addtag={secrets.token_hex(400)}" for _ in range(int(min(100, 1 + spare // 2000))))
        snode.sh(["lvchange", "-q", *tags, f"{group}/foreign"])
    made: list[str] = []
    while len(made) < 30:
        create = partial(cluster.create, f"n{len(made)}", size_bytes=4 * MIB, parameters=pool)
        if (error := refused(lambda: made.append(create()))) is not None:  # noqa: B023 - done in this round
            break
    say(f"refused after {len(made)} volumes: {error and error.details()}")
    assert error is not None and error.code().name == "RESOURCE_EXHAUSTED", error
    assert "metadata area" in str(error.details())
    # All that is there goes on: it is used, marked as used, and can be deleted.
    cluster.attach(first, cnode)
    cluster.detach(first, cnode)
    for volume_id in [first, *made]:
        cluster.delete(volume_id)
    snode.sh(f"lvremove -qy {group}/foreign")
    cluster.delete(cluster.create("again", size_bytes=8 * MIB, parameters=pool))


# -- a command that dies -----------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_lvcreate_is_killed_at_any_moment(cluster: Cluster, say: Say, rounds: int) -> None:
    snode = cluster.snode.guest
    pools = {"thick": "vg0", "mirror": "vg1"}
    longest, failed, killed, left = {}, 0, 0, 0
    for pool in pools:
        began = time.monotonic()
        volume_id = cluster.create(size_bytes=8 * MIB, parameters={"pool": pool})
        longest[pool] = time.monotonic() - began
        cluster.delete(volume_id)
    for number in range(rounds):
        pool = list(pools)[number % 2]
        arguments = ("lvcreate", longest[pool], random.randrange(1 << 30))
        killer = snode.spawn(program(snode, "killer.py", *arguments), name="killer")
        killer.wait_for("ready")
        create = partial(cluster.create, size_bytes=8 * MIB, parameters={"pool": pool})
        error = refused(create)
        killer.wait(30)
        killed += "killed" in killer.out
        failed += error is not None
        there = volumes_of(snode, pools[pool])
        left += error is not None and len(there) > 0
        assert all(size == 8 and "snode.pool=" in tags for size, tags in there.values()), there
        volume_id = create()
        assert list(volumes_of(snode, pools[pool])) == [volume_id]
        assert snode.sh(f"blockdev --getsize64 /dev/{pools[pool]}/{volume_id}") == str(8 * MIB)
        cluster.delete(volume_id)
    say(f"{rounds} creations, {killed} killed at work, {failed} failed by it and {left} of these had left a volume")
    assert killed


# -- a disk dies -------------------------------------------------------------------------------------------------


def test_a_disk_of_a_mirror_dies_and_is_replaced_under_a_writer(cluster: Cluster, say: Say) -> None:
    snode, cnode = cluster.snode.guest, cluster.cnodes[0]
    oracle = Oracle("one")
    volume_id = cluster.create(parameters={"pool": "mirror"})
    volume = f"vg1/{volume_id}"
    in_step = f"lvs --noheadings -o sync_percent {volume} | grep -q 100.00"
    roles.until(snode, in_step, "the RAID copies in step", 600)
    path = cluster.attach(volume_id, cnode)
    writer = oracle.write(cnode.guest, f"{path}/records")
    oracle.wait_for(30)
    bad = legs.leg_of(snode, f"{volume}_rimage_0")
    legs.fail(snode, bad)
    began = time.monotonic()
    oracle.wait_for_more(1)
    stall = seconds(began)
    oracle.wait_for_more(30)
    wrong = doctor(cluster, "pool mirror")
    assert any(volume_id in text and "lvconvert --repair" in text for text in wrong), wrong
    assert any("vgreduce --removemissing vg1" in text for text in wrong), wrong
    began = time.monotonic()
    snode.sh(f"lvconvert -y --repair {volume}", 120)
    roles.until(snode, in_step, "the new copy in step", 600)
    snode.sh("vgreduce --removemissing vg1")
    repaired = seconds(began)
    oracle.wait_for_more(30)
    assert doctor(cluster, "pool mirror") == []
    say(f"a disk of a mirror dies: the next record is durable after {stall}; a new copy is in step after {repaired}")
    oracle.judge(cnode.guest, f"{path}/records")
    assert oracle.errors == []
    writer.signal(9)
    writer.wait(30)
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)
    assert cluster.leftovers() == {}
    legs.replace(snode, bad)


# -- the next tenant ---------------------------------------------------------------------------------------------


def test_the_next_tenant_reads_zeros_though_the_wipe_was_killed(cluster: Cluster, say: Say) -> None:
    snode, cnode = cluster.snode.guest, cluster.cnodes[0]
    size, pool = 48 * MIB, {"pool": "plain"}
    volume_id = cluster.create(size_bytes=size, parameters=pool)
    leg = legs.leg_of(snode, f"vg1/{volume_id}")
    disk = f"/dev/mapper/leg{leg}"
    path = cluster.attach(volume_id, cnode, how=RAW)
    fill(cnode.guest, path, size)
    cluster.detach(volume_id, cnode)
    before = lines_of_secret(snode, disk)
    assert before > 2_000_000
    with legs.slow_writes(snode, leg, 500):
        cluster.delete(volume_id)
        roles.until(snode, "grep -q 'zeroed_bytes.: [1-9]' /var/lib/snode/pools/plain/wipes/*", "a note of a wipe", 400)
        assert cluster.snode.driver is not None
        cluster.snode.driver.kill9()
    left = lines_of_secret(snode, disk)
    assert 0 < left < before
    cluster.start_driver(cluster.snode)
    assert cluster.leftovers() == {}
    assert lines_of_secret(snode, disk) == 0
    volume_id = cluster.create("two", size_bytes=size, parameters=pool)
    assert legs.leg_of(snode, f"vg1/{volume_id}") == leg
    path = cluster.attach(volume_id, cnode, how=RAW)
    assert bytes_not_zero(cnode.guest, path) == 0
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)
    say(f"the wipe was killed with {left} of {before} lines of the old data left; the next tenant has none")


@pytest.mark.soak
def test_the_next_tenant_of_a_thin_pool_reads_zeros_around_its_writes(cluster: Cluster) -> None:
    snode, cnode = cluster.snode.guest, cluster.cnodes[0]
    size, pool = 32 * MIB, {"pool": "thin"}
    volume_id = cluster.create(size_bytes=size, parameters=pool)
    path = cluster.attach(volume_id, cnode, how=RAW)
    fill(cnode.guest, path, size)
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)
    start = int(snode.sh("dmsetup table vg0-thin_tdata").split()[4])
    assert lines_of_secret(snode, f"/dev/ubdb skip={start >> 11} count=256") > 1_000_000, "it is wiped already"
    volume_id = cluster.create("two", size_bytes=size, parameters=pool)
    path = cluster.attach(volume_id, cnode, how=RAW)
    # A byte in each chunk, so that the pool gives the volume a block for it.
    touch = (
        f"import os; fd = os.open('{path}', os.O_WRONLY)\nfor n in range({size >> 16}): os.pwrite(fd, b'x', n << 16)"
    )
    cnode.guest.sh(["/usr/bin/python3", "-c", f"{touch}\nos.fsync(fd)"])
    assert float(snode.sh(f"lvs --noheadings -o data_percent vg0/{volume_id}")) == 100
    assert bytes_not_zero(cnode.guest, path) == size >> 16
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)
    # A pool that does not zero its blocks is not used.
    snode.sh("lvchange -q --zero=n vg0/thin")
    restart_driver(cluster)
    error = refused(lambda: cluster.create("three", size_bytes=size, parameters=pool))
    assert error is not None and "does not zero its blocks" in str(error.details()), error
    snode.sh("lvchange -q --zero=y vg0/thin")
    cluster.delete(cluster.create("three", size_bytes=size, parameters=pool))


def fill(guest: Guest, path: str, size_bytes: int) -> None:
    """Write the secret over the whole of a device."""
    guest.sh(f"yes {SECRET} | dd of={path} bs=1M count={size_bytes // MIB} iflag=fullblock oflag=direct status=none")


def lines_of_secret(guest: Guest, device: str) -> int:
    """How often the secret is on a device."""
    return int(guest.run(f"dd if={device} bs=1M iflag=direct status=none | tr -d '\\0' | grep -ac {SECRET}")[1])


def bytes_not_zero(guest: Guest, device: str) -> int:
    """How many bytes of a device are not zero; every one is looked at."""
    return int(guest.sh(f"dd if={device} bs=1M iflag=direct status=none | tr -d '\\0' | wc -c"))
