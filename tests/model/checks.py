"""What must hold at every moment between two requests, and what must be left in the end: nothing."""

from csi.model import VOLUME_ID
from tests.model.book import Call, Known
from tests.model.events import Event, Events
from tests.model.images import Image
from tests.model.orchestrator import Orchestrator


class Checks:
    """The invariants, over what the orchestrator knows and what the world shows."""

    def __init__(self, orchestrator: Orchestrator, events: Events) -> None:
        self._orchestrator = orchestrator
        self._events = events
        self._world = orchestrator.world

    def always(self) -> None:
        """Between any two steps of the model."""
        world = self._world
        world.look()
        with world.tgtd.guard:
            world.check_writers()
        assert not world.violations, world.violations
        assert not world.tgtd.unexpected, world.tgtd.unexpected
        for known in self._orchestrator.volumes:
            self._volume(known)
        for index in range(len(world.nodes)):
            self._node(index)

    def end(self) -> None:
        """Undo everything as an orchestrator would, and see that nothing is left."""
        self.quiet()
        orchestrator = self._orchestrator
        for _ in range(2):  # what was refused for another volume at the same path goes the second time
            for known in orchestrator.volumes:
                self._detach(known)
        for known in orchestrator.volumes:
            assert not known.targets and not known.staged, (known.targets, known.staged)
            at = orchestrator.volumes.index(known)
            for kind in ("unpublish", "delete"):
                reply = orchestrator.do(Call(kind, at, odd=True), sure=True)
                assert reply is not None and reply.ok, reply
        self.quiet()
        self.always()
        self.nothing_left()

    def quiet(self) -> None:
        """End all faults, and give the background its turns."""
        self._orchestrator.refused_by_hand = False
        self._world.tgtd.forgive()
        for kind in ("disk answers", "tgtd starts", "restart controller"):
            self._events.happen(Event(kind))
        for index in range(len(self._world.nodes)):
            for kind in ("power on", "back again", "restart node"):
                self._events.happen(Event(kind, index))
        self._events.happen(Event("tend"), sure=True)
        for index in range(len(self._world.nodes)):
            self._events.happen(Event("tend node", index), sure=True)

    def usable(self, known: Known, index: int) -> None:
        """From whatever state: detach everywhere, attach on one node, write and read."""
        orchestrator, at = self._orchestrator, self._orchestrator.volumes.index(known)
        self.quiet()
        for other in orchestrator.volumes:
            if other is known or any(path.name[0] == known.name for _, path in other.targets | other.staged):
                self._detach(other)
        for kind in ("unpublish", "create", "get"):
            orchestrator.do(Call(kind, at, odd=kind == "unpublish"), sure=True)
        if not known.exists:
            return
        for kind in ("publish", "stage", "node publish"):
            reply = orchestrator.do(Call(kind, at, index), sure=True)
            assert reply is not None
            if not reply.ok:
                assert kind == "stage" and self._may_fail(known, reply.details), f"{kind}: {reply}"
                return
        path = orchestrator.target_path(Call("", at, index))
        record = known.next_record()
        assert self._world.nodes[index].write(path, record)
        known.acknowledged.append(record)
        assert self._world.nodes[index].read(path) == Image(self._world.images()[known.volume_id]).records

    def nothing_left(self) -> None:
        """Nothing is left of any volume, anywhere."""
        world = self._world
        assert (world.images(), world.strays(), world.publications.all()) == ({}, [], [])
        assert (world.tgtd.targets, world.tgtd.accounts) == ({}, {})
        for node in world.nodes:
            assert node.initiator.leftovers() == []
            assert node.mounts.mount_points() == []
            assert set(node.records.names()) <= {"key", "formatted"}
            folder = node.root / "target"
            assert not folder.exists() or list(folder.iterdir()) == []

    # -- parts ---------------------------------------------------------------------------------------------------

    def _detach(self, known: Known) -> None:
        for index, path in sorted(known.targets):
            self._undo("node unpublish", known, index, path.name)
        for index, path in sorted(known.staged):
            self._undo("unstage", known, index, path.name)

    def _undo(self, kind: str, known: Known, index: int, name: str) -> None:
        at = self._orchestrator.volumes.index(known)
        place = int(name[-1]) if name[0] == known.name else 2
        self._orchestrator.do(Call(kind, at, index, place=place), sure=True)

    def _may_fail(self, known: Known, details: str) -> bool:
        """Where a stage may be refused for good: no filesystem and no permission, another filesystem, too small."""
        image = Image(self._world.images()[known.volume_id])
        if image.signature not in ("", "ext4"):
            return "was asked for" in details
        if image.signature:
            return False
        return known.used or "too few" in details

    def _volume(self, known: Known) -> None:
        image = self._world.images().get(known.volume_id)
        if known.exists is not None:
            assert (image is not None) == known.exists, f"{known.name}: exists {known.exists}, image {image}"
        if image is None:
            assert not known.acknowledged or known.exists is not True
            return
        if known.exists:
            assert image.stat().st_size >= known.size_bytes
        records = Image(image).records
        foreign = [record for record in records if not known.owns(record)]
        assert not foreign, f"{known.name} holds records of others: {foreign}"
        lost = [record for record in known.acknowledged if record not in records]
        assert not lost, f"{known.name} lost {lost}, has {records}"

    def _node(self, index: int) -> None:
        node = self._world.nodes[index]
        assert not node.mounts.formatted_over, f"made a filesystem over {node.mounts.formatted_over}"
        staged = {path for known in self._orchestrator.volumes for at, path in known.staged if at == index}
        targets = {path for known in self._orchestrator.volumes for at, path in known.targets if at == index}
        stray = set(node.mounts.mount_points()) - staged - targets
        assert not stray, f"mounts that nobody asked for: {stray}"
        bare = [point for point in node.mounts.mount_points() if node.backing(point) is None]
        assert not bare, f"disks were taken away under {bare}"
        names = {known.volume_id for known in self._orchestrator.volumes if any(at == index for at, _ in known.staged)}
        attached = {session.target.split(":")[-2] for session in node.initiator.sessions.values()}
        assert attached <= names, f"sessions of volumes that are not staged: {attached - names}"
        kept = {name for name in node.records.names() if VOLUME_ID.fullmatch(name)}
        assert kept <= names, f"records of volumes that are not staged: {kept - names}"
