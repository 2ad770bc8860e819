"""What the tests of tgtd's faults do to the tgtd of an SNODE by hand, and read from it."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab import roles
from tests.lab.cluster import Cluster, Machine

T = "tgtadm --lld iscsi"


def kill(cluster: Cluster) -> None:
    """tgtd loses its life and all it knows."""
    assert cluster.snode.daemon is not None
    cluster.snode.daemon.signal(signal.SIGKILL)
    cluster.snode.daemon.wait(10)


def start(cluster: Cluster) -> None:
    """What a service manager does next."""
    cluster.snode.daemon = roles.start_tgtd(cluster.snode.guest)


#: Takes every connection and drops it, as tgtd does while it is offline or has no target.
_DROPPER = """
import socket
server = socket.create_server(("0.0.0.0", PORT), backlog=64)
while True:
    server.accept()[0].close()
"""


@contextmanager
def dropped_connections(cluster: Cluster) -> Iterator[None]:
    """In place of tgtd, something takes connections and drops them."""
    kill(cluster)
    program = _DROPPER.replace("PORT", str(roles.PORT))
    dropper = cluster.snode.guest.spawn(["/usr/bin/python3", "-c", program], name="dropper")
    try:
        yield
    finally:
        dropper.signal(signal.SIGKILL)
        dropper.wait(10)


def shown(cluster: Cluster) -> str:
    """All that tgtd shows of its targets."""
    return cluster.snode.guest.sh(f"{T} --op show --mode target")


def targets(cluster: Cluster) -> dict[str, int]:
    """Our targets and their numbers."""
    return {name: int(tid) for tid, name in re.findall(r"^Target (\d+): (\S+)$", shown(cluster), re.MULTILINE)}


def initiators(cluster: Cluster) -> list[str]:
    """Who has a session with any target, once for each session."""
    return re.findall(r"^ +Initiator: (\S+)", shown(cluster), re.MULTILINE)


@contextmanager
def stopped_driver(machine: Machine) -> Iterator[None]:
    """The driver of a machine does nothing meanwhile, so that what is done by hand stays so."""
    assert machine.driver is not None
    machine.driver.process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        machine.driver.process.signal(signal.SIGCONT)
