"""What failed in the background is not tried again at once."""

import time


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
