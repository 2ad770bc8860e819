"""Prints docs/reference/helm.md from the chart's values.yaml, whose comments are the text:

python -m tests.tools.helm_reference > docs/reference/helm.md
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy/helm/snode-csi"

_INTRODUCTION = """\
# Values of the Helm chart

Generated from `deploy/helm/snode-csi/values.yaml` by `python -m tests.tools.helm_reference`; a test compares the two.

    helm install snode-csi deploy/helm/snode-csi --namespace snode-csi --values my-values.yaml

[The tutorial](../tutorials/kubernetes.md) goes from nothing to a claim with data. An unknown value is refused
(`values.schema.json`). `deploy/kubernetes/base` makes the same objects as the chart with its defaults; a test renders
both and compares them.

| value | default | meaning |
|---|---|---|
"""
_LONGEST = 60


def page() -> str:
    """The whole page."""
    text = (CHART / "values.yaml").read_text()
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    return _INTRODUCTION + "".join(_rows(root, text.splitlines(), prefix=""))


def _rows(node: yaml.MappingNode, lines: Sequence[str], *, prefix: str) -> Iterator[str]:
    for key, value in node.value:
        name = prefix + key.value
        meaning = _comment(lines, key)
        parts = _parts(value)
        described = any(_is_described(part, lines) for part in parts)
        assert meaning or described, f"values.yaml: {name} has no comment"
        if meaning:
            yield f"| `{name}` | {'' if described else _default(value)} | {meaning} |\n"
        if described:
            inside = f"{name}[]." if isinstance(value, yaml.SequenceNode) else f"{name}."
            yield from _rows(parts[0], lines, prefix=inside)


def _parts(node: yaml.Node) -> list[yaml.MappingNode]:
    """A value that has keys, or the entries of a list that do. The first one is described, and stands for all."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [each for each in nodes if isinstance(each, yaml.MappingNode)]


def _is_described(node: yaml.MappingNode, lines: Sequence[str]) -> bool:
    return any(
        _comment(lines, key) or any(_is_described(part, lines) for part in _parts(value)) for key, value in node.value
    )


def _comment(lines: Sequence[str], key: yaml.Node) -> str:
    """The comment right above a key, on one line."""
    words: list[str] = []
    for above in reversed(lines[: key.start_mark.line]):
        if not above.lstrip().startswith("#"):
            break
        words.insert(0, above.strip().lstrip("# "))
    return " ".join(words)


def _default(node: yaml.Node) -> str:
    value = yaml.safe_load(yaml.serialize(node))
    text = json.dumps(value)
    if isinstance(value, str) and "\n" in value:
        return "an example"
    if isinstance(value, str) or len(text) > _LONGEST:
        return f"`{value}`" if isinstance(value, str) and value else '`""`' if value == "" else "see `values.yaml`"
    return f"`{text}`"


if __name__ == "__main__":
    print(page(), end="")
