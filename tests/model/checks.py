"""What must hold at every moment between two requests, and what must be left in the end: nothing."""

import time
from pathlib import Path

from tests.model.book import Call, Event, Known
from tests.model.events import Events
from tests.model.ground import Seen
from tests.model.orchestrator import Orchestrator


class Checks:
    """The invariants, over what the orchestrator knows and what the ground shows."""

    def __init__(self, orchestrator: Orchestrator, events: Events) -> None:
        self._orchestrator = orchestrator
        self._events = events
        self._ground = orchestrator.ground

    def always(self) -> None:
        """Between any two steps of the model."""
        began = time.monotonic()
        end = began + self._ground.patience
        while problems := self._problems():
            if time.monotonic() >= end:
                raise AssertionError("\n".join(problems))
            time.sleep(0.3)
        self._orchestrator.note("all holds", began)

    def end(self) -> None:
        """Undo everything as an orchestrator would, and see that nothing is left."""
        self.quiet()
        orchestrator = self._orchestrator
        for known in orchestrator.volumes:
            if known.acknowledged and self._ground.records(known.volume_id) is None:
                self.shows_all(known)
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
        left = self._ground.nothing_left()
        assert not left, left

    def quiet(self) -> None:
        """End all faults, and give the background its turns. From here on the orchestrator insists."""
        self._orchestrator.refused_by_hand = False
        self._orchestrator.insist = True
        for index in range(len(self._ground.nodes)):
            self._events.happen(Event("power on", index))
        self._ground.heal()
        self._events.happen(Event("tend"), sure=True)
        for index in range(len(self._ground.nodes)):
            self._events.happen(Event("tend node", index), sure=True)

    def usable(self, known: Known, index: int) -> None:
        """From whatever state: detach everywhere, attach on one node, write and read."""
        orchestrator, at = self._orchestrator, self._orchestrator.volumes.index(known)
        try:
            self.quiet()
            path = self._attach(known, index, "ext4")
            if path is not None:
                node = self._ground.nodes[index]
                record = known.next_record()
                assert node.write(path, record), f"{known.name} takes no write at {path}"
                known.acknowledged.append(record)
                self.complete(known, node.read(path))
        finally:
            orchestrator.insist = False
        assert orchestrator.volumes[at] is known

    def shows_all(self, known: Known) -> None:
        """What was acknowledged is there on a node that did not write it last."""
        last = max(known.shown, default=(0, None))[0]
        index = (last + 1) % len(self._ground.nodes)
        path = self._attach(known, index, "block" if known.raw else "ext4")
        if path is not None:
            self.complete(known, self._ground.nodes[index].read(path))

    def complete(self, known: Known, records: list[str] | None) -> None:
        """Every acknowledged record is there, and none that is not this volume's."""
        if records is None:
            return
        foreign = [record for record in records if not known.owns(record)]
        assert not foreign, f"{known.name} holds records of others: {foreign}"
        lost = [record for record in known.acknowledged if record not in records]
        assert not lost, f"{known.name} lost {lost}, has {records}"

    # -- parts ---------------------------------------------------------------------------------------------------

    def _attach(self, known: Known, index: int, way: str) -> Path | None:
        """Detach a volume from everywhere, and bring it to a node; None where that may be refused for good."""
        orchestrator, at = self._orchestrator, self._orchestrator.volumes.index(known)
        for other in orchestrator.volumes:
            if other is known or any(path.name[0] == known.name for _, path in other.targets | other.staged):
                self._detach(other)
        for kind in ("unpublish", "create", "get"):
            orchestrator.do(Call(kind, at, odd=kind == "unpublish"), sure=True)
        if not known.exists:
            return None
        for kind in ("publish", "stage", "node publish"):
            reply = orchestrator.do(Call(kind, at, index, way), sure=True)
            assert reply is not None
            if not reply.ok:
                assert kind == "stage" and self._may_fail(known, reply.details), f"{kind}: {reply}"
                return None
        return orchestrator.target_path(Call("", at, index))

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
        signature = self._ground.signature(known.volume_id)
        if signature not in ("", "ext4"):
            return "was asked for" in details
        if signature:
            return False
        return known.used or "too few" in details

    def _problems(self) -> list[str]:
        seen = self._ground.look()
        found = list(seen.problems)
        for known in self._orchestrator.volumes:
            found += self._volume(known, seen)
        for index in seen.nodes:
            found += self._node(index, seen)
        return found

    def _volume(self, known: Known, seen: Seen) -> list[str]:
        if seen.sizes is None:
            return []
        size_bytes = seen.sizes.get(known.volume_id)
        if known.exists is not None and (size_bytes is not None) != known.exists:
            return [f"{known.name}: exists {known.exists}, has {size_bytes} bytes"]
        if size_bytes is None:
            return []
        if known.exists and size_bytes < known.size_bytes:
            return [f"{known.name}: {size_bytes} bytes of {known.size_bytes}"]
        if known.may_have_grown:
            known.size_bytes, known.may_have_grown = size_bytes, False
        self.complete(known, self._ground.records(known.volume_id))
        return []

    def _node(self, index: int, seen: Seen) -> list[str]:
        node, volumes = seen.nodes[index], self._orchestrator.volumes
        staged = {path for known in volumes for at, path in known.staged if at == index}
        targets = {path for known in volumes for at, path in known.targets if at == index}
        names = {known.volume_id for known in volumes if any(at == index for at, _ in known.staged)}
        found = {
            "mounts that nobody asked for": node.mount_points - staged - targets,
            "sessions of volumes that are not staged": node.attached - names,
            "records of volumes that are not staged": node.kept - names,
        }
        return [f"node {index}: {what}: {which}" for what, which in found.items() if which]
