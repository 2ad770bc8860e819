"""What the pages about Docker and certificates tell users to type: settings that are valid, commands that there are."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from csi import certs
from csi.cli import snode
from csi.config import load
from csi.docker.options import Options

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "tutorials/docker.md", DOCS / "guides/certificates.md"]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    return [text for name, text in _BLOCK.findall(page.read_text()) if name == kind]


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Each line of a program, as words; comments are left out."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            if line.startswith(f"{program} "):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_settings_are_valid(page: Path, tmp_path: Path) -> None:
    found = blocks(page, "toml")
    assert found
    for text in found:
        file = tmp_path / "snode.toml"
        file.write_text(text)
        config = load(file, environment={})
        assert config.tls


def test_certificates_are_made_as_they_say(tmp_path: Path) -> None:
    """In the order of each page, with a folder of our own; then each has what its machine needs."""
    for page in PAGES:
        folder = tmp_path / page.stem
        for words in commands(page, "snode certs"):
            if words[2] in ("init", "issue"):
                argv = [word.replace("/root/snode-ca", str(folder)) for word in words[1:]]
                done = CliRunner().invoke(snode, argv)
                assert done.exit_code == 0, f"{page.name}: {shlex.join(words)}: {done.output}{done.exception}"
        assert certs.problems(certs.files_of(folder, "snode1"), server=True) == []
        assert certs.problems(certs.files_of(folder, "cnode1"), docker_node="cnode1") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_commands_exist_with_their_options(page: Path) -> None:
    ours = list(commands(page, "snode"))
    assert ours
    for words in ours:
        done = CliRunner().invoke(snode, [*words[1:], "--help"])
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}"


def test_options_of_volumes_exist() -> None:
    made = list(commands(PAGES[0], "docker volume create"))
    assert len(made) >= 2
    for words in made:
        pairs = [words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-o"]
        assert Options.parse(dict(pairs)).size_bytes
