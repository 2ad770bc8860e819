"""What every RPC has in common: deadline, slot, log line, and the way from an error to a status code.

A decorator and not an interceptor, so that it also works below grpc's own test server, which takes no interceptors.
"""

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from csi.deadline import DEFAULT_SECONDS, Deadline
from csi.errors import DriverError
from csi.locks import Slots
from csi.log import get_logger
from csi.model import VOLUME_ID
from csi.rpc.access import LOCAL, Caller, check, trim, widened
from csi.rpc.redact import hidden_values, redacted, without
from csi.rpc.status import code_of

#: Workers of the server, and how many of them may do work that can hang. The rest answers Probe, capabilities, info.
#: A hundred creations at once is what a provisioner sends. Threads are made when they are needed first.
WORKERS = 136
SLOTS = 128

#: A status message travels in HTTP/2 headers, of which clients accept 8 KiB in all.
_LONGEST_MESSAGE = 2000

_log = get_logger("rpc")


class Calls:
    """What the RPCs of one process share: the slots, the stop flag, the longest time of a request, who is at work."""

    def __init__(
        self,
        *,
        slots: int = SLOTS,
        longest_seconds: float = DEFAULT_SECONDS,
        stop: threading.Event | None = None,
        caller_of: Callable[[grpc.ServicerContext], Caller] = lambda _context: LOCAL,
    ) -> None:
        """caller_of: who calls; over a unix socket it is root."""
        self.caller_of = caller_of
        self.slots = Slots(slots)
        self.longest_seconds = longest_seconds
        self.stop = stop or threading.Event()
        self._running: dict[int, str] = {}
        self._changed = threading.Condition()

    def deadline(self, context: grpc.ServicerContext) -> Deadline:
        """The client's deadline or our own longest time, whichever is earlier."""
        remaining = context.time_remaining()
        seconds = self.longest_seconds if remaining is None else min(remaining, self.longest_seconds)
        return Deadline.after(seconds, stop=self.stop)

    @contextmanager
    def counted(self, description: str) -> Iterator[None]:
        """Count a running RPC for as long as the block lasts."""
        key = threading.get_ident()
        with self._changed:
            self._running[key] = description
        try:
            yield
        finally:
            with self._changed:
                del self._running[key]
                self._changed.notify_all()

    def wait_idle(self, seconds: float) -> list[str]:
        """Wait until no RPC runs, at most `seconds`; returns descriptions of those that still do."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout=seconds)
            return sorted(self._running.values())


class Servicer(Protocol):
    """What the decorator needs of the class whose methods it wraps."""

    @property
    def calls(self) -> Calls:
        """The shared state of the process's RPCs."""
        ...


@dataclass(frozen=True)
class _Failure:
    code: grpc.StatusCode
    message: str


S = TypeVar("S", bound=Servicer)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


def method(
    *, slot: bool = True, level: int = logging.INFO, failure_level: int = logging.WARNING
) -> Callable[[Callable[[S, Q, Deadline], R]], Callable[[S, Q, grpc.ServicerContext], R]]:
    """Make an RPC handler of a function `(self, request, deadline) -> response` that raises DriverErrors.

    slot: False for what must be answered even when all slots are taken; such a function never waits for anything.
    level: of the log line of a call that went well; failure_level: of one that ended with an error of the driver.
    """

    def decorate(function: Callable[[S, Q, Deadline], R]) -> Callable[[S, Q, grpc.ServicerContext], R]:
        @functools.wraps(function)
        def handler(self: S, request: Q, context: grpc.ServicerContext) -> R:
            deadline = self.calls.deadline(context)
            caller = self.calls.caller_of(context)

            def checked(self: S, request: Q, deadline: Deadline) -> R:
                check(request, caller)
                response = function(self, widened(request, caller), deadline)
                trim(request, response, caller)
                return response

            outcome = _call(checked, self, request, deadline, slot=slot, level=level, failure_level=failure_level)
            if isinstance(outcome, _Failure):
                # Last statement of the outermost frame: abort raises a bare Exception, which nothing may catch.
                context.abort(outcome.code, outcome.message)
            return outcome

        return handler

    return decorate


def _call(
    function: Callable[[S, Q, Deadline], R],
    servicer: S,
    request: Q,
    deadline: Deadline,
    *,
    slot: bool,
    level: int,
    failure_level: int,
) -> R | _Failure:
    name, volume = type(request).__name__.removesuffix("Request"), _volume_of(request)
    began = time.monotonic()
    bound = structlog.contextvars.bound_contextvars(method=name, **({"volume": volume} if volume else {}))
    with bound, servicer.calls.counted(f"{name} {volume}".strip()):
        if _log.is_enabled_for(logging.DEBUG):
            _log.debug("request", request=redacted(request))
        try:
            with servicer.calls.slots.take() if slot else nullcontext():
                response = function(servicer, request, deadline)
        except DriverError as error:
            text, code = str(error), code_of(error)
            shown = without(text, hidden_values(request))
            _log.log(failure_level, "rpc", code=code.name, ms=_ms(began), error=shown)
            # The caller sent the mount flags, and must be told which one is wrong; the log need not know it.
            return _Failure(code, _fit(without(text, hidden_values(request, but=frozenset({"mount_flags"})))))
        except Exception as error:  # noqa: BLE001 - the caller must get a status whatever happens
            # The text of an unforeseen exception may hold anything, so the caller gets its class and the log the rest.
            text = without("".join(traceback.format_exception(error)), hidden_values(request))
            _log.error("rpc", code="INTERNAL", ms=_ms(began), traceback=text)
            kind = type(error).__name__
            return _Failure(
                grpc.StatusCode.INTERNAL, f"defect in the driver ({kind} in {name}); its log has the details"
            )
        _log.log(level, "rpc", code="OK", ms=_ms(began))
        return response


def _ms(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)


def _volume_of(request: Message) -> str:
    """What the log calls the volume: its id, or the name of a volume to be made; foreign texts made harmless."""
    fields = request.DESCRIPTOR.fields_by_name
    key = next((name for name in ("volume_id", "name") if name in fields), None)
    text = str(getattr(request, key)) if key else ""
    return text if VOLUME_ID.fullmatch(text) else ascii(text[:128])[1:-1]


def _fit(message: str) -> str:
    """A message that gRPC can carry: valid UTF-8 of bounded length."""
    message = message.encode("utf-8", "backslashreplace").decode()
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}…"
