"""`snode failover` on real machines: SNODE and CNODEs of the lab with the driver, and a real API server.

What kubelets would do is played: their Leases are renewed from inside the CNODEs, so that a cut is a cut, and the pods
stand in the API alone.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from csi.errors import NotFound
from csi.kube import OUT_OF_SERVICE, Kube
from tests.lab import Lab, roles
from tests.lab.channel import Command
from tests.lab.cluster import Cluster, Machine
from tests.lab.conftest import Say, seconds
from tests.lab.guest import Guest
from tests.lab.kernel import PROJECT
from tests.lab.kubernetes_control import ControlPlane, until
from tests.lab.network import HOST_IP
from tests.lab.oracle import Oracle

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
]

DRIVER = "csi.snode.io"
#: From the power cut to the first new record that is durable.
MOST_SECONDS = 45.0
_LEASES = f"https://{HOST_IP}/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
#: Renews a node's Lease every 10 s, as kubelet does; patient with a server that does not answer, as kubelet is.
_KUBELET = """
import datetime, json, ssl, sys, time, urllib.request
url, name, every = sys.argv[1], sys.argv[2], float(sys.argv[3])
context = ssl._create_unverified_context()
def ask(method, url, body, kind):
    headers = {"Authorization": "Bearer admin", "Content-Type": kind}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
    return urllib.request.urlopen(request, timeout=5, context=context).read()
while True:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    body = {"metadata": {"name": name}, "spec": {"holderIdentity": name, "renewTime": now}}
    try:
        try:
            ask("PATCH", url + "/" + name, body, "application/merge-patch+json")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            ask("POST", url, body, "application/json")
        wait = every
    except OSError as error:
        print(error, flush=True)
        wait = 1
    time.sleep(wait)
