"""A whole Kubernetes in the lab: its control plane on the host, a SNODE and CNODEs as nodes, the driver as users deploy
it (`kubectl apply -k`), and what tests ask of them."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from . import kubernetes_node, roles
from .channel import Command
from .disk import Disk
from .guest import Guest
from .kernel import PROJECT
from .kubernetes_api import Api, is_ready
from .kubernetes_control import ControlPlane, until
from .kubernetes_disk import get_disk, image_of
from .kubernetes_objects import DRIVER, Object
from .lab import Lab
from .oracle import Oracle

DEPLOY = PROJECT / "deploy" / "kubernetes" / "base"
NAMESPACE = "snode-csi"
#: The taint by which an admin says that a node is dead and will not come back by itself.
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
#: Nodes count as lost after 20 s, not 50: tests wait for it.
MANAGER = ("--node-monitor-grace-period=20s", "--node-monitor-period=2s")

_CONFIG = """
tools = "host"

[controller]
portals = ["{portal}"]
default_pool = "thick"

[node]
target_roots = ["/var/lib/kubelet"]
replacement_timeout = {replacement}

[pools.thick]
type = "lvm"
vg = "vg0"

[pools.thin]
type = "lvm-thin"
vg = "vg0"
thin_pool = "thin"

[pools.raid1]
type = "lvm"
vg = "vg1"
layout = "raid1"

