"""The export over iSCSI by tgtd: one target for each publication.

tgtd keeps nothing on disk. The records of publications are the truth, and `reconcile` makes tgtd equal to them: after
its restart, after a crash of ours at any step, and against sessions that nobody allowed.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import CommandFailed, DriverError, Invalid, NoSpace, Unavailable
from csi.exports import tgt_client, tgt_show
from csi.exports.at_once import Guard, at_once, collected
from csi.exports.liveness import Liveness
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_compare import LUN, differences
from csi.exports.tgt_target import OUR_ACCOUNT, Shown, Targets
from csi.locks import ResourceLock
from csi.log import get_logger
from csi.model import TARGET_PREFIX, IscsiPath, Publication, parse_portal
from csi.run import Boundary, Runner, no_boundary

#: Before this release rules were joined in a way that shut everybody out, or let everybody in.
MINIMUM_VERSION = (1, 0, 83)

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")

# One target whose commands in flight do not end must not keep all others waiting.
_STUCK_SECONDS = 5.0


class TgtExport:
    """See csi.exports.base.Export. One process may own a tgtd: the lock is of this process.

    Starts no process, but for the look at tgtd's version in `problems`.
    """

    protocol: str = "iscsi"

    def __init__(
        self,
        socket: Path,
        *,
        portals: Sequence[str],
        runner: Runner,
        max_exports: int = 1000,
        boundary: Boundary = no_boundary,
    ) -> None:
        """socket: tgtd's management socket. portals: see parse_portal, as nodes reach tgtd; else Invalid is raised.

        max_exports: the most targets in this tgtd, foreign ones too; each LUN costs it up to 16 threads, and a limit
        of the system that is hit would hurt the volumes that are in use.
        """
        for portal in portals:
            parse_portal(portal)
        self._client = TgtClient(socket, boundary=boundary)
        self._targets = Targets(self._client)
        self._liveness = Liveness(self._client, ports={parse_portal(portal)[1] for portal in portals})
        self._socket = socket
        self._born = _birth(socket)  # of the tgtd that the last `reconcile` saw
        self._left: frozenset[str] | None = None  # the targets that it left in that tgtd; None: it saw none yet
        self._portals = tuple(portals)
        self._runner = runner
        self._max_exports = max_exports
        self._lock = ResourceLock("tgtd")
        # Targets that a thread works on without the lock while commands in flight end; entered under the lock.
        self._busy: list[str] = []
        # Work that was cut off may have left tgtd offline, or accounts: looked at once, and after each failure.
        self._look_deep = True
        self._version: tuple[int, ...] | None = None
        self._blind = ""  # why it can't be told who is alive
        self._log = get_logger("tgt")

    def ensure(self, publication: Publication, deadline: Deadline) -> tuple[IscsiPath, ...]:
        """See Export.ensure. Raises Invalid when a value of the publication could be misread by tgtd."""
        _check(publication)
        with self._lock.hold(deadline):
            self._ensure_all([publication], self._targets.all(deadline), deadline, limit=self._max_exports)
        return tuple(IscsiPath(target=publication.target, portal=portal, lun=LUN) for portal in self._portals)

    def remove(self, publication: Publication, deadline: Deadline) -> None:
        """See Export.remove. Raises Timeout when commands in flight do not end; logins are shut out by then.

        The publication must not be among those that `reconcile` reads any more, or it would be restored.
        """
        chap = publication.chap
        with self._working_on([publication.target], deadline):
            self._targets.fence(publication.target, (chap.user, chap.mutual_user), deadline)

    def grow(self, publication: Publication, deadline: Deadline) -> None:
        """See Export.grow. Growth by less than 1 MiB may go unseen, since tgtd shows sizes in MB."""
        _check(publication)
        with self._working_on([publication.target], deadline):
            target = self._targets.all(deadline).get((publication.tid, publication.target))
            found = differences(publication, target) if target else None
            if found and found.reopen and not found.remake:
                self._targets.reopen(publication, deadline)
                return
        self.ensure(publication, deadline)

    def fence_strays(self, volume_id: str, *, keep: Collection[str], deadline: Deadline) -> None:
        """See Export.fence_strays. One look at tgtd when there is none."""
        prefix = f"{TARGET_PREFIX}:{volume_id}:"
        for name in self._targets.numbers(deadline):
            if name.startswith(prefix) and name not in keep:
                self._log.warning("fencing a target that no record knows", target=name)
                with self._working_on([name], deadline):
                    self._targets.fence(name, (), deadline)

    def reconcile(
        self, read_wanted: Callable[[], Sequence[Publication]], deadline: Deadline, *, spare: Collection[str] = ()
    ) -> None:
        """See Export.reconcile. One look at tgtd when nothing is wrong.

        Does all that it can, then raises Unavailable with what could not be done; the next call goes on.
        """
        failures: list[str] = []
        with self._lock.hold(deadline):
            born = _birth(self._socket)
            # Read under the lock: every target made by then has its record, and none that is missing is being removed.
            wanted = {publication.target: publication for publication in read_wanted()}
            shown = self._targets.all(deadline)
            self._look_alive(shown, born, deadline)
            if not born == self._born == _birth(self._socket):
                self._left = None
            deep, self._look_deep = self._look_deep, True
            restored = self._restore(wanted, shown, failures, deadline)
            self._audit(wanted, shown, deadline)
            if deep or restored:
                self._look_after_crash(wanted.values(), deadline)
            self._look_deep = False
            self._born, self._left = born, frozenset(wanted)
        known = {*wanted, *spare, *self._busy}
        strays = [name for _, name in shown if _ours(name) and name not in known]
        for name in strays:
            # Without the lock: no name is ever used twice, so nobody makes what is a stray now.
            self._log.info("removing a target that no publication wants", target=name)
            with collected(failures):
                self._targets.fence(name, (), deadline.within(_STUCK_SECONDS))
        if failures:
            self._look_deep = True
            raise Unavailable(f"{len(failures)} target(s) are not as they should be: {'; '.join(failures[:5])}")

    def restarted(self) -> bool:
        """See Export.restarted. Never connects: tgtd makes its socket anew at each start."""
        born = _birth(self._socket)
        return born is not None and born != self._born

    def _look_alive(self, shown: Shown, born: object, deadline: Deadline) -> None:
        """Take note of who is alive. Without it nothing can be said of anybody, and everything else works."""
        failure = ""
        try:
            self._liveness.look(shown, deadline, born=born)
        except DriverError as error:
            failure = str(error)
        if failure and failure != self._blind:
            self._log.warning("can't tell which nodes are alive", why=failure)
        self._blind = failure

    def idle_seconds(self, publication: Publication) -> float | None:
        """See Export.idle_seconds."""
        return self._liveness.idle_seconds(publication.target)

    def problems(self, deadline: Deadline) -> list[str]:
        """See Export.problems."""
        if os.geteuid() != 0:
            return ["tgtd obeys root alone -> run the driver as root"]
        try:
            with self._lock.hold(deadline):  # a restore takes it offline for a moment
                state = tgt_show.parse_system_state(self._client.show_system(deadline))
            driver = tgt_show.parse_drivers(self._client.show_names(deadline)).get("iscsi", "missing")
        except DriverError as error:
            return [str(error)]
        found = []
        if state != "ready":
            found.append(
                f"tgtd is {state} and takes no logins -> tgtadm --op=update --mode=sys --name=State --value=ready"
            )
        if driver != "ready":
            found.append(
                f"tgtd's iscsi driver is {driver} -> see journalctl -u tgt (is port 3260 taken?), restart tgtd"
            )
        if not self._portals:
            found.append("controller.portals is empty -> set the addresses at which nodes reach tgtd")
        return found + self._version_problems(deadline)

    def _version_problems(self, deadline: Deadline) -> list[str]:
        if self._version is None:
            try:
                result = self._runner.run(["tgtd", "--version"], deadline=deadline, read_only=True)
            except DriverError as error:
                return [f"tgtd's version is unknown ({error}) -> install the package tgt"]
            match = _VERSION.search(result.stdout)
            if match is None:
                return [f"tgtd --version says {result.stdout.strip()[:60]!r}, not a tgtd -> install the package tgt"]
            self._version = tuple(int(number) for number in match.groups())
        if self._version < MINIMUM_VERSION:
            have, need = (".".join(map(str, version)) for version in (self._version, MINIMUM_VERSION))
            return [f"tgtd {have} does not keep initiators apart as needed -> upgrade tgt to {need} or newer"]
        return []

    def _ensure_all(
        self,
        publications: Sequence[Publication],
        shown: Shown,
        deadline: Deadline,
        *,
        limit: int | None = None,
        guard: Guard = nullcontext,
    ) -> None:
        """Adopt, mend, or make each; `guard` is around each step. The caller holds the lock.

        Looks are shared, because each holds up the I/O of all volumes for a moment.
        """
        absent: list[Publication] = []
        numbers: Mapping[str, int] | None = None
        for publication in publications:
            with guard():
                _check(publication)
                if self._stands(publication, shown, deadline):
                    continue
                numbers = self._targets.numbers(deadline) if numbers is None else numbers
                self._clear(publication, numbers, deadline, limit=limit)
                absent.append(publication)
        built = at_once(absent, lambda p: self._targets.build(p, deadline), guard)
        if not built:
            return
        shown = self._targets.all(deadline)
        opened = at_once(built, lambda p: self._open(p, shown, deadline), guard)
        shown = self._targets.all(deadline)
        for publication in opened:
            with guard():
                self._targets.verify(publication, shown, with_rule=True)

    def _open(self, publication: Publication, shown: Shown, deadline: Deadline) -> None:
        self._targets.verify(publication, shown, with_rule=False)
        self._targets.open(publication, deadline)

    def _stands(self, publication: Publication, shown: Shown, deadline: Deadline) -> bool:
        """True when the target is as it should be, or could be mended; False when it must be made (anew)."""
        target = shown.get((publication.tid, publication.target))
        found = differences(publication, target) if target else None
        if found is None:
            return False
        if not found:
            return True
        self._log.info("target differs from its publication", target=publication.target, why=str(found))
        if found.unknown:
            raise CommandFailed(f"target {publication.target}: left as it is, {found}")
        if found.remake:
            return False
        self._targets.reopen(publication, deadline)
        return True

    def _clear(
        self, publication: Publication, numbers: Mapping[str, int], deadline: Deadline, *, limit: int | None
    ) -> None:
        """Remove what has the target's name, and see that there is room for one more. numbers: what tgtd has."""
        name, chap = publication.target, publication.chap
        if name in numbers:
            self._targets.fence(name, (chap.user, chap.mutual_user), deadline.within(_STUCK_SECONDS))
        count = len(numbers.keys() - {name})
        if limit is not None and count >= limit:
            raise NoSpace(
                f"volume {publication.volume_id}: tgtd has {count} targets already, controller.max_exports is "
                f"{limit}; unpublish volumes, or raise it together with tgtd's limit of threads (TasksMax)"
            )

    def _restore(
        self, wanted: Mapping[str, Publication], shown: Shown, failures: list[str], deadline: Deadline
    ) -> bool:
        """Make what is missing or differs; True if there was anything. The caller holds the lock."""
        todo = []
        for name, publication in wanted.items():
            if name in self._busy or _as_wanted(publication, shown):
                continue
            if publication.device.exists():
                todo.append(publication)
            else:  # a dead disk must not keep tgtd offline for all others, round after round
                failures.append(f"target {name}: its device {publication.device} is not there")
        if not todo:
            return False
        absent = {publication.target for publication in todo} - self._targets.numbers(deadline).keys()
        # Those that were not there before are of publishes under way: no login comes to them yet.
        missing = len(absent if self._left is None else absent & self._left)
        # A login that meets a target half made, or none yet, fails for good on the node; one whose TCP connection is
        # dropped is repeated. A single one that is missing beside others is most likely a publish under way, too.
        shut = missing > 1 or (missing == 1 and len(wanted) == 1)
        if shut:
            self._log.warning("tgtd lost targets, restoring them", missing=missing, wanted=len(wanted))
            self._client.set_system_state("offline", deadline)
        try:
            self._ensure_all(todo, shown, deadline, guard=partial(collected, failures))
        except Exception:
            if shut:
                with suppress(DriverError):
                    self._client.set_system_state("ready", Deadline.after(_STUCK_SECONDS))
            raise
        if shut:
            self._client.set_system_state("ready", Deadline.after(_STUCK_SECONDS))
        return True

    def _look_after_crash(self, wanted: Collection[Publication], deadline: Deadline) -> None:
        """Mend what no list of targets shows: a tgtd left offline by a restore that was cut off, unused accounts."""
        if tgt_show.parse_system_state(self._client.show_system(deadline)) != "ready":
            self._client.set_system_state("ready", deadline)
        used = {user for publication in wanted for user in (publication.chap.user, publication.chap.mutual_user)}
        known = tgt_show.parse_accounts(self._client.show_accounts(deadline))
        self._targets.drop_accounts([u for u in known if OUR_ACCOUNT.fullmatch(u) and u not in used], deadline)

    def _audit(self, wanted: Mapping[str, Publication], shown: Shown, deadline: Deadline) -> None:
        for (tid, name), target in shown.items():
            publication = wanted.get(name)
            if publication is not None and publication.tid == tid and name not in self._busy:
                self._targets.close_foreign(target, publication.node.initiator, deadline)

    @contextmanager
    def _working_on(self, names: Collection[str], deadline: Deadline) -> Iterator[None]:
        """Keep `reconcile` off targets without holding the lock, since commands in flight may last long."""
        with self._lock.hold(deadline):
            self._busy += names
        try:
            yield
        finally:
            for name in names:
                self._busy.remove(name)


def _birth(socket: Path) -> tuple[int, int] | None:
    """What is another for each socket that was ever made at this path; None when there is none."""
    try:
        found = socket.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _as_wanted(publication: Publication, shown: Shown) -> bool:
    target = shown.get((publication.tid, publication.target))
    return target is not None and not differences(publication, target)


def _ours(name: str) -> bool:
    return name.startswith(f"{TARGET_PREFIX}:")


def _check(publication: Publication) -> None:
    """Every value that reaches tgtd, before the first step."""
    if not publication.node.initiator:
        raise Invalid(
            f"node {publication.node.name}: has no iSCSI initiator name; install open-iscsi there, then publish again"
        )
    tgt_client.check_target_name(publication.target)
    tgt_client.check_initiator(publication.node.initiator)
    tgt_client.check_path(publication.device)
    chap = publication.chap
    for user, secret in ((chap.user, chap.secret), (chap.mutual_user, chap.mutual_secret)):
        tgt_client.check_account(user)
        tgt_client.check_secret(secret, user)
