"""What this SNODE sees of the nodes that hold its volumes, and how it tells the others."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from csi.deadline import Deadline
from csi.errors import Unavailable
from csi.exports.liveness import Liveness
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_target import Targets
from csi.failover.rules import Silence, View
from csi.model import Publication
from csi.publications import Publications
from csi.records import RecordStore

#: From when on the volumes of a silent node are told: pings come every 5 s.
_TELL_SECONDS = 5.0
_FORMAT = 1
_TICK_NANOSECONDS = 1_000_000_000


class Sight(Protocol):
    """How a SNODE is looked at."""

    def look(self, deadline: Deadline) -> View:
        """What is seen now. Raises Unavailable."""
        ...

    def publications(self) -> list[Publication]:
        """What is exported to whom."""
        ...


class Watch:
    """Looks at tgtd and at the records of publications, which another process owns."""

    def __init__(self, socket: Path, records: Path, *, ports: Sequence[int], snode: str, driver: str) -> None:
        """socket: tgtd's. records: the folder of the publications. ports: where tgtd serves. snode: our own name."""
        client = TgtClient(socket, call_seconds=5.0)
        self._targets = Targets(client)
        self._liveness = Liveness(client, ports=ports)
        self._socket = socket
        self._records = records
        self._snode = snode
        self._driver = driver
        self._read: tuple[object, Publications] | None = None

    def look(self, deadline: Deadline) -> View:
        """What is seen now. Raises Unavailable when tgtd or the kernel does not answer."""
        try:
            born = (found := self._socket.stat()).st_ino, found.st_ctime_ns
        except OSError as error:
            raise Unavailable(f"tgtd's socket {self._socket}: {error.strerror}; is tgtd running?") from error
        self._liveness.look(self._targets.all(deadline), deadline, born=born)
        return view_of(
            self.publications(),
            snode=self._snode,
            driver=self._driver,
            idle_seconds=self._liveness.idle_seconds,
            had_session=self._liveness.had_session,
        )

    def publications(self) -> list[Publication]:
        """Those over iSCSI, as they stand on disk. Read anew when the folder has changed."""
        try:
            stamp = self._records.stat().st_mtime_ns
        except FileNotFoundError:
            return []  # nothing was ever published
        except OSError as error:
            raise Unavailable(f"{self._records}: can't be read ({error.strerror})") from error
        if self._read is None or self._read[0] != stamp:
            publications = Publications(RecordStore(self._records, read_only=True))
            # The clock of a filesystem ticks slowly: what changes within a tick of the last change has the same stamp.
            old = abs(time.time_ns() - stamp) > _TICK_NANOSECONDS
            self._read = stamp if old else None, publications
        return [publication for publication in self._read[1].all() if publication.protocol == "iscsi"]


def view_of(
    publications: Sequence[Publication],
    *,
    snode: str,
    driver: str,
    idle_seconds: Callable[[str], float | None],
    had_session: Callable[[str], bool],
) -> View:
    """A node is as alive as its liveliest session. What nothing is known of, counts as alive."""
    by_node: dict[str, list[Publication]] = defaultdict(list)
    for publication in publications:
        by_node[publication.node.name].append(publication)
    nodes = {}
    for node, held in by_node.items():
        seconds = min(idle_seconds(publication.target) or 0.0 for publication in held)
        volumes = {publication.volume_id for publication in held} if seconds >= _TELL_SECONDS else ()
        nodes[node] = Silence(seconds, frozenset(volumes), any(had_session(one.target) for one in held))
    return View(snode, driver, nodes)


def to_text(view: View) -> str:
    """For an annotation."""
    nodes = {
        name: [round(silence.seconds), silence.had_session, *sorted(silence.volumes)]
        for name, silence in view.nodes.items()
    }
    return json.dumps({"format": _FORMAT, "snode": view.snode, "driver": view.driver, "nodes": nodes})


def from_text(text: str) -> View | None:
    """What another SNODE tells; None when it can't be understood."""
    try:
        fields = json.loads(text)
        if fields["format"] > _FORMAT:
            return None
        return View(str(fields["snode"]), str(fields["driver"]), _nodes(fields["nodes"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _nodes(fields: Mapping[str, Any]) -> dict[str, Silence]:
    return {
        str(name): Silence(float(facts[0]), frozenset(map(str, facts[2:])), bool(facts[1]))
        for name, facts in fields.items()
    }
