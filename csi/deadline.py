"""Time budgets. The only place that sleeps: every wait ends at the deadline or when the service stops."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from csi.errors import Timeout, Unavailable

T = TypeVar("T")

#: Longest budget in seconds of a request whose caller set none.
DEFAULT_SECONDS = 120.0


class Deadline:
    """A point on the monotonic clock, and the stop flag of the service.

    A client that leaves does not end a change (CSI spec, "Timeouts": only a negating call cancels): steps are checked
    between each other with `check`, never interrupted midway.
    """

    def __init__(self, at: float, *, stop: threading.Event | None = None) -> None:
        self._at = at
        self._stop = stop or threading.Event()

    @classmethod
    def after(cls, seconds: float, *, stop: threading.Event | None = None) -> "Deadline":
        """A deadline `seconds` from now."""
        return cls(time.monotonic() + seconds, stop=stop)

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at - time.monotonic())

    def within(self, seconds: float) -> "Deadline":
        """The earlier of this deadline and `seconds` from now, with the same stop flag."""
        return Deadline(min(self._at, time.monotonic() + seconds), stop=self._stop)

    @property
    def stopping(self) -> bool:
        """True once the service is going down."""
        return self._stop.is_set()

    def check(self, what: str) -> None:
        """Raise Timeout (or Unavailable when the service stops) if there is no time for the next step, `what`."""
        if self.stopping:
            raise Unavailable(f"the driver is stopping; repeat the request ({what} was not begun)")
        if self.remaining() <= 0:
            raise Timeout(f"no time left to {what}; repeat the request, it goes on from here")

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than the deadline or the stop flag allow."""
        self._stop.wait(min(seconds, self.remaining()))


def wait_until(
    look: Callable[[], T | None], deadline: Deadline, *, what: str, first: float = 0.005, most: float = 0.25
) -> T:
    """Call `look` until it returns something true; back off from `first` to `most` seconds between looks.

    Raises Timeout when the deadline comes first, Unavailable when the service stops. `look` is called once more
    after the deadline, so that a condition which became true during the last sleep is seen.
    """
    pause = first
    while True:
        found = look()
        if found:
            return found
        deadline.check(f"wait for {what}")
        deadline.sleep(pause)
        pause = min(most, pause * 2)
