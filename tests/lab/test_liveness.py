"""When a node was last heard of, on real kernels: what a takeover of its volumes is decided by."""

import json
import time
from collections.abc import Callable

import pytest

from tests.lab import Lab, roles
from tests.lab.cluster import Cluster
from tests.lab.conftest import Say
from tests.lab.kernel import PROJECT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

# What `snode failover` sees, once a second, as JSON.
_WATCH = """
import json, sys, time
from pathlib import Path
from csi.deadline import Deadline
from csi.errors import DriverError
from csi.failover.view import Watch
watch = Watch(Path("/var/run/tgtd/socket.0"), Path("/var/lib/snode/publications"), ports=[3260], snode="s", driver="d")
while True:
    try:
        view = watch.look(Deadline.after(5))
        print(json.dumps({name: silence.seconds for name, silence in view.nodes.items()}), flush=True)
    except DriverError as error:
        print("blind", error, flush=True)
    time.sleep(1)
"""


class Silence:
    """The nodes' silence in seconds, as the SNODE last saw it."""

    def __init__(self, cluster: Cluster) -> None:
        self.now: dict[str, float] = {}
        self.most: dict[str, float] = {}
        argv = ["env", "-C", str(PROJECT), str(PROJECT / ".venv/bin/python"), "-c", _WATCH]
        self._process = cluster.snode.guest.spawn(argv, name="watch", on_line=self._hear)

    def _hear(self, line: str) -> None:
        if line.startswith("{"):
            self.now = json.loads(line)
            self.most = {name: max(seconds, self.most.get(name, 0.0)) for name, seconds in self.now.items()}

    def watch(self, seconds: float) -> dict[str, float]:
        """The longest silence of each in this time."""
        self.most = {}
        time.sleep(seconds)
        return self.most

    def wait(self, check: Callable[[dict[str, float]], bool], seconds: float = 60) -> float:
        """Seconds until a look is so."""
        began = time.monotonic()
        while not (self.now and check(self.now)):
            assert time.monotonic() - began < seconds, self.now
            time.sleep(0.05)
        return time.monotonic() - began


def test_silence_of_nodes(lab: Lab, say: Say) -> None:
    cluster = Cluster(lab)
    for cnode in cluster.cnodes:
        cluster.attach(cluster.create(cnode.guest.name), cnode)
    first, second = cluster.cnodes
    silence = Silence(cluster)
    silence.wait(lambda now: now.keys() == {"cnode1", "cnode2"})
    # Nobody writes: only the pings of both ends are to be heard.
    idle = silence.watch(20)
    assert max(idle.values()) < 8, idle
    say(f"idle sessions are silent for {max(idle.values()):.1f} s at most")

    first.guest.cut()
    began = time.monotonic()
    silence.wait(lambda now: now["cnode1"] > 8)
    first.guest.heal()
    silence.wait(lambda now: now["cnode1"] < 2)
    say(f"cut off and back: seen as alive again after {time.monotonic() - began:.1f} s")

    assert cluster.snode.daemon is not None
    cluster.snode.daemon.signal(9)
    cluster.snode.daemon.wait(10)
    time.sleep(3)
    cluster.snode.daemon = roles.start_tgtd(cluster.snode.guest)
    cluster.wait_for_targets(2)
    restart = silence.watch(20)
    assert max(restart.values()) < 12, restart
    say(f"restart of tgtd: silent for {max(restart.values()):.1f} s at most")

    began = time.monotonic()
    second.guest.kill9()
    silence.wait(lambda now: now["cnode2"] >= 15)
    say(f"power cut: 15 s of silence are seen after {time.monotonic() - began:.1f} s")
    shown = cluster.snode.guest.sh("tgtadm --lld iscsi --op show --mode target")
    assert roles.initiator(second.guest) in shown.partition("I_T nexus")[2], "tgtd has given it up already"
    # tgtd gives the session up in the meantime; it is silent as before.
    silence.wait(lambda now: now["cnode2"] >= 45)
    assert "cnode2" not in cluster.snode.guest.sh(
        "tgtadm --lld iscsi --op show --mode target | grep 'Initiator: ' || true"
    )
    assert silence.now["cnode1"] < 8
