"""What Prometheus reads."""

import urllib.request
from pathlib import Path

from kubernetes.client import ApiClient, Configuration

from csi.failover import metrics
from csi.failover.controller import Failover
from csi.failover.rules import Rules, Silence, View
from csi.failover.view import Watch
from csi.kube import Kube


def test_figures_over_http(tmp_path: Path) -> None:
    kube = Kube(ApiClient(Configuration()), namespace="default")
    watch = Watch(tmp_path / "socket", tmp_path, ports=[3260], snode="s", driver="d")
    failover = Failover(kube, watch, lambda _publication: None, name="s", rules=Rules())
    assert "snode_failover_sees 0\n" in metrics.figures(failover)
    failover.view = View("s", "d", {"cnode1": Silence(3.25)})
    failover.leading = True
    failover.teller.counts["FailoverRefused"] += 2
    server = metrics.serve("127.0.0.1", 0, lambda: metrics.figures(failover))
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(f"{url}/metrics") as response:
            lines = response.read().decode().splitlines()
    finally:
        server.shutdown()
        server.server_close()
    for line in (
        "snode_failover_leader 1",
        "snode_failover_sees 1",
        'snode_failover_silent_seconds{node="cnode1"} 3.2',
        'snode_failover_events_total{reason="FailoverRefused"} 2',
    ):
        assert line in lines
