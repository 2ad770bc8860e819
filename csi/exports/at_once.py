"""One step for many publications, several side by side."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

from csi.errors import DriverError
from csi.model import Publication

#: Makes what surrounds a step: lets its errors through, or notes them.
Guard = Callable[[], AbstractContextManager[None]]

# So many are done side by side, by so many threads.
_MANY, _THREADS = 16, 3


def at_once(publications: Sequence[Publication], act: Callable[[Publication], None], guard: Guard) -> list[Publication]:
    """Do `act` for each, within a `guard`; returns those for which it was done, in their order.

    tgtd does one thing after another. With several requests before it, it has the next at hand while we read and write.
    """
    done: set[str] = set()

    def attempt(publication: Publication) -> None:
        with guard():
            act(publication)
            done.add(publication.target)

    if len(publications) < _MANY:
        for publication in publications:
            attempt(publication)
    else:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="exports") as pool:
            list(pool.map(attempt, publications))
    return [publication for publication in publications if publication.target in done]


@contextmanager
def collected(failures: list[str]) -> Iterator[None]:
    """Note an error and go on: one target that can't be had must not cost the others theirs."""
    try:
        yield
    except DriverError as error:
        failures.append(str(error))
