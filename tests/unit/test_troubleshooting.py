"""The guide for troubleshooting speaks of messages that the driver really has."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
GUIDE = PROJECT / "docs/guides/troubleshooting.md"
_SECTION = re.compile(r"^### `(?P<message>[^`\n]+)`\n(?P<body>.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)
# Stands for what a message names: in the guide a word for it, in the code an expression in braces.
_HOLE = "…"


def _template(node: ast.expr) -> str:
    """A text of the code, with a hole for each value in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_HOLE if isinstance(part, ast.FormattedValue) else _template(part) for part in node.values)
    return ""


def _messages() -> list[str]:
    """All texts of the driver's code, docstrings not among them: the longest first."""
    found = set()
    for path in (PROJECT / "csi").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        found |= {
            _template(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in documentation
        }
    return sorted(found, key=len, reverse=True)


def _sections() -> list[tuple[str, str]]:
    return [(match["message"], match["body"]) for match in _SECTION.finditer(GUIDE.read_text())]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    return _messages()


@pytest.mark.parametrize("heading", [message for message, _ in _sections()])
def test_a_heading_is_a_message_of_the_driver(heading: str, messages: list[str]) -> None:
    words = [piece for piece in heading.split(_HOLE) if piece.strip()]
    wanted = re.compile(".*".join(re.escape(piece) for piece in words), re.DOTALL)
    assert len("".join(words)) >= 15, "too few words to find it by"
    assert any(wanted.search(message) for message in messages), f"no message in csi/ has the words {words}"


def test_each_says_why_and_what_to_do() -> None:
    sections = _sections()
    assert len(sections) > 40
    assert len({heading for heading, _ in sections}) == len(sections)
    for heading, body in sections:
        why, do, what = body.partition("\n**Do:** ")
        assert why.strip() and do and what.strip(), heading
