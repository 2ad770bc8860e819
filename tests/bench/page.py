"""What a benchmark found, and docs/benchmarks.md made of it."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Table:
    """Rows of text below a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [list(self.head), ["---"] * len(self.head), *map(list, self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Target:
    """A limit that the project sets itself, and what was measured."""

    what: str
    measured: float
    limit: float
    unit: str = ""  # "" = a ratio
    at_least: bool = False
    where: str = ""  # where the time goes, told when it is missed

    @property
    def met(self) -> bool:
        """Whether it is met, by the figure as it is printed."""
        shown = round(self.measured, 2)
        return shown >= self.limit if self.at_least else shown <= self.limit

    def row(self) -> tuple[str, ...]:
        """Its row in the table of all targets."""
        sign, unit = "≥" if self.at_least else "≤", f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met else "**missed**"
        return self.what, f"{sign} {self.limit:g}{unit}", f"{self.measured:.2f}{unit}", verdict


@dataclass(frozen=True)
class Section:
    """One benchmark: how it was run, what it compares, what it found."""

    title: str
    command: str
    text: str
    tables: Sequence[Table] = ()
    targets: Sequence[Target] = field(default=())

    def __str__(self) -> str:
        parts = [f"## {self.title}", f"`{self.command}`", self.text.strip(), *map(str, self.tables)]
        parts += [f"**{target.what}**: {target.where}" for target in self.targets if target.where and not target.met]
        return "\n\n".join(parts)


HEAD = """# Benchmarks

Made by `make bench`, which rewrites this page. Machine: {machine}. Its load in the minute before: {load}.

The lab's guests are User Mode Linux kernels with one CPU each, without KVM: a process starts in about 7 ms there and in
less than 1 ms on bare metal. So times are long, and ratios within one run say more. A figure is the median of the
repetitions; the driver and the hand took turns. *By hand* are the commands of an administrator in one shell script in
the guest, timed by the guest, so that the lab's way into the guest is not counted. *The driver* is the RPC as a client
on the host sees it, less the share of the lab's relays: {relays}.
"""


def page(sections: Sequence[Section], *, relays: str, load: str) -> str:
    """The text of docs/benchmarks.md."""
    targets = Table(
        ("target", "limit", "measured", ""),
        [target.row() for section in sections for target in section.targets],
    )
    parts = [
        HEAD.format(machine=machine(), load=load, relays=relays),
        "## Targets\n\nThe section of a target that is missed says where the time goes.\n",
    ]
    return "\n".join(parts) + f"\n{targets}\n\n" + "\n\n".join(map(str, sections)) + "\n"


def machine() -> str:
    """Processor, cores and kernel of this machine."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown processor",
    )
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Linux {kernel}"


def load() -> str:
    """The load of this machine in the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


def milliseconds(values: Sequence[float]) -> str:
    """The median of some seconds, in ms."""
    return f"{median(values) * 1000:.0f}"
