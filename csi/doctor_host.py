"""What `snode doctor` looks at and what it says."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from csi.run import Runner, SubprocessRunner

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. level: "ok", "warning" or "error"; repair: "" when there is nothing to do."""

    level: str
    subject: str
    text: str
    repair: str = ""


@dataclass(frozen=True)
class Host:
    """What is looked at; tests put their own in place."""

    runner: Runner = field(default_factory=SubprocessRunner)
    root: Path = Path("/")
    search_path: str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    uid: int = field(default_factory=os.geteuid)
    release: str = field(default_factory=platform.release)

    def has(self, program: str) -> bool:
        """Whether a program is where the driver looks for it."""
        return any((self.root / folder.lstrip("/") / program).exists() for folder in self.search_path.split(":"))
