"""What can be said of deploy/kubernetes and deploy/helm without their tools; tests/clusters renders them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi import __version__
from csi.config import load
from tests.tools import helm_reference

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = helm_reference.CHART


def _values() -> Any:
    return yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.mark.parametrize("folder", ["base", "example"])
def test_the_settings_are_valid_and_use_the_hosts_tools(folder: str) -> None:
    found = load(DEPLOY / "kubernetes" / folder / "snode.toml", environment={})
    assert found.tools == "host"
    assert found.node.target_roots == (Path("/var/lib/kubelet"),)
    assert all(pool.export == "tgt" for pool in found.pools.values()), "every node reaches every pool"


def test_the_chart_has_the_same_settings() -> None:
    assert _values()["config"] == (DEPLOY / "kubernetes/base/snode.toml").read_text()


def test_each_class_has_its_pool() -> None:
    for folder, classes in (("base", ["thick", "thin", "raid1", "files"]), ("example", ["thick", "thin"])):
        pools = load(DEPLOY / "kubernetes" / folder / "snode.toml", environment={}).pools
        assert list(pools) == classes
    assert [(each["name"], each["pool"]) for each in _values()["storageClasses"]] == [
        (f"snode-{pool}", pool) for pool in ("thick", "thin", "raid1", "files")
    ]


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    for name in ("base/controller", "base/node", "components/failover/controller"):
        assert f"image: snode-csi:{__version__}\n" in (DEPLOY / "kubernetes" / f"{name}.yaml").read_text()


def test_the_page_of_values_is_that_of_the_chart() -> None:
    page = CHART.parents[2] / "docs/reference/helm.md"
    assert page.read_text() == helm_reference.page(), "python -m tests.tools.helm_reference > docs/reference/helm.md"


def test_the_schema_knows_each_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    rows = re.findall(r"^\| `([^`]+)` \|", helm_reference.page(), re.MULTILINE)
    assert set(_names(schema, schema["definitions"])) == set(rows) - {"snodes", "storageClasses"}


def _names(schema: Any, definitions: Any, prefix: str = "") -> Iterator[str]:
    """The names of all values that have one, lists of which the entries are described included."""
    for name, inside in schema["properties"].items():
        kind = inside.get("$ref", "").rpartition("/")[2]
        inside = definitions["sidecar"] if kind == "sidecar" else inside
        entries = inside.get("items", {})
        if name == "global":
            continue  # Helm's own
        if "properties" in inside:
            yield from _names(inside, definitions, f"{prefix}{name}.")
        elif "properties" in entries and name != "imagePullSecrets":
            yield from _names(entries, definitions, f"{prefix}{name}[].")
        else:
            yield f"{prefix}{name}"
