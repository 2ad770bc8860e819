"""The command `snode failover`."""

import sys
from pathlib import Path
from typing import Any

import click

from csi.cli_settings import load_settings, with_settings
from csi.errors import Unavailable


@click.command(short_help="Give up lost Kubernetes nodes, by itself.")
@with_settings
def failover(file: Path | None, **flags: Any) -> None:
    """Give up Kubernetes nodes that are lost, without a human: beside `snode controller`, on each SNODE.

    When a node's Lease is stale and this SNODE has heard nothing of its sessions for failover.after seconds, its
    volumes are taken from it here, then it gets the out-of-service taint, so that its pods start elsewhere; the taint
    goes when the node is back and clean. Needs the extra kubernetes (pip install ".[kubernetes]" in a checkout), root,
    tgtd's socket, the state folder, and the rights in deploy/kubernetes/components/failover.

    Runs until SIGTERM or SIGINT.

    \b
    Examples:
      snode failover --config /etc/snode/snode.toml
      SNODE_FAILOVER_MODE=observe snode failover          decide and tell, and do nothing
    """
    config = load_settings(file, flags)
    try:
        from csi.failover.process import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("kubernetes", "urllib3"):
            raise
        raise Unavailable(
            "the library kubernetes is not installed, and `snode failover` needs it: "
            'pip install ".[kubernetes]" in a checkout of this project'
        ) from error
    sys.exit(serve(config))
