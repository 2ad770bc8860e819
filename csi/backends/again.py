"""For work that is done again and again in the background: not at once after a failure, and told once."""

import re
import time
from collections.abc import Sequence

from csi.log import get_logger

#: A number, but not one in a name such as `vg0` or `trash-4711`.
_FIGURE = re.compile(r"(?<![\w./-])[0-9][0-9.]*")


class Backoff:
    """Remembers for which things it is too early to try again."""

    def __init__(self, seconds: float = 60.0) -> None:
        """seconds: the pause after a failure."""
        self._seconds = seconds
        self._until: dict[str, float] = {}

    def due(self, name: str) -> bool:
        """True unless `name` failed a short time ago."""
        return time.monotonic() >= self._until.get(name, 0.0)

    def failed(self, name: str) -> None:
        """Leave `name` alone for a while."""
        self._until[name] = time.monotonic() + self._seconds

    def done(self, name: str) -> None:
        """Forget `name`."""
        self._until.pop(name, None)


class Told:
    """What is wrong, logged once for each change; a figure in a sentence that moves is no change."""

    def __init__(self) -> None:
        self._log = get_logger("health")
        self._told: dict[str, str] = {}

    def tell(self, wrong: Sequence[str]) -> None:
        """wrong: all that is wrong now, a sentence each; what is not among them any more is well again."""
        now = {_FIGURE.sub("N", text): text for text in wrong}
        for key in now.keys() - self._told.keys():
            self._log.warning("needs care", problem=now[key])
        for key in self._told.keys() - now.keys():
            self._log.info("over", problem=self._told[key])
        self._told = now
