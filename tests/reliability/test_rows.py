"""The table of faults is true: its page, the tests that it names, and what is to be taken out of the code."""

import ast
from pathlib import Path

import pytest

from tests.reliability.rows import Row, Without, read_rows
from tests.tools.reliability_page import page
from tests.tools.without_defence import PROJECT, apply, copy_of_project, outcomes

ROWS = read_rows()
WAYS = [pytest.param(way, id=f"{row.number}-{count}") for row in ROWS for count, way in enumerate(row.without, 1)]


def test_the_page_is_up_to_date() -> None:
    assert (PROJECT / "docs/reliability.md").read_text() == page()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_every_named_test_exists(row: Row) -> None:
    for name in (*row.tests, *(test for way in row.without for test in way.tests)):
        file, _, function = name.partition("::")
        tree = ast.parse((PROJECT / file).read_text())
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function.partition("[")[0] in found, f"row {row.number}: {name}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_what_is_to_be_taken_out_is_there(row: Row, tmp_path: Path) -> None:
    for number, way in enumerate(row.without):
        folder = tmp_path / str(number)
        for edit in way.edits:
            copy = folder / edit.file
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text((PROJECT / edit.file).read_text())
            apply(edit, folder)
            ast.parse(copy.read_text())


def test_the_copy_is_the_project() -> None:
    with copy_of_project() as copy:
        assert (copy / "csi/cli.py").read_text() == (PROJECT / "csi/cli.py").read_text()
        assert (copy / ".venv/bin/python").exists()
    assert not copy.exists()


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", WAYS)
def test_without_its_defence_a_test_fails(way: Without) -> None:
    for test, failed, words in outcomes(way):
        assert failed, f"{test} passes without its defence: {words}"
