"""Work beside the requests: jobs that repeat for the life of the process, and the cached answer to "are you ready?"."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from csi.deadline import Deadline
from csi.errors import DriverError
from csi.log import get_logger

#: How often a job is asked whether its next round should come early, and how soon that may be after one that failed.
_EARLY_SECONDS = 0.05
_AGAIN_SECONDS = 0.2

#: One round of a job: does a little and comes back; called again and again.
Job = Callable[[Deadline], None]


def end_signals() -> int:
    """A descriptor that can be read from once SIGTERM or SIGINT has come. Call it in the main thread.

    The interpreter's own C code writes the byte at once. A handler in Python runs only when the main thread does, which
    a signal that comes in the moment before its wait does not wake; and the lock of a threading.Event may be held by
    that same thread.
    """
    ending, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    return ending


class Background:
    """Threads that repeat jobs until `stop`. An error is logged and the job goes on at its next turn."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._log = get_logger("background")

    def every(
        self,
        seconds: float,
        name: str,
        job: Job,
        *,
        longest_seconds: float = 60.0,
        early: Callable[[], bool] | None = None,
    ) -> None:
        """Start a thread that does `job` at once and then `seconds` after each end of it.

        early: asked many times a second; the next round begins at once when it says so, or a little later when the last
        one failed.
        """
        # Daemon: a round that hangs in the kernel must not keep the process from ending.
        thread = threading.Thread(
            target=self._repeat, args=(seconds, name, job, longest_seconds, early), name=name, daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def stop(self, *, wait_seconds: float = 2.0) -> None:
        """Ask all jobs to end, and give them a moment."""
        self._stop.set()
        end = time.monotonic() + wait_seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _repeat(
        self, seconds: float, name: str, job: Job, longest_seconds: float, early: Callable[[], bool] | None
    ) -> None:
        said = ""
        while not self._stop.is_set():
            error = self._round(job, longest_seconds)
            failure = "" if error is None else f"{type(error).__name__}: {error}"
            # Once for each new failure, not every round: a tgtd that is down for a day must not fill the disk.
            if error is not None and failure != said:
                defect = not isinstance(error, DriverError)
                self._log.error("job failed, goes on", job=name, error=failure, exc_info=error if defect else None)
            elif said and error is None:
                self._log.info("job works again", job=name)
            said = failure
            if early is None:
                self._stop.wait(seconds)
            else:
                self._wait(seconds, early, failed=error is not None)

    def _wait(self, seconds: float, early: Callable[[], bool], *, failed: bool) -> None:
        end = time.monotonic() + seconds
        self._stop.wait(min(seconds, _AGAIN_SECONDS if failed else 0.0))
        while not self._stop.is_set() and time.monotonic() < end and not early():
            self._stop.wait(_EARLY_SECONDS)

    def _round(self, job: Job, longest_seconds: float) -> Exception | None:
        """One round; returns the exception that ended it. Any: a defect must not end the job for good."""
        try:
            job(Deadline.after(longest_seconds, stop=self._stop))
        except Exception as error:  # noqa: BLE001 - see above
            return None if self._stop.is_set() else error
        return None


class Readiness:
    """What keeps the process from serving, looked at in the background so that Probe never waits for a check.

    A look that does not end is itself a problem, told once the last result is `stale_seconds` old.
    """

    def __init__(
        self,
        checks: Sequence[Callable[[Deadline], list[str]]],
        *,
        fresh_seconds: float = 10.0,
        stale_seconds: float = 30.0,
    ) -> None:
        """fresh_seconds: how long a good result is good enough; a bad one is looked at again at every turn."""
        self._checks = tuple(checks)
        self._fresh_seconds = fresh_seconds
        self._stale_seconds = stale_seconds
        self._problems: list[str] = []
        self._looked_at: float | None = None
        self._known = threading.Event()
        self._log = get_logger("readiness")

    def look(self, deadline: Deadline) -> None:
        """Run all checks and keep their result; a check that fails is a problem of its own. A Background job."""
        if self._looked_at is not None and not self._problems and self._age() < self._fresh_seconds:
            return
        problems: list[str] = []
        for check in self._checks:
            try:
                problems += check(deadline)
            except DriverError as error:
                problems.append(str(error))
        if problems != self._problems:
            if problems:
                self._log.warning("not ready", problems=problems)
            else:
                self._log.info("ready again")
        self._problems, self._looked_at = problems, time.monotonic()
        self._known.set()

    def problems(self, *, wait_seconds: float = 0.0) -> list[str] | None:
        """The latest result: [] is ready, None is "not looked yet" even after `wait_seconds`."""
        if not self._known.wait(wait_seconds):
            return None
        age = self._age()
        if age > self._stale_seconds:
            return [*self._problems, f"the driver's check of itself hangs since {age:.0f} s; look for a stuck command"]
        return self._problems

    def _age(self) -> float:
        assert self._looked_at is not None
        return time.monotonic() - self._looked_at
