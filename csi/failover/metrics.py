"""Figures for Prometheus, over plain HTTP, for who asks for them (failover.metrics)."""

from collections.abc import Callable
from http.server import ThreadingHTTPServer

from csi.failover.controller import Failover
from csi.rpc import http_pages
from csi.rpc.http_pages import Page

_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def figures(failover: Failover) -> str:
    """All of them, in Prometheus' text format."""
    view = failover.view
    lines = [
        "# HELP snode_failover_leader Whether this SNODE leads.",
        "# TYPE snode_failover_leader gauge",
        f"snode_failover_leader {int(failover.leading)}",
        "# HELP snode_failover_sees Whether this SNODE can see its sessions.",
        "# TYPE snode_failover_sees gauge",
        f"snode_failover_sees {int(view is not None)}",
        "# HELP snode_failover_given_up Nodes that are given up now, as the leader knows.",
        "# TYPE snode_failover_given_up gauge",
        f"snode_failover_given_up {len(failover.given_up)}",
        "# HELP snode_failover_silent_seconds Since a node that holds volumes of this SNODE was last heard of.",
        "# TYPE snode_failover_silent_seconds gauge",
        *(
            f'snode_failover_silent_seconds{{node="{name}"}} {silence.seconds:.1f}'
            for name, silence in sorted(view.nodes.items() if view else ())
        ),
        "# HELP snode_failover_events_total What was told of nodes, by reason.",
        "# TYPE snode_failover_events_total counter",
        *(
            f'snode_failover_events_total{{reason="{reason}"}} {count}'
            for reason, count in sorted(failover.teller.counts.items())
        ),
    ]
    return "\n".join(lines) + "\n"


def serve(address: str, port: int, read: Callable[[], str]) -> ThreadingHTTPServer:
    """Answer GET /metrics in a thread. Raises Unavailable when the port is taken."""
    return http_pages.serve("failover.metrics", (address, port), {"/metrics": lambda: Page(read(), type=_TYPE)})
