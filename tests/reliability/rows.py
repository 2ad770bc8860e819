"""The faults that the driver defends against: `*.toml` in this folder, read into `Row`s.

A row has a number, the fault, what the user sees, and the tests that prove the defence:

    [[row]]
    number = 57
    fault = "One sentence, without a full stop"
    seen = "What the user sees of it, without a full stop"
    tests = ["tests/lab/faults/test_mounts.py::test_a_dead_mount_is_not_taken_for_done"]
    untested = "why there is no test, for a row without any"

    [[row.without]]                     # one way to take the defence out; each of its tests must then fail
    tests = ["..."]                     # those of the row, if not given
    edits = [
        {file = "csi/staging.py", find = '''text that stands there once''', put = '''what stands there instead'''},
    ]
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Edit:
    """One text of one file, and what stands there without the defence."""

    file: str
    find: str
    put: str


@dataclass(frozen=True)
class Without:
    """A way to take a defence out, and the tests that must then fail."""

    tests: tuple[str, ...]
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Row:
    """One fault."""

    number: int
    fault: str
    seen: str
    tests: tuple[str, ...]
    untested: str
    without: tuple[Without, ...]


def read_rows() -> list[Row]:
    """All rows, by number. Raises ValueError for what is missing, unknown or there twice."""
    rows = [
        _row(path, table)
        for path in sorted(FOLDER.glob("*.toml"))
        for table in tomllib.loads(path.read_text()).get("row", [])
    ]
    numbers = [row.number for row in rows]
    if twice := {number for number in numbers if numbers.count(number) > 1}:
        raise ValueError(f"rows that are there twice: {sorted(twice)}")
    return sorted(rows, key=lambda row: row.number)


def _row(path: Path, table: Mapping[str, Any]) -> Row:
    known = {"number", "fault", "seen", "tests", "untested", "without"}
    where = f"{path.name}, row {table.get('number')}"
    if unknown := set(table) - known:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}")
    tests = tuple(table.get("tests", ()))
    untested = table.get("untested", "")
    without = tuple(
        Without(tuple(way.get("tests", tests)), tuple(Edit(**edit) for edit in way["edits"]))
        for way in table.get("without", ())
    )
    if bool(untested) == bool(tests):
        raise ValueError(f"{where}: needs either tests or a reason why there is none")
    if tests and not without:
        raise ValueError(f"{where}: does not say what to take out so that its tests fail")
    return Row(table["number"], table["fault"], table["seen"], tests, untested, without)
