"""When a node was last heard of: what decides whether a volume may be taken from it without its consent.

For whoever asks (`snode failover`, a takeover by Docker): `Export.idle_seconds(publication)` is the seconds since the
SNODE last heard of the session of a publication, None when nothing can be said. It never says too much: what was not
observed (the first look, a tgtd that did not answer, a restart of it) counts as life.

That tgtd shows a session proves nothing, since it outlives its machine by half a minute or more. That it shows none
proves a little; so the silence of its TCP connection counts, and goes on counting when tgtd gives the session up.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from csi.deadline import Deadline
from csi.exports import tcp_diag, tgt_show
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_show import Target

#: A longer time between two looks is no observation.
GAP_SECONDS = 8.0

#: Reads, for a local port, how long each peer has been silent: see tcp_diag.
ReadSilence = Callable[[int], Mapping[str, float]]


@dataclass
class _Seen:
    at: float  # when it was heard of, on our clock
    session: bool = False  # whether it ever had a session
    measured: bool = False  # whether the kernel ever had a word on it


class Liveness:
    """What repeated looks at one tgtd show. Looks are made from one thread; asking is for any."""

    def __init__(
        self,
        client: TgtClient,
        *,
        ports: Collection[int],
        clock: Callable[[], float] = time.monotonic,
        read_silence: ReadSilence = tcp_diag.silent_seconds,
    ) -> None:
        """ports: the local ones that tgtd serves at."""
        self._client = client
        self._ports = tuple(ports)
        self._clock = clock
        self._read_silence = read_silence
        self._seen: dict[str, _Seen] = {}
        self._addresses: dict[tuple[str, int], frozenset[str]] = {}
        self._looked_at: float | None = None
        self._born: object = None

    def look(self, shown: Mapping[tuple[int, str], Target], deadline: Deadline, *, born: object = None) -> None:
        """Take in what tgtd shows now; every few seconds, or the time between counts as life.

        born: another value for each life of tgtd: a new one knows no sessions yet. Costs one question to the kernel,
        and one to tgtd for each session that is new. Raises Unavailable when one of them does not answer.
        """
        silence: dict[str, float] = {}
        for port in self._ports:
            for address, seconds in self._read_silence(port).items():
                silence[address] = min(seconds, silence.get(address, seconds))
        now = self._clock()
        if self._looked_at is None or now - self._looked_at > GAP_SECONDS or born != self._born:
            self._seen = {}
        seen: dict[str, _Seen] = {}
        for target in shown.values():
            seen[target.name] = self._see(target, silence, now, deadline)
        known = {(target.name, nexus.sid) for target in shown.values() for nexus in target.nexuses}
        self._addresses = {key: value for key, value in self._addresses.items() if key in known}
        self._seen, self._looked_at, self._born = seen, now, born

    def idle_seconds(self, target: str) -> float | None:
        """Seconds since a target's session was heard of; None when it is not known, or the last look is too old."""
        seen, now = self._seen.get(target), self._clock()
        if seen is None or self._looked_at is None or now - self._looked_at > GAP_SECONDS:
            return None
        return max(0.0, now - seen.at)

    def had_session(self, target: str) -> bool:
        """Whether a session was seen since we look at this tgtd."""
        seen = self._seen.get(target)
        return seen is not None and seen.session

    def _see(self, target: Target, silence: Mapping[str, float], now: float, deadline: Deadline) -> _Seen:
        last = self._seen.get(target.name, _Seen(now))
        if not target.nexuses:
            return last
        silences = [silence[address] for address in self._addresses_of(target, deadline) if address in silence]
        if silences:
            return _Seen(max(last.at, now - min(silences)), True, True)
        # Where something between us maps ports, the kernel never has a word on a session, and it counts as alive.
        return _Seen(last.at if last.measured else now, True, last.measured)

    def _addresses_of(self, target: Target, deadline: Deadline) -> set[str]:
        """Where the sessions of a target come from; asked once for each session."""
        keys = [(target.name, nexus.sid) for nexus in target.nexuses]
        if any(key not in self._addresses for key in keys):
            found: dict[int, set[str]] = {}
            for connection in tgt_show.parse_connections(self._client.show_connections(target.tid, deadline)):
                found.setdefault(connection.sid, set()).add(tcp_diag.plain_address(connection.address))
            for sid, addresses in found.items():
                self._addresses[target.name, sid] = frozenset(addresses)
        return {address for key in keys for address in self._addresses.get(key, frozenset())}
