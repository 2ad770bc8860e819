"""Structured logging: one line an event, key=value for people or JSON for machines, on stderr."""

import logging
import sys
from typing import Any

# structlog prints tracebacks with `rich` where a development environment has it. That costs a service 4 MiB of the 60
# it may idle in, and 25 ms of its start, for output that goes to a log: hidden while structlog looks for it.
_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]
import structlog  # noqa: E402

if _rich is None:
    del sys.modules["rich"]
else:
    sys.modules["rich"] = _rich

#: Keys whose values never reach a log, wherever they come from.
SECRET_KEYS = frozenset({"secrets", "sealed", "chap", "password", "secret"})


def get_logger(component: str) -> Any:
    """A logger whose events carry `component`. Typed Any: structlog's bound loggers are dynamic by design."""
    return structlog.get_logger(component=component)


def set_up(*, level: str = "info", json: bool = False) -> None:
    """Route all events to stderr. level: debug, info, warning or error."""
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _drop_secrets,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def _drop_secrets(_logger: Any, _method: str, event: Any) -> Any:
    for key in SECRET_KEYS & event.keys():
        event[key] = "***"
    return event
