"""The commands of README.md, one block for each way of use, as a reader would copy them."""

import re

from tests.lab.kernel import PROJECT

#: What stands behind `bash` at the beginning of a block.
WAYS = ("kubernetes", "nomad", "docker")
_BLOCK = re.compile(r"^```bash (?P<way>\w+)\n(?P<commands>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> dict[str, str]:
    """The commands of each way of use."""
    found = [(match["way"], match["commands"]) for match in _BLOCK.finditer((PROJECT / "README.md").read_text())]
    assert sorted(way for way, _ in found) == sorted(WAYS), "README.md has one block for each way of use"
    return dict(found)