[pools.files]
type = "files"
directory = "/var/lib/snode/volumes"
export = "tgt"
"""


class Kubernetes(Api):
    """Made with a lab, then `start`ed and `deploy`ed. Objects of tests are in the namespace `default`."""

    def __init__(
        self,
        lab: Lab,
        *,
        cnodes: int = 2,
        manager: Sequence[str] = MANAGER,
        replacement_seconds: int = 60,
        settings: str = "",
        components: Sequence[str] = (),
        kubelet: Mapping[str, object] | None = None,
    ) -> None:
        """kubelet: settings of KubeletConfiguration. manager: further arguments of the controller manager.

        settings: further tables for snode.toml. components: of deploy/kubernetes/components.
        """
        self._components = [DEPLOY.parent / "components" / name for name in components]
        self._kubelet = dict(kubelet or {})
        self.lab = lab
        image = get_disk()
        disks = (Disk("2G"), Disk("4G"), Disk("1G"), Disk("1G"))
        self.snode = kubernetes_node.add_node(lab, "snode", image, memory="1200M", disks=disks)
        self.cnodes = [
            kubernetes_node.add_node(lab, f"cnode{n + 1}", image, memory="1200M", disks=(Disk("2G"),))
            for n in range(cnodes)
        ]
        super().__init__(ControlPlane(lab, [guest.name for guest in self.nodes], manager=manager))
        self.daemons: dict[tuple[str, str], Command] = {}
        self._config = _CONFIG.format(portal=roles.portal(self.snode), replacement=replacement_seconds) + settings

    @property
    def nodes(self) -> list[Guest]:
        """All machines, the SNODE first."""
        return [self.snode, *self.cnodes]

    def node(self, name: str) -> Guest:
        """The machine of a node."""
        return next(guest for guest in self.nodes if guest.name == name)

    # -- machines ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the control plane and boot all machines, side by side; returns once all nodes are Ready."""
        with ThreadPoolExecutor(1 + len(self.nodes)) as pool:
            jobs = [pool.submit(self.control.start), *(pool.submit(self._boot, guest) for guest in self.nodes)]
            for job in jobs:
                job.result()
        self.open()
        for guest in self.nodes:
            self.start_kubelet(guest)
        self.wait_ready(*(guest.name for guest in self.nodes))
        # Every pod needs it, and the controller manager makes it.
        until("a service account", lambda: self.names(self.core.list_namespaced_service_account("default")))

    def boot(self, guest: Guest) -> None:
        """Boot a machine that lost its power, and all that its init would start."""
        self._boot(guest)
        self.start_kubelet(guest)

    def restore(self) -> None:
        """Give every machine its power, network and place in the cluster back, whatever a failed test left."""
        for guest in self.nodes:
            guest.heal()
            if not guest.alive:
                self.boot(guest)
        self.wait_ready(*(guest.name for guest in self.nodes))
        for node in self.core.list_node().items:
            if any(taint.key == OUT_OF_SERVICE for taint in node.spec.taints or ()):
                self.control.kubectl("taint", "node", node.metadata.name, f"{OUT_OF_SERVICE}-")

    def start_kubelet(self, guest: Guest) -> None:
        """Start kubelet, again if it was ended."""
        self.daemons[guest.name, "kubelet"] = kubernetes_node.start_kubelet(guest, self.control, self._kubelet)

    def start_tgtd(self) -> None:
        """Start tgtd on the SNODE, again if it was ended."""
        self.daemons[self.snode.name, "tgtd"] = roles.start_tgtd(self.snode)

    def start_iscsid(self, guest: Guest) -> None:
        """Start iscsid, again if it was ended."""
        self.daemons[guest.name, "iscsid"] = roles.start_iscsid(guest)

    def kill(self, guest: Guest, daemon: str) -> None:
        """End a daemon of a machine at once: kubelet, tgtd or iscsid."""
        self.daemons[guest.name, daemon].signal(9)
        self.daemons[guest.name, daemon].wait(20)

    def _boot(self, guest: Guest) -> None:
        guest.boot()
        # The SNODE is an initiator too: the driver's node plugin runs on every machine.
        self.daemons[guest.name, "iscsid"] = roles.start_cnode(guest)
        if guest is self.snode:
            guest.sh(f"modprobe -a {roles.DM_MODULES} && udevadm trigger --subsystem-match=block --settle")
            devices = [disk.device for disk in guest.disks]
            roles.ensure_vg(guest, "vg0", [devices[1]])
            roles.ensure_vg(guest, "vg1", devices[2:4])
            roles.ensure_thin_pool(guest, size="1G")
            self.start_tgtd()
        kubernetes_node.start_containerd(guest, guest.disks[-1].device)

    # -- the driver ----------------------------------------------------------------------------------------------

    def deploy(self) -> None:
        """Deploy the driver as its users do; returns once it serves on every node."""
        self.control.kubectl("label", "node", self.snode.name, "snode.io/role=snode")
        self.control.kubectl("taint", "node", self.snode.name, "snode.io/role=snode:NoSchedule")
        folder = self.lab.folder / "deploy"
        folder.mkdir()
        (folder / "snode.toml").write_text(self._config)
        overlay = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": NAMESPACE,
            "resources": [os.path.relpath(DEPLOY, folder.resolve())],
            "components": [os.path.relpath(path, folder.resolve()) for path in self._components],
            "configMapGenerator": [{"name": "snode-csi", "behavior": "replace", "files": ["snode.toml"]}],
            "images": self._images(),
        }
        (folder / "kustomization.yaml").write_text(json.dumps(overlay))
        self.control.kubectl("apply", "-k", str(folder), timeout=120)
        self.wait_driver()

    def _images(self) -> list[Object]:
        """What the manifests' images are called in the lab."""
        manifests = self.control.kubectl("kustomize", str(DEPLOY))
        names = {image.rpartition(":")[0] for image in re.findall(r"image: (\S+)", manifests)}
        local = [(name, image_of(name.rpartition("/")[2]).rpartition(":")) for name in sorted(names)]
        return [{"name": name, "newName": new, "newTag": tag} for name, (new, _, tag) in local]

    def wait_driver(self, seconds: float = 240) -> None:
        """Return once all of the driver's pods are ready and kubelet has it on every node that it runs on."""
        until("the driver's pods are ready", lambda: not self._unready(), seconds)
        nodes = {pod.spec.node_name for pod in self.driver_pods("node")}
        until("kubelet knows the driver", lambda: nodes <= self._registered(), seconds)

    def driver_pods(self, role: str = "") -> list[Any]:
        """The driver's pods: all, or those of the role "controller" or "node"."""
        pods = self.core.list_namespaced_pod(NAMESPACE).items
        return [pod for pod in pods if pod.metadata.name.startswith(f"snode-{role}")]

    def _unready(self) -> list[str]:
        pods = self.driver_pods()
        wanted = {"controller": 1, "node": len(self.nodes)}
        found = [f"pods of {role}" for role, count in wanted.items() if len(self.driver_pods(role)) < count]
        return found + [pod.metadata.name for pod in pods if pod.metadata.deletion_timestamp or not is_ready(pod)]

    def _registered(self) -> set[str]:
        return {
            node.metadata.name
            for node in self.storage.list_csi_node().items
            if any(driver.name == DRIVER for driver in node.spec.drivers or ())
        }

    # -- objects -------------------------------------------------------------------------------------------------

    def follow(self, pod: Any, oracle: Oracle) -> Command:
        """Let the oracle hear a pod made by `kubernetes_objects.writer`, over the serial line of its node."""
        hear = oracle.follow(pod.metadata.uid)
        log = f"/var/log/pods/default_{pod.metadata.name}_{pod.metadata.uid}/main/0.log"
        return self.node(pod.spec.node_name).spawn(
            ["tail", "-n", "+1", "-F", log], name="tail", on_line=lambda line: hear(line.split(" ", 3)[-1])
        )


@contextmanager
def running(**settings: Any) -> Iterator[Kubernetes]:
    """A Kubernetes with the driver deployed, for as long as the block lasts. settings: those of Kubernetes."""
    get_disk()  # its making takes a lab of its own
    with Lab() as lab:
        cluster = Kubernetes(lab, **settings)
        try:
            cluster.start()
            cluster.deploy()
            yield cluster
        finally:
            cluster.control.close()
