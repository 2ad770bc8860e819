"""The ground of fakes. What comes in the middle of a request comes at a known step of it: a seed plays the same."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import cast

from google.protobuf.message import Message

from csi.errors import DriverError, Timeout, Unavailable
from csi.model import VOLUME_ID
from tests.fakes.crash import Crash
from tests.model.book import MIB, ON_NODE, Call, Event, Trouble
from tests.model.cnode import Cnode
from tests.model.events import Events
from tests.model.ground import Node, Reply, Seen, SeenNode
from tests.model.images import Image
from tests.model.lengths import Length, longest, nth
from tests.model.orchestrator import Orchestrator
from tests.model.patience import crash
from tests.model.world import World

#: Of a kind that is not measured: what there is to disturb comes early, if at all.
_UNKNOWN = Length(4, 4, 4)


class OnFakes:
    """See Ground."""

    pools: Sequence[str] = ("files",)
    unit_bytes = MIB
    patience = 0.0
    exact = True

    def __init__(self, lengths: Mapping[str, Length] | None = None) -> None:
        """lengths: how long each kind is, where that was not measured yet."""
        self._lengths = measured() if lengths is None else lengths
        self.world = World()

    @property
    def nodes(self) -> list[Cnode]:
        """The CNODEs."""
        return self.world.nodes

    @property
    def exporting(self) -> bool:
        """Whether tgtd runs."""
        return self.world.tgtd_up

    def close(self, *, failed: bool) -> None:
        """Remove everything."""
        self.world.close()

    def call(self, request: Message, node: Node | None, *, sure: bool, insist: bool) -> Reply:
        """See Ground. Time stands still here, so nothing is to be repeated."""
        return self.world.call(request, node=cast(Cnode | None, node))

    def disturbed(
        self, trouble: Trouble, what: Call | Event, act: Callable[[], None], meanwhile: Callable[[], None]
    ) -> None:
        """See Ground."""
        world, on_node = self.world, what.kind in ON_NODE
        node = world.nodes[what.node]
        steps = node.steps if on_node else world.steps
        joins: list[Callable[[], None]] = []
        length = self._lengths.get(what.kind, _UNKNOWN)
        if trouble.kind == "kill":
            steps.arm(nth(trouble.percent, length.steps), crash)
        elif trouble.kind == "tgtd":
            request = nth(trouble.percent, length.requests)
            world.tgtd.fail("*", nth=request, after=trouble.after, how=trouble.how)
        elif trouble.kind == "command":
            node.runner.fail(nth=nth(trouble.percent, length.commands), after=trouble.after)
        else:
            beside = world.patience.beside
            steps.arm(nth(trouble.percent, length.steps), lambda _name: joins.append(beside(meanwhile)))
        try:
            act()
        except Crash:
            (node if on_node else world).start()
        finally:
            for join in joins:
                join()
            steps.disarm()
            world.tgtd.forgive()
            node.runner.forgive()

    def measure(self, what: Call | Event, act: Callable[[], None]) -> Length:
        """Do `act` undisturbed; how long it was."""
        world, node = self.world, self.world.nodes[what.node]
        steps = node.steps if what.kind in ON_NODE else world.steps
        requests, commands = len(world.tgtd.calls), len(node.runner.calls)
        steps.arm(0, crash)  # there is no such step
        act()
        steps.disarm()
        return Length(len(steps.names), len(world.tgtd.calls) - requests, len(node.runner.calls) - commands)

    def heal(self) -> None:
        """End all faults."""
        self.world.tgtd.forgive()
        for kind in ("disk answers", "tgtd starts", "restart controller"):
            self.happen(Event(kind), "", sure=False)
        for index in range(len(self.nodes)):
            for kind in ("back again", "restart node"):
                self.happen(Event(kind, index), "", sure=False)

    # -- questions -----------------------------------------------------------------------------------------------

    def defects(self) -> list[str]:
        """Tracebacks of unforeseen errors in the driver so far."""
        return self.world.tracebacks

    def sizes(self) -> Mapping[str, int]:
        """The size in bytes of every volume there is."""
        return {volume_id: path.stat().st_size for volume_id, path in self.world.images().items()}

    def records(self, volume_id: str) -> list[str] | None:
        """What was written to a volume."""
        path = self.world.images().get(volume_id)
        return Image(path).records if path is not None else []

    def signature(self, volume_id: str) -> str:
        """The filesystem on a volume, "" = none."""
        return Image(self.world.images()[volume_id]).signature

    def sessions_of(self, volume_id: str, node: Node) -> int:
        """How many sessions of a node tgtd has for a volume, dead or alive."""
        return self.world.sessions_of(volume_id, cast(Cnode, node))

    def in_flight(self) -> bool:
        """Whether any command of any node is still at work in tgtd."""
        return any(session.in_flight for target in self.world.tgtd.targets.values() for session in target.sessions)

    def look(self) -> Seen:
        """See what there is now."""
        world = self.world
        world.look()
        with world.tgtd.guard:
            world.check_writers()
        problems = [*world.violations, *map(str, world.tgtd.unexpected)]
        for node in world.nodes:
            if node.mounts.formatted_over:
                problems.append(f"made a filesystem over {node.mounts.formatted_over}")
            bare = [point for point in node.mounts.mount_points() if node.backing(point) is None]
            if bare:
                problems.append(f"disks were taken away under {bare}")
        return Seen(self.sizes(), {index: _seen(node) for index, node in enumerate(world.nodes)}, problems)

    def nothing_left(self) -> list[str]:
        """What is left of volumes though all were deleted."""
        world = self.world
        left: dict[str, object] = {
            "images": world.images(),
            "strays": world.strays(),
            "publications": world.publications.all(),
            "targets": world.tgtd.targets,
            "accounts": world.tgtd.accounts,
        }
        for node in world.nodes:
            folder = node.root / "target"
            left[f"{node.name} attached"] = node.initiator.leftovers()
            left[f"{node.name} mounts"] = node.mounts.mount_points()
            left[f"{node.name} records"] = set(node.records.names()) - {"key", "formatted"}
            left[f"{node.name} paths"] = list(folder.iterdir()) if folder.exists() else []
        return [f"{what}: {found}" for what, found in left.items() if found]

    # -- events --------------------------------------------------------------------------------------------------

    def happen(self, event: Event, volume_id: str, *, sure: bool) -> bool:
        """See Ground."""
        world, node = self.world, self.world.nodes[event.node]
        if event.kind == "tend":
            self._tend(sure=sure)
        elif event.kind == "tend node":
            if node.up:
                node.tend()
        elif event.kind == "restart controller":
            world.start()
        elif event.kind == "restart node":
            node.start()
        elif event.kind in ("tgtd stops", "tgtd starts", "tgtd restarts", "snode reboots"):
            self._turn_tgtd(event.kind)
        elif event.kind in ("reboot", "power off", "power on"):
            node.power(event.kind != "power off")
            world.look()
        elif event.kind in ("cut off", "back again"):
            node.initiator.connected = node.up and event.kind == "back again"
            world.look()
        elif event.kind in ("slow disk", "disk answers"):
            self._slow(event.kind == "slow disk")
        elif event.kind == "damage":
            return self._damage(volume_id)
        elif event.kind == "connections break":
            self._break_connections()
        else:
            assert event.kind == "iscsid restarts", event  # which here has no life of its own
        return True

    def _turn_tgtd(self, kind: str) -> None:
        if kind != "tgtd starts":
            self.world.stop_tgtd()
        if kind == "snode reboots":
            self.world.start()
        if kind != "tgtd stops":
            self.world.start_tgtd()

    def _tend(self, *, sure: bool) -> None:
        """One round of the controller's background work; if sure, tgtd then holds what it must, and nothing else."""
        world = self.world
        stuck = not sure or not world.tgtd_up or self.in_flight()
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

    def _slow(self, slow: bool) -> None:
        world = self.world
        with world.tgtd.guard:
            if slow:
                for target in world.tgtd.targets.values():
                    for session in target.sessions:
                        session.in_flight = session.connected
            else:
                for name in world.targets():
                    world.tgtd.drain(name)
        world.look()

    def _break_connections(self) -> None:
        world = self.world
        with world.tgtd.guard:
            for target in world.tgtd.targets.values():
                for session in target.sessions:
                    session.connected = False
                target.sessions = [session for session in target.sessions if session.in_flight]
        world.look()

    def _damage(self, volume_id: str) -> bool:
        """The first 128 KiB of a volume are overwritten with zeros.

        Not before the SNODE has had its look at it, as it does every two seconds: a filesystem that nobody but the node
        ever saw can't be missed by anybody.
        """
        self._tend(sure=False)
        path = self.world.images().get(volume_id)
        if path is None or json.loads(path.with_suffix(".json").read_text())["blank"]:
            return False
        Image(path).signature = ""
        return True


@cache
def measured() -> Mapping[str, Length]:
    """How long each kind of request and event is, by kind."""
    return longest(measure)


def measure(run: Sequence[Call | Event]) -> list[Length]:
    """How long each part of a run is, which nothing disturbs."""
    ground = OnFakes({})
    try:
        return [ground.measure(what, act) for what, act in actions(ground, run)]
    finally:
        ground.close(failed=False)


def actions(ground: OnFakes, run: Sequence[Call | Event]) -> Iterator[tuple[Call | Event, Callable[[], None]]]:
    """What a run consists of, and how each part is done; in its order, since an orchestrator keeps account."""
    orchestrator = Orchestrator(ground)
    events = Events(orchestrator)

    def act(what: Call | Event) -> None:
        if isinstance(what, Event):
            events.happen(what, sure=True)
        else:
            orchestrator.do(what, sure=True)

    for what in run:
        yield what, partial(act, what)


def _seen(node: Cnode) -> SeenNode:
    return SeenNode(
        mount_points=set(node.mounts.mount_points()),
        attached={session.target.split(":")[-2] for session in node.initiator.sessions.values()},
        kept={name for name in node.records.names() if VOLUME_ID.fullmatch(name)},
    )
