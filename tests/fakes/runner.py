"""A Runner that hands each command to a fake program, counts the calls, and can make any of them fail."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from csi.deadline import Deadline
from csi.errors import Unavailable
from csi.run import Boundary, Result, failed, no_boundary, step_name
from tests.fakes.crash import Crash

#: What a fake program answers: exit code, stdout, stderr.
Reply = tuple[int, str, str]
#: A fake program: full argv and stdin. It raises AssertionError for anything it does not know.
Program = Callable[[Sequence[str], str | None], Reply]


@dataclass
class _Fault:
    words: tuple[str, ...]
    nth: int
    after: bool
    reply: Reply | None


class FakeRunner:
    """Dispatches by program name; fails on an unknown program, as the machine would."""

    def __init__(self, programs: Mapping[str, Program], *, boundary: Boundary = no_boundary) -> None:
        """boundary: called before and after each command that changes something, as the real Runner does."""
        self.boundary = boundary
        self.programs = dict(programs)
        self.calls: list[tuple[str, ...]] = []
        self._faults: list[_Fault] = []

    def fail(self, *words: str, nth: int = 1, after: bool = False, reply: Reply | None = (1, "", "injected")) -> None:
        """Make the nth call whose argv has all `words` fail, before or after it took effect.

        reply None: kill -9 of the driver at this point (raises Crash).
        """
        self._faults.append(_Fault(words, nth, after, reply))

    def forgive(self) -> None:
        """Drop the faults that did not come to pass."""
        self._faults.clear()

    def count(self, *words: str) -> int:
        """How many calls so far had all `words` in their argv."""
        return sum(all(word in call for word in words) for call in self.calls)

    def run(
        self,
        argv: Sequence[str],
        *,
        deadline: Deadline,
        read_only: bool = False,
        ok: frozenset[int] | None = frozenset({0}),
        input: str | None = None,
        timeout: float = 60.0,
        pass_fds: Sequence[int] = (),
    ) -> Result:
        """See csi.run.Runner.run."""
        del timeout, pass_fds
        name = step_name(argv)
        deadline.check(f"run {name}")
        self.calls.append(tuple(argv))
        program = self.programs.get(name)
        if program is None:
            assert not argv[0].startswith("/"), f"no fake for our own program {list(argv)}"
            raise Unavailable(f"{argv[0]}: program not found")
        if not read_only:
            self.boundary(f"{name}:before")
        fault = self._due(argv)
        if fault is not None and not fault.after:
            reply = _strike(fault)
        else:
            reply = program(argv, input)
            if fault is not None:
                reply = _strike(fault)
        if not read_only:
            self.boundary(f"{name}:after")
        result = Result(tuple(argv), *reply)
        if ok is not None and result.returncode not in ok:
            raise failed(result)
        return result

    def has(self, program: str) -> bool:
        """See csi.run.Runner.has."""
        return program in self.programs

    def _due(self, argv: Sequence[str]) -> _Fault | None:
        for fault in self._faults:
            if all(word in argv for word in fault.words):
                fault.nth -= 1
                if fault.nth == 0:
                    self._faults.remove(fault)
                    return fault
        return None


def _strike(fault: _Fault) -> Reply:
    if fault.reply is None:
        raise Crash("injected")
    return fault.reply