"""
_FAILOVER = """
[node]
name = "snode"
[failover]
kubeconfig = "/etc/snode/kubeconfig"
namespace = "default"
"""
_MERGE = "application/merge-patch+json"


@dataclass
class World:
    """The machines, the API, and the failover on the SNODE."""

    machines: Cluster
    control: ControlPlane
    kube: Kube
    config: str
    kubelets: dict[str, Command] = field(default_factory=dict)
    failover: Command | None = None
    oracles: list[Oracle] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, body: Any = None, *, content: str = "application/json") -> Any:
        return self.kube._ask(method, path, body=body, content=content)

    def start_kubelet(self, guest: Guest) -> None:
        argv = ["/usr/bin/python3", "-c", _KUBELET, _LEASES, guest.name, "10"]
        self.kubelets[guest.name] = guest.spawn(argv, name="kubelet")

    def stop_kubelet(self, guest: Guest) -> None:
        self.kubelets[guest.name].signal(9)
        self.kubelets[guest.name].wait(10)

    def start_failover(self, settings: str = "") -> None:
        """Start it, again if it runs; returns once it looks."""
        if self.failover is not None:
            self.failover.signal(15)
            assert self.failover.wait(30) == 0
        snode = self.machines.snode.guest
        snode.write("/etc/snode/failover.toml", self.config + _FAILOVER + settings, mode=0o600)
        python = PROJECT / ".venv/bin/python"
        argv = ["env", "-C", str(PROJECT), str(python), "-m", "csi", "failover", "--config", "/etc/snode/failover.toml"]
        self.log.clear()
        self.failover = snode.spawn(argv, name="failover", on_line=self.log.append)
        until("the failover has started", lambda: any(" started " in line for line in self.log), every=0.05)

    def use(self, machine: Machine, name: str) -> None:
        """A volume in use on a CNODE, and what stands of it in the API."""
        volume_id = self.machines.create(name)
        path = f"{self.machines.attach(volume_id, machine)}/records"
        self.oracles.append(Oracle(name))
        self.oracles[-1].write(machine.guest, path)
        self.oracles[-1].wait_for(20)
        node = machine.guest.name
        self.ask("POST", "/api/v1/persistentvolumes", {
            "metadata": {"name": f"pv-{name}"},
            "spec": {
                "capacity": {"storage": "96Mi"}, "accessModes": ["ReadWriteOnce"],
                "csi": {"driver": DRIVER, "volumeHandle": volume_id},
                "claimRef": {"namespace": "default", "name": name}, "persistentVolumeReclaimPolicy": "Retain",
            },
        })  # fmt: skip
        self.ask("POST", "/apis/storage.k8s.io/v1/volumeattachments", {
            "metadata": {"name": f"va-{name}"},
            "spec": {"attacher": DRIVER, "nodeName": node, "source": {"persistentVolumeName": f"pv-{name}"}},
        })  # fmt: skip
        self.ask("PATCH", f"/apis/storage.k8s.io/v1/volumeattachments/va-{name}/status",
                 {"status": {"attached": True}}, content=_MERGE)  # fmt: skip
        self.ask("POST", "/api/v1/namespaces/default/pods", {
            "metadata": {"name": f"pod-{name}"},
            "spec": {
                "nodeName": node, "containers": [{"name": "main", "image": "localhost/none:1"}],
                "automountServiceAccountToken": False,
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": name}}],
            },
        })  # fmt: skip
        running = {
            "name": "main",
            "ready": True,
            "restartCount": 0,
            "image": "",
            "imageID": "",
            "state": {"running": {}},
        }
        self.ask("PATCH", f"/api/v1/namespaces/default/pods/pod-{name}/status",
                 {"status": {"containerStatuses": [running]}}, content=_MERGE)  # fmt: skip

    def tainted(self) -> list[str]:
        """The nodes that are out of service."""
        nodes = [self.kube.node(machine.guest.name) for machine in self.machines.machines]
        return [node.name for node in nodes if any(taint.key == OUT_OF_SERVICE for taint in node.taints)]

    def report_ready(self, name: str) -> None:
        """What kubelet says of its node."""
        status = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
        self.ask("PATCH", f"/api/v1/nodes/{name}/status", status, content=_MERGE)

    def pods(self) -> set[str]:
        return {item["metadata"]["name"] for item in self.ask("GET", "/api/v1/namespaces/default/pods")["items"]}

    def events(self) -> list[str]:
        items = self.ask("GET", "/api/v1/namespaces/default/events")["items"]
        ours = [one for one in items if one["source"].get("component") == "snode-failover"]
        return [f"{one['involvedObject']['name']}: {one['reason']}: {one['message']}" for one in ours]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        machines = Cluster(lab)
        names = [machine.guest.name for machine in machines.machines]
        control = ControlPlane(lab, names)
        control.start()
        kube = Kube(control.client(), namespace="default")
        made = World(machines, control, kube, machines.snode.config)
        for machine in machines.machines:
            name = machine.guest.name
            made.ask("POST", "/api/v1/nodes", {"metadata": {"name": name}})
            made.report_ready(name)
            made.start_kubelet(machine.guest)
        until("a service account", lambda: made.ask("GET", "/api/v1/namespaces/default/serviceaccounts")["items"])
        machines.snode.guest.write("/etc/snode/kubeconfig", json.dumps(control.kubeconfig("admin")), mode=0o600)
        for machine, name in zip(machines.cnodes, ("one", "two"), strict=True):
            made.use(machine, name)
        yield made
        control.close()


# -- false alarms ----------------------------------------------------------------------------------------------------

#: Long enough for a decision by the settings of the false alarms, if there were to be one.
_HOLD = 24.0
_SOON = "after = 10\nlease = 15\n"


class Alarms:
    """What looks like a lost CNODE, and is none. Each holds for long enough to be fallen for, and is put right."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._snode = world.machines.snode
        self._cnodes = [machine.guest for machine in world.machines.cnodes]

    def kubelet_stops(self, count: int = 1) -> None:
        for guest in self._cnodes[:count]:
            self._world.stop_kubelet(guest)
        time.sleep(_HOLD)
        for guest in self._cnodes[:count]:
            self._world.start_kubelet(guest)

    def kubelets_of_all_stop(self) -> None:
        self.kubelet_stops(len(self._cnodes))

    def the_way_to_the_snode_is_cut(self) -> None:
        self._cnodes[0].sh(f"ip route add blackhole {self._snode.guest.ip}")
        time.sleep(_HOLD)
        self._cnodes[0].sh(f"ip route del blackhole {self._snode.guest.ip}")

    def the_snode_is_cut_off(self) -> None:
        self._snode.guest.cut()
        time.sleep(_HOLD)
        self._snode.guest.heal()

    def all_cnodes_are_cut_off(self) -> None:
        """The switch between, with the SNODE and the API server on its other side."""
        for guest in self._cnodes:
            guest.cut()
        time.sleep(_HOLD)
        for guest in self._cnodes:
            guest.heal()

    def tgtd_restarts(self) -> None:
        assert self._snode.daemon is not None
        self._snode.daemon.signal(9)
        self._snode.daemon.wait(10)
        time.sleep(6)
        self._snode.daemon = roles.start_tgtd(self._snode.guest)
        time.sleep(_HOLD / 2)

    def the_api_server_restarts(self) -> None:
        self._world.control.kill_api_server()
        time.sleep(_HOLD)
        self._world.control.restart_api_server()

    def a_short_cut(self) -> None:
        self._cnodes[0].cut()
        time.sleep(7)
        self._cnodes[0].heal()

    def a_cnode_hangs_for_a_moment(self) -> None:
        self._cnodes[0].pause()
        time.sleep(7)
        self._cnodes[0].resume()

    def the_snodes_clock_jumps(self) -> None:
        self._snode.guest.sh("date -s '+1 hour'")
        time.sleep(_HOLD / 2)
        self._snode.guest.sh("date -s '-1 hour'")
        time.sleep(_HOLD / 2)

    def the_failover_restarts(self) -> None:
        self._world.start_failover(_SOON)

    def all(self) -> list[Callable[[], None]]:
        """One after the other."""
        return [
            self.kubelet_stops,
            self.kubelets_of_all_stop,
            self.the_way_to_the_snode_is_cut,
            self.the_snode_is_cut_off,
            self.all_cnodes_are_cut_off,
            self.tgtd_restarts,
            self.the_api_server_restarts,
            self.a_short_cut,
            self.a_cnode_hangs_for_a_moment,
            self.the_snodes_clock_jumps,
            self.the_failover_restarts,
        ]


