"""Links between the pages of the project lead somewhere."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\[[^]\n]*\]\((?P<target>[^)\s]+)\)")
_FOLDERS = ("docs", "deploy", "tests", "csi", "proto")
PAGES = sorted([*PROJECT.glob("*.md"), *(page for folder in _FOLDERS for page in (PROJECT / folder).rglob("*.md"))])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [match["target"] for match in _LINK.finditer(page.read_text())]
    local = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    assert [target for target in local if not (page.parent / target).exists()] == []
