"""What happens beside the requests: ends and starts of services and machines, background work, slow disks, damage."""

import json
from dataclasses import dataclass

from csi.errors import DriverError, Timeout, Unavailable
from tests.model.images import Image
from tests.model.orchestrator import Orchestrator


@dataclass(frozen=True)
class Event:
    """One of KINDS, at a node or a volume where that matters."""

    kind: str
    node: int = 0
    volume: int = 0


KINDS = (
    "tend",
    "tend node",
    "restart controller",
    "restart node",
    "tgtd stops",
    "tgtd starts",
    "tgtd restarts",
    "reboot",
    "power off",
    "power on",
    "cut off",
    "back again",
    "slow disk",
    "disk answers",
    "damage",
)
#: Those that may come between two steps of a request. A kill of its own service is another kind of trouble.
MEANWHILE = tuple(kind for kind in KINDS if kind not in ("restart controller", "restart node", "power off", "reboot"))


class Events:
    """Makes them happen."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._world = orchestrator.world

    def happen(self, event: Event, *, sure: bool = False) -> None:
        """sure: nothing disturbs it, so that background work must come to its end."""
        world, node = self._world, self._world.nodes[event.node]
        if event.kind == "tend":
            self.tend(sure=sure)
        elif event.kind == "tend node":
            self.tend_node(event.node)
        elif event.kind == "restart controller":
            world.start()
        elif event.kind == "restart node":
            node.start()
        elif event.kind in ("tgtd stops", "tgtd restarts"):
            world.stop_tgtd()
            if event.kind == "tgtd restarts":
                world.start_tgtd()
        elif event.kind == "tgtd starts":
            world.start_tgtd()
        elif event.kind in ("reboot", "power off", "power on"):
            self._power(event)
        elif event.kind in ("cut off", "back again"):
            node.initiator.connected = node.up and event.kind == "back again"
            world.look()
        elif event.kind in ("slow disk", "disk answers"):
            self._slow(event.kind == "slow disk")
        else:
            assert event.kind == "damage", event
            self._damage(event.volume)

    def tend(self, *, sure: bool) -> None:
        """One round of the controller's background work; if sure, tgtd then holds what it must, and nothing else."""
        world = self._world
        stuck = not sure or not world.tgtd_up or self._orchestrator.in_flight()
        try:
            world.tend()
        except (Unavailable, Timeout):
            assert stuck
            return
        except DriverError:
            assert not sure
            return
        if stuck:
            return
        wanted = {p.target: p for p in world.publications.all() if not p.revoked}
        assert world.targets() == wanted.keys(), f"tgtd has {world.targets()}, published are {set(wanted)}"
        used = {user for p in wanted.values() for user in (p.chap.user, p.chap.mutual_user)}
        assert world.tgtd.accounts.keys() == used, f"tgtd has accounts {set(world.tgtd.accounts)}, used are {used}"
        assert world.tgtd.state == "ready"
        assert world.strays() == []

    def tend_node(self, index: int) -> None:
        """One round of a node's background work."""
        node = self._world.nodes[index]
        if node.up:
            node.tend()

    def _power(self, event: Event) -> None:
        node = self._world.nodes[event.node]
        if event.kind == "power on" and node.up:
            return
        node.power(event.kind != "power off")
        self._world.look()
        for known in self._orchestrator.volumes:
            known.shown = {place: block for place, block in known.shown.items() if place[0] != event.node}

    def _slow(self, slow: bool) -> None:
        world = self._world
        with world.tgtd.guard:
            if slow:
                for target in world.tgtd.targets.values():
                    for session in target.sessions:
                        session.in_flight = session.connected
            else:
                for name in world.targets():
                    world.tgtd.drain(name)
        world.look()

    def _damage(self, index: int) -> None:
        """The first 128 KiB of a volume are overwritten with zeros.

        Not before the SNODE has had its look at it, as it does every two seconds: a filesystem that nobody but the node
        ever saw can't be missed by anybody.
        """
        known = self._orchestrator.volumes[index]
        self.tend(sure=False)
        path = self._world.images().get(known.volume_id)
        if path is not None and not json.loads(path.with_suffix(".json").read_text())["blank"]:
            known.used = True
            Image(path).signature = ""
