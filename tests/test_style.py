"""The tools of style, as tests. A missing tool fails its test by name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent


def _tool(name: str) -> str:
    """The tool beside this interpreter, else on the PATH."""
    found = shutil.which(name, path=str(_BIN)) or shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing; install the project's extra `dev`: pip install -e '.[dev]'")
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "argv",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", "csi", "tests"],
        ["lint-imports"],
    ],
    ids=" ".join,
)
def test_clean(argv: list[str]) -> None:
    result = subprocess.run([_tool(argv[0]), *argv[1:]], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(argv)}:\n{result.stdout[-8000:]}{result.stderr[-2000:]}"
