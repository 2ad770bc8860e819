"""A kill at a chosen step, inside one process: the objects are thrown away and made anew from what is on disk."""


class Crash(BaseException):
    """Unwinds like a kill: no `except Exception` of the driver catches it."""


class CrashAt:
    """A boundary that raises Crash at the `step`-th call (from 1; 0 = never), and remembers the names of all steps."""

    def __init__(self, step: int = 0) -> None:
        self._step = step
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self._step:
            raise Crash(f"step {self._step}: {name}")
