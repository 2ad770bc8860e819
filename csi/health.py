"""The probes of orchestrators over plain HTTP (the setting `health`).

A probe that starts a program in the container (`snode probe`) starts a Python each time. On a machine that is short of
CPU that alone takes longer than the probe may, and kubelet then kills a driver that has no fault. One request costs
the driver about a millisecond.
"""

from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer

from csi.client import Client
from csi.config import Config
from csi.deadline import Deadline
from csi.errors import DriverError
from csi.model import parse_portal
from csi.rpc.http_pages import Page, serve

#: How long the driver may take to answer its own Probe, which waits for nothing but a thread.
_SECONDS = 5.0
_UNAVAILABLE = 503


class Health:
    """The pages, once their port can be had: who has it already must not keep the driver from serving."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.server: ThreadingHTTPServer | None = None

    def turn(self, _deadline: Deadline) -> None:
        """Begin to answer, unless it was begun. Raises Unavailable when the port is taken; a Background job."""
        if self.server is None:
            self.server = serve_health(self._config)


def serve_health(config: Config) -> ThreadingHTTPServer:
    """Answer GET /readyz (ready to serve?) and /livez (does it answer at all?), as `snode probe` and `--alive` do.

    Each asks CSI's Probe over the driver's own endpoint, so that it holds for what orchestrators reach. Raises
    Unavailable when the port is taken.
    """
    client = Client(config.endpoint, tls=config.tls, timeout_seconds=_SECONDS)

    def look(*, unready: Page) -> Page:
        try:
            problem = client.problem()
        except DriverError as error:
            return Page(f"{error}\n", status=_UNAVAILABLE)
        return replace(unready, text=f"{unready.text}: {problem}\n") if problem else Page("ready\n")

    pages = {
        "/readyz": partial(look, unready=Page("not ready", status=_UNAVAILABLE)),
        "/livez": partial(look, unready=Page("not ready, but alive")),
    }
    return serve("health", parse_portal(config.health), pages)
