"""Prints docs/reliability.md from the rows of tests/reliability:

python -m tests.tools.reliability_page > docs/reliability.md
"""

import ast
from pathlib import Path

from tests.reliability.rows import Row, read_rows

_PROJECT = Path(__file__).resolve().parents[2]

_INTRODUCTION = """\
# Reliability

Generated from `tests/reliability/*.toml` by `python -m tests.tools.reliability_page`; a test compares the two.

How storage fails, what you see of it, and the test that proves it. Nearly all of these run on real kernels in the lab
(`tests/lab/README.md`), with a real tgtd, iscsid and LVM. Tests run in `make test`, those with a ° in `make soak`
alone, for they take long. Each row names the lines that are its defence and the tests that show it:
`python -m tests.tools.without_defence NUMBER` takes them out of a copy of the project and runs those tests, which must
fail then; without a number it does so for every row. What else is named here is more evidence.
Numbers are those of the team's list of faults; they have gaps because this page holds the ones that are proved.

## What is promised

- Data that was acknowledged and flushed survives the crash of any process and the loss of the SNODE's power, given
  disks that are honest about their caches.
- One node at most can write a single-node volume once its publication on another node was answered with OK.
- No file system is made on a volume that ever held data.
- The bytes of a deleted volume are never readable by another one.
- Every request may be repeated, and interrupted at any point.

Not promised: service while the SNODE is down, data on disks that fail without RAID, and safety when two controllers
drive one SNODE (the second one refuses to start where it can see the first). The SNODE notes within about two seconds
that a new volume holds data; a superblock that is destroyed before that, on a volume that then goes to another node, is
not missed.

## Faults

| number | fault | what the user sees | test |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return _INTRODUCTION + "".join(f"{_line(row)}\n" for row in read_rows())


def _line(row: Row) -> str:
    tests = ", ".join(f"`{test.rpartition('::')[2]}`{'°' if is_soak(test) else ''}" for test in row.tests)
    return f"| {row.number} | {row.fault} | {row.seen} | {tests or 'not tested: ' + row.untested} |"


def is_soak(test: str) -> bool:
    """Whether a test, by its id, runs in `make soak` alone: it or its file is marked so, not only some of its cases."""
    file, _, function = test.partition("::")
    tree = ast.parse((_PROJECT / file).read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    marks = [ast.unparse(mark) for mark in found.decorator_list]
    marks += [
        ast.unparse(mark)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in (node.value.elts if isinstance(node.value, ast.List) else [node.value])
    ]
    return "pytest.mark.soak" in marks


if __name__ == "__main__":
    print(page(), end="")
