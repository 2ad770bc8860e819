"""The process `snode failover`: beside a SNODE's Controller, which never loads the Kubernetes library so.

It needs the CSI endpoint of the Controller, its state folder, tgtd's socket and the host's network.
"""

import select

from csi import log
from csi.background import end_signals
from csi.claims import claim_state_folder
from csi.client import Client
from csi.config import Config
from csi.deadline import Deadline
from csi.errors import DriverError, Unavailable
from csi.failover import metrics
from csi.failover.controller import ROUND_SECONDS, Failover
from csi.failover.rules import Rules
from csi.failover.view import Watch
from csi.kube import Kube
from csi.model import Publication, parse_portal

#: Longest wait for one volume to be fenced; what takes longer goes on, and is asked for again.
_FENCE_SECONDS = 8.0
_LOOK_SECONDS = 5.0


def serve(config: Config) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. Raises DriverError when it can't start."""
    ending = end_signals()
    log.set_up(level=config.log_level, json=config.log_format == "json")
    claim_state_folder(config.state_dir, ["failover"])
    if not config.controller.portals:
        raise Unavailable("controller.portals: empty, so no sessions can be seen; use the settings of this SNODE")
    settings = config.failover
    kube = Kube.connect(kubeconfig=settings.kubeconfig, namespace=settings.namespace)
    client = Client(config.endpoint, tls=config.tls, timeout_seconds=_FENCE_SECONDS)
    failover = build(config, kube, client)
    if settings.metrics:
        metrics.serve(*parse_portal(settings.metrics), lambda: metrics.figures(failover))
    logger = log.get_logger("failover")
    logger.info("started", node=config.node.name, namespace=kube.namespace, mode=settings.mode)
    _repeat(failover, ending)
    logger.info("stopping")
    try:
        failover.stop()
    except DriverError as error:
        logger.warning("the leader's Lease was not given back; it expires", error=str(error))
    client.close()
    kube.close()
    return 0


def build(config: Config, kube: Kube, client: Client) -> Failover:
    """The parts, from the settings."""
    settings = config.failover

    def fence(publication: Publication) -> None:
        client.unpublish(publication.volume_id, node_id=publication.node_id)

    watch = Watch(
        config.controller.tgt_socket,
        config.state_dir / "publications",
        ports=sorted({parse_portal(portal)[1] for portal in config.controller.portals}),
        snode=config.node.name,
        driver=config.driver_name,
    )
    rules = Rules(after_seconds=settings.after, lease_seconds=settings.lease, most_percent=settings.most_percent)
    return Failover(kube, watch, fence, name=config.node.name, rules=rules, act=settings.mode == "act")


def _repeat(failover: Failover, ending: int) -> None:
    """Rounds, until there is something to read at `ending`. An error is told once, and the next round tries anew."""
    logger, said, pause = log.get_logger("failover"), "", 0.0
    while not select.select([ending], [], [], pause)[0]:
        try:
            pause = failover.round(Deadline.after(_LOOK_SECONDS))
        except DriverError as error:
            pause = ROUND_SECONDS
            if str(error) != said:
                logger.error("no decision can be made now", why=str(error))
            said = str(error)
        else:
            if said:
                logger.info("decisions can be made again")
            said = ""
