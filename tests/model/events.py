"""What happens beside the requests, and what it means for what the orchestrator knows."""

import time

from tests.model.book import Event
from tests.model.orchestrator import Orchestrator


class Events:
    """Makes them happen; see book.KINDS."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._ground = orchestrator.ground

    def happen(self, event: Event, *, sure: bool = False) -> None:
        """sure: nothing disturbs it, so that background work must come to its end."""
        known = self._orchestrator.volumes[event.volume]
        began = time.monotonic()
        if event.kind == "power on" and self._ground.nodes[event.node].up:
            return
        happened = self._ground.happen(event, known.volume_id, sure=sure)
        self._orchestrator.note(f"{event.kind} (node {event.node}, volume {known.name})", began)
        if event.kind in ("reboot", "power off", "power on"):
            for other in self._orchestrator.volumes:
                other.shown = {place: block for place, block in other.shown.items() if place[0] != event.node}
        if event.kind == "damage" and happened:
            known.used = True
            if self._ground.records(known.volume_id) is None:  # here the damage is real
                known.acknowledged, known.damaged = [], True
