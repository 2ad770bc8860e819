"""deploy/kubernetes and deploy/helm make the same objects, and a real API server takes each variant of them."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters.api_server import ApiServer, api_server
from tests.clusters.manifests import (
    KUSTOMIZE,
    NAMESPACE,
    Object,
    Objects,
    RenderError,
    helm,
    kustomize,
    lint,
    notes,
    plain,
)
from tests.lab.kernel import PROJECT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TUTORIAL = PROJECT / "docs/tutorials/kubernetes.md"
CONTROLLER, NODE = f"{NAMESPACE}:snode-controller", f"{NAMESPACE}:snode-node"
SIDECARS = ("provisioner", "attacher", "resizer")
RESOURCES = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}

#: Values that users set, each with the reason for which they do.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "registrar sidecar": {"node": {"registrar": {"enabled": True}}},
    "another folder of kubelet": {"node": {"kubeletDir": "/var/snap/kubelet"}},
    "resources": {"controller": {"resources": RESOURCES}, "node": {"resources": RESOURCES},
                  "sidecars": {"resources": RESOURCES}},
    "only some nodes": {"node": {"nodeSelector": {"disk": "yes"}, "tolerations": [{"key": "a", "operator": "Exists"}],
                                 "maxUnavailable": 1},
                        "controller": {"tolerations": [], "priorityClassName": "system-cluster-critical"},
                        "snodes": [{"nodeSelector": {"kubernetes.io/hostname": "storage1"}}]},
    "image of a private registry": {"image": {"repository": "registry.lab/snode", "tag": "2", "pullPolicy": "Always"},
                                    "imagePullSecrets": [{"name": "registry"}]},
    "Docker beside Kubernetes": {"tlsSecret": "snode-tls", "hostPaths": ["/srv/volumes", "/srv/more"]},
    "failover": {"failover": {"enabled": True, "resources": RESOURCES}},
    "failover of several SNODEs": {"failover": {"enabled": True},
                                   "snodes": [{}, {"name": "b", "portals": ["10.0.0.6:3260"]}]},
    "further arguments": {"sidecars": {name: {"extraArgs": ["--v=5"]} for name in SIDECARS}},
    "further classes": {"storageClasses": [
        {"name": "fast", "pool": "thick", "default": True, "fsType": "xfs", "reclaimPolicy": "Retain",
         "volumeBindingMode": "Immediate", "allowVolumeExpansion": False, "mountOptions": ["noatime"],
         "parameters": {"csi.storage.k8s.io/x": "value"}, "annotations": {"a": "b"}},
        {"name": "plain", "pool": "thin"}]},
    "several SNODEs": {"snodes": [
        {}, {"name": "b", "portals": ["10.0.0.6:3260", "[fd00::6]:3260"]},
        {"name": "c", "driverName": "c.example.org", "config": 'tools = "host"\n',
         "nodeSelector": {"kubernetes.io/hostname": "c"}}],
        "storageClasses": [{"name": f"of-{name or 'a'}", "pool": "thick", "snode": name} for name in ("", "b", "c")]},
}  # fmt: skip

_WITH_FAILOVER = {"resources": "base", "components": "components/failover"}

#: Values that can't work, and what is said.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt value": ({"snode": []}, "snode"),
    "a misspelt key of a SNODE": ({"snodes": [{"portal": []}]}, "portal"),
    "a class of a SNODE that is not there": (
        {"storageClasses": [{"name": "x", "pool": "p", "snode": "b"}]},
        'x is of SNODE "b", which snodes does not have',
    ),
    "two SNODEs without names": ({"snodes": [{}, {}]}, "two of them have the driver name csi.snode.io"),
    "settings of its own without a name": ({"snodes": [{"config": "x"}]}, "write it into `config`"),
    "the registrar for several": (
        {"snodes": [{}, {"name": "b"}], "node": {"registrar": {"enabled": True}}},
        "the sidecar registers one driver only",
    ),
    "an unknown filesystem": ({"storageClasses": [{"name": "x", "pool": "p", "fsType": "ntfs"}]}, "fsType"),
}  # fmt: skip


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    with api_server() as server:
        server.apply(each for each in kustomize(KUSTOMIZE / "base").values() if each["kind"] == "Namespace")
        yield server


def test_both_make_the_same_objects() -> None:
    ours, theirs = plain(kustomize(KUSTOMIZE / "base")), plain(helm())
    assert sorted(ours) == sorted(theirs)
    for key, each in ours.items():
        assert each == theirs[key], f"{' '.join(key)} differs between deploy/kubernetes/base and the chart"


def test_both_make_the_same_failover(tmp_path: Path) -> None:
    folders = {word: [os.path.relpath(KUSTOMIZE / name, tmp_path.resolve())] for word, name in _WITH_FAILOVER.items()}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(folders))
    ours, theirs = plain(kustomize(tmp_path)), plain(helm({"failover": {"enabled": True}}))
    assert sorted(ours) == sorted(theirs)
    for key, each in ours.items():
        # The order of containers means nothing, and kustomize puts those of a patch first.
        assert _by_container(each) == _by_container(theirs[key]), f"{' '.join(key)} differs"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_server_takes_what_the_chart_makes(api: ApiServer, variant: str) -> None:
    objects = helm(VARIANTS[variant])
    api.apply(objects.values(), dry=True)
    api.apply(_service_accounts(objects))
    api.apply((_pod(each) for each in _workloads(objects)), dry=True)  # policies look at pods, not at templates


@pytest.mark.parametrize("folder", ["base", "example"])
def test_the_server_takes_what_kustomize_makes(api: ApiServer, folder: str) -> None:
    objects = kustomize(KUSTOMIZE / folder)
    api.apply(objects.values(), dry=True)
    api.apply(_service_accounts(objects))
    api.apply((_pod(each) for each in _workloads(objects)), dry=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_values_that_can_not_work_are_refused(fault: str) -> None:
    values, text = FAULTS[fault]
    with pytest.raises(RenderError, match=re.escape(text)):
        helm(values)


def test_each_snode_is_a_driver_with_its_own_controller_and_classes() -> None:
    objects = helm(VARIANTS["several SNODEs"])
    drivers = {"": "csi.snode.io", "b": "b.csi.snode.io", "c": "c.example.org"}
    assert {name for kind, name in objects if kind == "CSIDriver"} == set(drivers.values())
    for name, driver in drivers.items():
        deployment = objects["Deployment", f"snode-controller{name and '-'}{name}"]
        assert _environment(deployment)["SNODE_DRIVER_NAME"] == driver
        assert objects["StorageClass", f"of-{name or 'a'}"]["provisioner"] == driver
    assert _environment(objects["DaemonSet", "snode-node"])["SNODE_NODE_KUBELET_DRIVERS"] == ",".join(drivers.values())
    b, c = (objects["Deployment", f"snode-controller-{name}"] for name in "bc")
    assert _environment(b)["SNODE_CONTROLLER_PORTALS"] == "10.0.0.6:3260,[fd00::6]:3260"
    assert b["spec"]["template"]["spec"]["nodeSelector"] == {"snode.io/snode": "b"}
    assert c["spec"]["template"]["spec"]["nodeSelector"] == {"kubernetes.io/hostname": "c"}
    assert _config_of(b) == "snode-csi"
    assert objects["ConfigMap", _config_of(c)]["data"]["snode.toml"] == 'tools = "host"\n'


def test_the_registrar_takes_the_place_of_our_own_registration() -> None:
    node = helm(VARIANTS["registrar sidecar"])["DaemonSet", "snode-node"]
    assert "SNODE_NODE_KUBELET_REGISTRY" not in _environment(node)
    registrar = node["spec"]["template"]["spec"]["containers"][1]
    assert "--kubelet-registration-path=/var/lib/kubelet/plugins/csi.snode.io/csi.sock" in registrar["args"]


def test_helm_finds_no_fault_in_the_chart() -> None:
    assert "0 chart(s) failed" in lint()


def test_the_notes_say_what_is_to_be_done() -> None:
    said = notes(VARIANTS["several SNODEs"])
    for line in (
        "label node NAME snode.io/role=snode",
        "label node NAME snode.io/snode=b",
        "deploy/snode-controller-c",
    ):
        assert line in said
    assert "still has the example's address" in said
    assert "ATTENTION" not in notes({"config": 'tools = "host"\n'})


@pytest.mark.parametrize("number", [0, 1])
def test_the_values_of_the_tutorial_work(api: ApiServer, number: int) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    api.apply(helm(yaml.safe_load(blocks[number])).values(), dry=True)


# -- rights ----------------------------------------------------------------------------------------------------------


def test_each_may_do_what_it_needs_and_no_more(api: ApiServer) -> None:
    api.apply(kustomize(KUSTOMIZE / "base").values())
    for verb, what in [("create", "persistentvolumes"), ("patch", "persistentvolumeclaims/status"),
                       ("patch", "volumeattachments/status"), ("create", "csistoragecapacities")]:  # fmt: skip
        assert api.may(CONTROLLER, verb, what, NAMESPACE), f"{verb} {what}"
    for verb, what in [("get", "secrets"), ("create", "pods"), ("patch", "nodes"), ("get", "configmaps"),
                       ("delete", "persistentvolumeclaims"), ("create", "volumeattachments"),
                       ("create", "leases")]:  # fmt: skip
        assert not api.may(CONTROLLER, verb, what, NAMESPACE), f"{verb} {what}"
    assert not api.may(CONTROLLER, "create", "csistoragecapacities", "default")
    for verb, what in [("get", "nodes"), ("list", "pods"), ("get", "persistentvolumes"), ("get", "secrets")]:
        assert not api.may(NODE, verb, what, NAMESPACE), f"{verb} {what}"


def test_failover_has_rights_of_its_own(api: ApiServer) -> None:
    objects = helm({"failover": {"enabled": True}})
    rights = [each for (_, name), each in objects.items() if name == "snode-failover"]
    assert len(rights) == 4
    api.apply(rights)
    for verb, what in [("patch", "nodes"), ("delete", "pods"), ("create", "leases")]:
        assert api.may(CONTROLLER, verb, what, NAMESPACE), f"{verb} {what}"
    for verb, what in [("create", "leases"), ("update", "leases"), ("create", "pods"), ("delete", "nodes")]:
        assert not api.may(CONTROLLER, verb, what, "kube-node-lease"), f"{verb} {what}"
    assert api.kubectl("delete", "--filename=-", objects=rights).returncode == 0


# -- parts -----------------------------------------------------------------------------------------------------------


def _workloads(objects: Objects) -> list[Object]:
    return [each for (kind, _), each in objects.items() if kind in ("Deployment", "DaemonSet")]


def _service_accounts(objects: Objects) -> list[Object]:
    return [each for (kind, _), each in objects.items() if kind == "ServiceAccount"]


def _pod(workload: Object) -> Object:
    template = workload["spec"]["template"]
    metadata = {**template["metadata"], "name": workload["metadata"]["name"], "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _environment(workload: Object) -> dict[str, str]:
    driver = workload["spec"]["template"]["spec"]["containers"][0]
    return {each["name"]: each["value"] for each in driver["env"] if "value" in each}


def _by_container(each: Object) -> Object:
    if each["kind"] != "Deployment":
        return each
    spec = each["spec"]["template"]["spec"]
    return {**each, "spec": {**spec, "containers": {one["name"]: one for one in spec["containers"]}}}


def _config_of(workload: Object) -> str:
    volumes = workload["spec"]["template"]["spec"]["volumes"]
    return str(next(each["configMap"]["name"] for each in volumes if each["name"] == "config"))
