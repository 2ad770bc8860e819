"""Waits that take no time, and a second request that arrives in the middle of a first.

Every wait of the driver goes through Deadline; here it moves a clock of the waiting thread instead, so that seconds of
patience cost nothing and end in the same order every time.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

from csi.deadline import Deadline
from csi.locks import ResourceLock, VolumeLocks
from tests.fakes.crash import Crash

_REAL_RESOURCE = ResourceLock.hold
_REAL_VOLUME = VolumeLocks.hold
_MOST_SECONDS = 10.0


class _Clock(threading.local):
    ahead = 0.0


class Patience:
    """Installed by `use`; `look` is called at each moment in which the driver would have slept."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._clock = _Clock()
        self._look = look
        self._waiting = threading.local()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Replace the driver's clock and sleep for the time of the block."""
        waits = self

        def sleep(deadline: Deadline, seconds: float) -> None:
            waits._clock.ahead += max(0.0, min(seconds, deadline.remaining())) + 1e-6
            waits._look()

        @contextmanager
        def hold_resource(lock: ResourceLock, deadline: Deadline) -> Iterator[None]:
            if lock._lock.locked():
                waits._tell()
            with _REAL_RESOURCE(lock, deadline):
                yield

        @contextmanager
        def hold_volume(locks: VolumeLocks, volume_id: str, *, background: bool = False) -> Iterator[None]:
            if locks._held.get(volume_id):
                waits._tell()
            with _REAL_VOLUME(locks, volume_id, background=background):
                yield

        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + waits._clock.ahead)
        with ExitStack() as stack:
            stack.enter_context(mock.patch("csi.deadline.time", clock))
            stack.enter_context(mock.patch.object(Deadline, "sleep", sleep))
            stack.enter_context(mock.patch.object(ResourceLock, "hold", hold_resource))
            stack.enter_context(mock.patch.object(VolumeLocks, "hold", hold_volume))
            # Power cuts of the SNODE's own disk are not played, so nothing waits for it either.
            stack.enter_context(mock.patch("os.fsync", lambda _fd: None))
            yield

    def beside(self, action: Callable[[], None]) -> Callable[[], None]:
        """Run an action in a thread of its own until it ends or waits for a lock; the result joins it."""
        moved = threading.Event()
        errors: list[BaseException] = []

        def work() -> None:
            self._waiting.event = moved
            try:
                action()
            except BaseException as error:
                errors.append(error)
            finally:
                moved.set()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert moved.wait(_MOST_SECONDS), "the second request neither ends nor waits for a lock"

        def join() -> None:
            thread.join(3 * _MOST_SECONDS)
            assert not thread.is_alive(), "the second request does not end"
            for error in errors:
                raise error

        return join

    def _tell(self) -> None:
        event = getattr(self._waiting, "event", None)
        if event is not None:
            event.set()


class Steps:
    """The boundary of one service: at the chosen step of an armed thread something happens, once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._at = 0
        self._action: Callable[[str], None] | None = None
        self._thread = 0

    def arm(self, at: int, action: Callable[[str], None]) -> None:
        """Do `action` at the at-th step from now of this thread."""
        self._at, self._action, self._thread = at, action, threading.get_ident()
        self.names = []

    def disarm(self) -> None:
        """Nothing happens any more."""
        self._action = None

    def __call__(self, name: str) -> None:
        """A step of the service."""
        if self._action is None or threading.get_ident() != self._thread:
            return
        self.names.append(name)
        if len(self.names) == self._at:
            action, self._action = self._action, None
            action(name)


def crash(name: str) -> None:
    """An action for `Steps.arm`: kill -9."""
    raise Crash(name)
