"""The reason for all of it: a container writes, its CNODE is lost, and another one has every acknowledged byte."""

import time

import pytest

from tests.bench.relays import Relays
from tests.bench.way import LOSS, STEPS, Race

from . import Lab
from .cluster import Cluster, refused
from .conftest import Say, seconds
from .oracle import Oracle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def test_a_lost_cnode_costs_no_acknowledged_record(lab: Lab, say: Say) -> None:
    cluster = Cluster(lab)
    first, second = cluster.cnodes
    oracle = Oracle("one")
    began = time.monotonic()
    volume_id = cluster.create()
    say(f"create {seconds(began)}")
    began = time.monotonic()
    path = cluster.attach(volume_id, first)
    say(f"publish, stage with mkfs, mount {seconds(began)}")
    oracle.write(first.guest, f"{path}/records")
    oracle.wait_for(50)
    first.guest.kill9()
    began = time.monotonic()
    cluster.unpublish(volume_id, first)
    fenced = seconds(began)
    path = cluster.attach(volume_id, second)
    say(f"CNODE lost: fence {fenced}, served on the other one after {seconds(began)}")
    oracle.judge(second.guest, f"{path}/records")
    oracle.write(second.guest, f"{path}/records")
    oracle.wait_for(20)
    second.guest.sh("pkill -9 -f writer.py")
    # The lost one comes back, and finds nothing to write to.
    cluster.boot(first)
    assert first.guest.run("iscsiadm -m session")[0] == 21
    oracle.judge(second.guest, f"{path}/records")
    cluster.detach(volume_id, second)
    copy = cluster.snode.guest.spawn(f"exec < /dev/vg0/{volume_id}; echo open; exec sleep 600", name="copy")
    copy.wait_for("open")
    error = refused(lambda: cluster.delete(volume_id))
    assert error and "still open on this machine" in str(error.details()), "a copy under way is not cut off"
    copy.signal(9)
    cluster.delete(volume_id)
    assert cluster.leftovers() == {}


@pytest.mark.soak
def test_the_way_and_the_loss_beside_the_hand(lab: Lab, say: Say) -> None:
    """Prints what each step takes; asserts nothing about time. `make bench` measures it properly."""
    cluster, relays = Cluster(lab, log_level="info"), Relays()
    race = Race(cluster, relays)
    race.way()
    say("the way of a volume, once:")
    for line in race.lines(STEPS):
        say(line)
    race.forget()
    race.loss()
    say("the loss of a CNODE, once:")
    for line in race.lines(LOSS):
        say(line)
