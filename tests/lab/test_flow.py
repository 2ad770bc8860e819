"""The reason for all of it: a container writes, its CNODE is lost, and another one has every acknowledged byte."""

import time

import pytest

from . import Lab
from .cluster import Cluster
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
    cluster.delete(volume_id)
    assert cluster.leftovers() == {}


def test_a_cnode_that_is_cut_off_but_alive_writes_no_more(lab: Lab, say: Say) -> None:
    cluster = Cluster(lab)
    first, second = cluster.cnodes
    oracle = Oracle("one")
    volume_id = cluster.create()
    path = cluster.attach(volume_id, first)
    oracle.write(first.guest, f"{path}/records")
    oracle.wait_for(30)
    first.guest.cut()
    cluster.unpublish(volume_id, first)
    acknowledged = oracle.acknowledged
    other = cluster.attach(volume_id, second)
    last = oracle.judge(second.guest, f"{other}/records")
    first.guest.heal()
    new = Oracle("one again")
    new.write(second.guest, f"{other}/new")
    new.wait_for(100)
    assert oracle.acknowledged == acknowledged, "the fenced node had a write acknowledged"
    assert oracle.judge(second.guest, f"{other}/records") == last
    new.judge(second.guest, f"{other}/new")
    say(f"{acknowledged} records before the fence, none after it")
