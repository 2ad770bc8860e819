"""Failover by itself, on a real Kubernetes: a lost CNODE's pod writes elsewhere soon; false alarms do nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kubernetes import client

from tests.lab.conftest import Say, seconds
from tests.lab.guest import Guest
from tests.lab.kubernetes import NAMESPACE, OUT_OF_SERVICE, Kubernetes, running
from tests.lab.kubernetes_control import until
from tests.lab.kubernetes_look import left_on_cnode, leftovers

from .stateful_writer import StatefulWriter

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

#: From the power cut to the first new record that is durable, at kubelet's and Kubernetes' own settings.
MOST_SECONDS = 45.0
#: Of the settings in the false alarms: soon, so that they are the harder ones, and the test the shorter.
_SOON = {"SNODE_FAILOVER_AFTER": "10", "SNODE_FAILOVER_LEASE": "15"}
#: Long enough for a decision by those settings, if there were to be one.
_HOLD = 24.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Kubernetes]:
    with running(manager=(), components=["failover"]) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(cluster: Kubernetes) -> Iterator[None]:
    yield
    cluster.restore()
    cluster.clear()
    until("nothing is left", lambda: not leftovers(cluster), 90)


def decisions(cluster: Kubernetes) -> dict[str, str]:
    """The Events of the failover by their uids, oldest first."""
    found = cluster.core.list_namespaced_event("default").items
    ours = [event for event in found if event.source and event.source.component == "snode-failover"]
    ours.sort(key=lambda event: event.first_timestamp)
    return {e.metadata.uid: f"{e.involved_object.name}: {e.reason}: {e.message}" for e in ours}


def tainted(cluster: Kubernetes) -> list[str]:
    """The nodes that are out of service."""
    return [
        node.metadata.name
        for node in cluster.core.list_node().items
        if any(taint.key == OUT_OF_SERVICE for taint in node.spec.taints or ())
    ]


def wait_leader(cluster: Kubernetes) -> None:
    """Return once `snode failover` leads and has seen every kubelet renew."""
    cluster.wait_driver()  # whose pod it is in
    wait_led(cluster)
    time.sleep(25)


def wait_led(cluster: Kubernetes) -> None:
    """Return once somebody leads and goes on doing so: a failover that does nothing at all has no false alarms."""

    api: Any = client.CoordinationV1Api(cluster.api)

    def renewed() -> Any:
        leases = api.list_namespaced_lease(NAMESPACE).items
        found = next((lease.spec for lease in leases if lease.metadata.name == "snode-failover"), None)
        return found.renew_time if found and found.holder_identity else None

    first = until("somebody leads the failover", renewed, 90)
    until("the leader goes on", lambda: renewed() not in (None, first), 60)


@pytest.mark.parametrize("how", ["power cut", "cut off"])
def test_a_lost_cnode(how: str, cluster: Kubernetes, say: Say) -> None:
    database = StatefulWriter(cluster, "db")
    lost = database.start()
    wait_leader(cluster)
    began = time.monotonic()
    lost.kill9() if how == "power cut" else lost.cut()
    until("it is out of service", lambda: tainted(cluster) == [lost.name], 90, every=0.1)
    say(f"{how}: fenced and out of service after {seconds(began)}")
    durable = database.oracle.acknowledged
    database.wait_elsewhere()
    database.find_all()
    took = time.monotonic() - began
    say(f"{how}: all {durable} records found elsewhere, the first new one is durable after {took:.1f} s")
    assert took < MOST_SECONDS
    # It comes back: in service again once it has let go of everything.
    began = time.monotonic()
    if how == "power cut":
        cluster.boot(lost)
    else:
        lost.heal()
    until("it is in service again", lambda: not tainted(cluster), 240)
    used = [what for what in left_on_cnode(lost) if "sessions" in what or "mounts" in what]
    assert used == [], "in service again with volumes that it lost"
    say(f"{how}: back and clean after {seconds(began)}")
    until("records of what it lost are gone", lambda: not left_on_cnode(lost), 120)
    assert database.oracle.heard()[0] == durable, "it wrote after it was fenced"
    database.judge()
    reasons = [line.split(": ")[1] for line in decisions(cluster).values() if line.startswith(lost.name)]
    assert reasons[-1] == "FailoverEnded" and {"FailoverBegins", "FailoverMarked", "FailoverDone"} <= {*reasons}


# -- false alarms ----------------------------------------------------------------------------------------------------


class Alarms:
    """What looks like a lost CNODE, and is none. Each holds for long enough to be fallen for, and is put right."""

    def __init__(self, cluster: Kubernetes, first: Guest, second: Guest) -> None:
        self._cluster = cluster
        self._first, self._second = first, second

    def kubelet_stops(self) -> None:
        self._cluster.kill(self._first, "kubelet")
        time.sleep(_HOLD)
        self._cluster.start_kubelet(self._first)

    def kubelets_of_all_stop(self) -> None:
        for node in (self._first, self._second):
            self._cluster.kill(node, "kubelet")
        time.sleep(_HOLD)
        for node in (self._first, self._second):
            self._cluster.start_kubelet(node)

    def the_way_to_the_snode_is_cut(self) -> None:
        route = f"blackhole {self._cluster.snode.ip}"
        self._first.sh(f"ip route add {route}")
        time.sleep(_HOLD)
        self._first.sh(f"ip route del {route}")

    def the_snode_is_cut_off(self) -> None:
        self._cluster.snode.cut()
        time.sleep(_HOLD)
        self._cluster.snode.heal()

    def only_the_ways_to_the_snode_are_cut(self) -> None:
        """The API works, and one kubelet stops as well."""
        self._cluster.kill(self._first, "kubelet")
        route = f"blackhole {self._cluster.snode.ip}"
        for node in (self._first, self._second):
            node.sh(f"ip route add {route}")
        time.sleep(_HOLD)
        for node in (self._first, self._second):
            node.sh(f"ip route del {route}")
        self._cluster.start_kubelet(self._first)

    def all_cnodes_are_cut_off(self) -> None:
        """The switch between, with the SNODE and the API server on its other side."""
        for node in (self._first, self._second):
            node.cut()
        time.sleep(_HOLD)
        for node in (self._first, self._second):
            node.heal()

    def tgtd_restarts(self) -> None:
        self._cluster.kill(self._cluster.snode, "tgtd")
        time.sleep(6)
        self._cluster.start_tgtd()
        time.sleep(_HOLD / 2)

    def the_api_server_restarts(self) -> None:
        self._cluster.control.kill_api_server()
        time.sleep(_HOLD)
        self._cluster.control.restart_api_server()

    def a_short_cut(self) -> None:
        self._first.cut()
        time.sleep(7)
        self._first.heal()

    def a_cnode_hangs_for_a_moment(self) -> None:
        self._first.pause()
        time.sleep(7)
        self._first.resume()

    def the_snodes_clock_jumps(self) -> None:
        self._cluster.snode.sh("date -s '+1 hour'")
        time.sleep(_HOLD / 2)
        self._cluster.snode.sh("date -s '-1 hour'")
        time.sleep(_HOLD / 2)

    def the_failover_dies(self) -> None:
        self._cluster.control.kubectl("delete", "pod", f"--namespace={NAMESPACE}", "--selector=app=snode-controller")
        self._cluster.wait_driver()

    def all(self) -> list[Callable[[], None]]:
        """One after the other."""
        return [
            self.kubelet_stops,
            self.kubelets_of_all_stop,
            self.the_way_to_the_snode_is_cut,
            self.the_snode_is_cut_off,
            self.only_the_ways_to_the_snode_are_cut,
            self.all_cnodes_are_cut_off,
            self.tgtd_restarts,
            self.the_api_server_restarts,
            self.a_short_cut,
            self.a_cnode_hangs_for_a_moment,
            self.the_snodes_clock_jumps,
            self.the_failover_dies,
        ]


@contextmanager
def sooner(cluster: Kubernetes) -> Iterator[None]:
    """The failover decides sooner than by default, for as long as the block lasts."""
    target = ["deployment/snode-controller", f"--namespace={NAMESPACE}", "--containers=failover"]
    cluster.control.kubectl("set", "env", *target, *(f"{name}={value}" for name, value in _SOON.items()))
    cluster.wait_driver()
    yield
    cluster.control.kubectl("set", "env", *target, *(f"{name}-" for name in _SOON))
    cluster.wait_driver()


@pytest.mark.timeout(900)
def test_false_alarms(cluster: Kubernetes, say: Say) -> None:
    first, second = (StatefulWriter(cluster, f"w{n + 1}", node=guest.name) for n, guest in enumerate(cluster.cnodes))
    guests = first.start(), second.start()
    uids = [writer.pod.metadata.uid for writer in (first, second)]
    with sooner(cluster):
        wait_leader(cluster)
        before = set(decisions(cluster))
        for alarm in Alarms(cluster, *guests).all():
            began = time.monotonic()
            alarm()
            cluster.wait_ready(*(guest.name for guest in cluster.nodes), seconds=120)
            for one in (first, second):
                one.oracle.wait_for_more(20, 120)
            wait_led(cluster)
            told = decisions(cluster)
            news = [told[uid] for uid in told.keys() - before]
            before = set(told)
            assert tainted(cluster) == [], news
            assert all(": FailoverRefused: " in line for line in news), news
            say(f"{alarm.__name__}: nothing done in {seconds(began)}{'; told: ' if news else ''}{'; '.join(news)}")
            if alarm.__name__ == "only_the_ways_to_the_snode_are_cut":
                assert any("SnodeCutOff" in line for line in news), news
        for one, uid in zip((first, second), uids, strict=True):
            assert cluster.find_pod(f"{one.name}-0").metadata.uid == uid
            assert one.oracle.errors == []
            one.judge()
        # And it was awake all the time.
        guests[0].kill9()
        until("a real loss is seen by the same settings", lambda: tainted(cluster) == [guests[0].name], 90)
