"""What `snode doctor` looks at and what it says."""

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from csi.run import SEARCH_PATH, Runner, SubprocessRunner

OK, WARNING, ERROR = "ok", "warning", "error"


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
