"""What `snode doctor` looks at and what it says."""

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from csi.run import SEARCH_PATH, Runner, SubprocessRunner

OK, WARNING, ERROR = "ok", "warning", "error"
_MOST_LINKS = 40  # as the kernel


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. level: "ok", "warning" or "error"; repair: "" when there is nothing to do."""

    level: str
    subject: str
    text: str
    repair: str = ""


def told(level: str, subject: str, problems: Iterable[str]) -> Iterator[Finding]:
    """Findings of a part's own problems, which are `what is wrong -> the repair`."""
    for problem in problems:
        text, _, repair = problem.partition(" -> ")
        yield Finding(level, subject, text, repair)


@dataclass(frozen=True)
class Host:
    """What is looked at; tests put their own in place."""

    runner: Runner = field(default_factory=SubprocessRunner)
    root: Path = Path("/")
    uid: int = field(default_factory=os.geteuid)
    release: str = field(default_factory=platform.release)

    def has(self, program: str) -> bool:
        """Whether a program is where the driver looks for it."""
        return any((self.root / folder.lstrip("/") / program).exists() for folder in SEARCH_PATH.split(":"))

    def path(self, path: Path) -> Path:
        """A path of the host as it is found from here. Its links are followed as the host does: one that leads to /run
        leads to the host's.
        """
        found, rest, links = self.root, list(path.parts[1:]), 0
        while rest:
            part = rest.pop(0)
            step = found.parent if part == ".." and found != self.root else found / part
            if step.is_symlink() and links < _MOST_LINKS:
                links += 1
                target = step.readlink()
                found = self.root if target.is_absolute() else found
                rest = [*target.parts[target.is_absolute() :], *rest]
            else:
                found = step
        return found