def test_false_alarms(world: World, say: Say) -> None:
    # Sooner than by default: the alarms are the harder, and the test the shorter.
    world.start_failover(_SOON)
    time.sleep(20)
    told = 0
    for alarm in Alarms(world).all():
        began = time.monotonic()
        alarm()
        for oracle in world.oracles:
            oracle.wait_for_more(10, 90)
        news = world.events()[told:]
        told += len(news)
        assert world.tainted() == [] and all(": FailoverRefused: " in line for line in news), (news, world.log[-20:])
        say(f"{alarm.__name__}: nothing done in {seconds(began)}{'; told: ' if news else ''}{'; '.join(news)}")
    assert [oracle.errors for oracle in world.oracles] == [[], []]


# -- a power cut -----------------------------------------------------------------------------------------------------


def test_a_power_cut(world: World, say: Say) -> None:
    first, second = world.machines.cnodes
    world.start_failover()
    time.sleep(30)
    told = len(world.events())
    began = time.monotonic()
    first.guest.kill9()
    until("it is out of service", lambda: world.tainted() == ["cnode1"], 90, every=0.1)
    say(f"power cut: fenced and out of service after {seconds(began)}")
    volume_id, oracle = world.machines.create("one"), world.oracles[0]
    shown = world.machines.snode.guest.sh("tgtadm --lld iscsi --op show --mode target")
    assert volume_id not in shown, "its target is there"
    until("its pod is gone", lambda: world.pods() == {"pod-two"}, 10)
    # What Kubernetes does now: detach, attach and mount elsewhere.
    durable = oracle.acknowledged
    path = f"{world.machines.attach(volume_id, second)}/records"
    assert oracle.judge(second.guest, path) >= durable
    oracle.write(second.guest, path)
    oracle.wait_for(1)
    took = time.monotonic() - began
    say(f"power cut: all {durable} records are there, the first new one is durable after {took:.1f} s")
    assert took < MOST_SECONDS
    with suppress(NotFound):
        world.ask("DELETE", "/apis/storage.k8s.io/v1/volumeattachments/va-one")
    world.machines.boot(first)
    world.start_kubelet(first.guest)
    world.report_ready("cnode1")
    until("it is in service again", lambda: world.tainted() == [], 60)
    reasons = [line.split(": ")[1] for line in world.events()[told:] if line.startswith("cnode1")]
    assert reasons[:2] == ["FailoverBegins", "FailoverMarked"] and reasons[-1] == "FailoverEnded", reasons
    oracle.wait_for_more(10)
    oracle.judge(second.guest, path)
