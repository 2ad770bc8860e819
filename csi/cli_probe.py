"""The command `snode probe`, for health checks of containers."""

from pathlib import Path
from typing import Any

import click

from csi.cli_settings import load_settings, with_settings
from csi.errors import Unavailable

_SECONDS = 3.0


@click.command(short_help="Ask the running driver whether it is ready.")
@click.option("--alive", is_flag=True, help="Only whether it answers, ready or not; a restart would not help then.")
@click.option("--timeout", type=float, default=_SECONDS, show_default=True, help="Seconds to wait for the answer.")
@with_settings
def probe(file: Path | None, alive: bool, timeout: float, **flags: Any) -> None:
    """Ask the driver at the endpoint whether it is ready to serve: CSI's Probe.

    Exit code 0 when it is, 1 with the reason when it is not, or does not answer. Meant for the probes of Kubernetes and
    the checks of Nomad and Docker: --alive for liveness, without it for readiness.

    \b
    Examples:
      snode probe
      snode probe --alive --timeout 5
      CSI_ENDPOINT=unix:///csi/csi.sock snode probe
    """
    from csi.client import Client

    config = load_settings(file, flags)
    with Client(config.endpoint, tls=config.tls, timeout_seconds=timeout) as client:
        problem = client.problem()
    if problem and not alive:
        raise Unavailable(f"{config.endpoint}: the driver is not ready: {problem}")
    click.echo(f"not ready, but alive: {problem}" if problem else "ready")
