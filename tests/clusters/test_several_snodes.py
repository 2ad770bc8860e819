"""Two SNODEs in a real Kubernetes, as the chart deploys them: two drivers, and one node plugin for both."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.clusters.manifests import helm
from tests.lab import kubernetes_objects as objects
from tests.lab import roles
from tests.lab.conftest import Say
from tests.lab.kubernetes import NAMESPACE, Kubernetes, running
from tests.lab.kubernetes_control import until
from tests.lab.kubernetes_disk import image_of
from tests.lab.kubernetes_look import leftovers, look
from tests.lab.kubernetes_objects import claim, claim_spec, pod

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

DRIVERS = {"a": "csi.snode.io", "b": "b.csi.snode.io"}
_TARGETS = {"targets": "tgtadm --lld iscsi --op show --mode target | grep io.snode"}
_FILES = """\
tools = "host"
[controller]
portals = ["192.0.2.10:3260"]
[pools.own]
type = "files"
directory = "/var/lib/snode/own"
export = "tgt"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Kubernetes]:
    """The second SNODE is the first CNODE, so that its volumes are attached on the second one."""
    with running() as made:
        second = made.cnodes[0]
        roles.start_tgtd(second)
        kubectl = made.control.kubectl
        kubectl("label", "node", second.name, "snode.io/snode=b")
        kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(helm(_values(made)).values()))
        workloads = ("deployment/snode-controller", "deployment/snode-controller-b", "daemonset/snode-node")
        kubectl("rollout", "status", *workloads, f"--namespace={NAMESPACE}", "--timeout=180s", timeout=190)
        until("every node has both drivers", lambda: _drivers(made) == {each.name: 2 for each in made.nodes})
        yield made


def _values(cluster: Kubernetes) -> dict[str, Any]:
    maps = cluster.core.list_namespaced_config_map(NAMESPACE).items
    config = next(each.data["snode.toml"] for each in maps if "snode.toml" in (each.data or {}))
    repository, _, tag = image_of("snode-csi").rpartition(":")
    portal = roles.portal(cluster.cnodes[0])
    return {
        "image": {"repository": repository, "tag": tag},
        "sidecars": {name: {"image": image_of(f"csi-{name}")} for name in ("provisioner", "attacher", "resizer")},
        "config": config,
        "snodes": [{}, {"name": "b", "portals": [portal], "config": _FILES}],
        "storageClasses": [{"name": "of-a", "pool": "thick"}, {"name": "of-b", "pool": "own", "snode": "b"}],
    }


def _drivers(cluster: Kubernetes) -> dict[str, int]:
    found = cluster.storage.list_csi_node().items
    return {
        each.metadata.name: len({driver.name for driver in each.spec.drivers or ()} & set(DRIVERS.values()))
        for each in found
    }


def test_a_node_uses_volumes_of_both(cluster: Kubernetes, say: Say) -> None:
    node = cluster.cnodes[1].name
    for name, driver in DRIVERS.items():
        script = f"echo {name} > {objects.DATA}/file; sync; cat {objects.DATA}/file"
        cluster.create(claim(name, claim_spec(f"of-{name}")), pod(name, script, volume=name, node=node))
        cluster.wait_pod(name)
        cluster.wait_log(name, name)
        assert cluster.volume_of(name).spec.csi.driver == driver
    attachments = cluster.storage.list_volume_attachment().items
    assert {(each.spec.attacher, each.spec.node_name) for each in attachments} == {
        (driver, node) for driver in DRIVERS.values()
    }
    for machine in (cluster.snode, cluster.cnodes[0]):
        (targets,) = look(machine, _TARGETS).values()
        assert len(targets.splitlines()) == 1, "each SNODE exports its own volume, and no other"
    cluster.control.kubectl("patch", "pvc", "b", '--patch={"spec":{"resources":{"requests":{"storage":"96Mi"}}}}')
    until("the second SNODE's volume has grown", lambda: _size(cluster, "b") == "96Mi")
    room = cluster.storage.list_namespaced_csi_storage_capacity(NAMESPACE).items
    classes = {each.storage_class_name for each in room if each.capacity != "0"}
    assert {"of-a", "of-b"} <= classes
    cluster.clear()
    until("nothing is left", lambda: not leftovers(cluster) and not look(cluster.cnodes[0], _TARGETS), 90)
    assert cluster.cnodes[0].sh("ls /var/lib/snode/own/*.img 2>/dev/null; true").strip() == ""


def _size(cluster: Kubernetes, name: str) -> str:
    found = cluster.core.read_namespaced_persistent_volume_claim(name, "default")
    return str(found.status.capacity["storage"])
