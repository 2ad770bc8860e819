"""The Kubernetes objects of deploy/, as kustomize and Helm make them."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.lab.kernel import PROJECT
from tests.tools.build import tool_path

KUSTOMIZE = PROJECT / "deploy/kubernetes"
CHART = PROJECT / "deploy/helm/snode-csi"
NAMESPACE = "snode-csi"

Object = dict[str, Any]
#: Kind and name: no two objects of ours differ in their namespace alone.
Objects = dict[tuple[str, str], Object]

#: What Helm puts on every object, and what makes pods start anew when settings change; kustomize has a hash in a name.
_HELMS = re.compile(r"helm\.sh/.*|app\.kubernetes\.io/(instance|version|managed-by)|checksum/config")
_HASH = re.compile(r"(snode-csi)-[a-z0-9]{10}")


class RenderError(Exception):
    """kubectl or helm refused; the message is what it said."""


def kustomize(folder: Path) -> Objects:
    """What `kubectl apply -k` would apply."""
    return _objects(_run(str(tool_path("kubectl")), "kustomize", str(folder)))


def helm(values: Mapping[str, Any] | None = None) -> Objects:
    """What `helm install` would apply with these values."""
    argv = [str(tool_path("helm")), "template", "snode-csi", str(CHART), "--namespace", NAMESPACE, "--values", "-"]
    return _objects(_run(*argv, stdin=json.dumps(dict(values or {}))))


def notes(values: Mapping[str, Any]) -> str:
    """What `helm install` says at its end."""
    argv = [str(tool_path("helm")), "install", "snode-csi", str(CHART), "--namespace", NAMESPACE, "--dry-run=client"]
    said = _run(*argv, "--kubeconfig", "/dev/null", "--values", "-", stdin=json.dumps(dict(values)))
    return said.partition("\nNOTES:\n")[2]


def lint() -> str:
    """What `helm lint` says of the chart; warnings are faults."""
    return _run(str(tool_path("helm")), "lint", "--strict", str(CHART))


def plain(objects: Objects) -> Objects:
    """The same without what only one of the two tools adds."""
    made = {}
    for (kind, name), each in objects.items():
        if kind != "Namespace":
            made[kind, _HASH.sub(r"\1", name)] = _plain(each)
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        fields = {key: _plain(field) for key, field in value.items() if not _HELMS.fullmatch(key)}
        return {key: field for key, field in fields.items() if not (key == "annotations" and field == {})}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _HASH.sub(r"\1", value) if isinstance(value, str) and _HASH.fullmatch(value) else value


def _objects(text: str) -> Objects:
    made: Objects = {}
    for each in yaml.safe_load_all(text):
        if each is not None:
            key = each["kind"], each["metadata"]["name"]
            assert key not in made, f"{key} is there twice"
            made[key] = each
    return made


def _run(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RenderError(done.stderr)
    return done.stdout
