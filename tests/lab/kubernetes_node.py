"""Makes a guest into a node of Kubernetes: containerd, kubelet, and a network for its pods."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.tools.build import tool_path

from .channel import Command
from .disk import Disk
from .guest import Guest
from .kubernetes_control import SERVICES, ControlPlane
from .lab import Lab
from .network import HOST_IP
from .roles import until

BUSYBOX = "localhost/busybox:1"
#: Those of /usr/bin are the host's own and older.
_TOOLS = ("containerd", "containerd-shim-runc-v2", "ctr", "kubelet")

_CONTAINERD = f"""
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{BUSYBOX}'
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['/usr/lib/cni']
"""
# kubelet does not start without a clock speed, which the guest's /proc/cpuinfo has not.
_PREPARE = r"""
set -e
mountpoint -q /proc/cpuinfo || {
    sed "s/^model name.*/&\ncpu MHz\t\t: 2700.000/" /proc/cpuinfo > /run/cpuinfo
    mount --bind /run/cpuinfo /proc/cpuinfo
}
modprobe -a veth bridge
"""


def add_node(lab: Lab, name: str, image: Path, *, memory: str, disks: tuple[Disk, ...]) -> Guest:
    """A guest whose last disk is its own view of the prepared disk `image`."""
    return lab.guest(name, memory=memory, disks=[*disks, Disk(base=image)])


def start_containerd(guest: Guest, device: str) -> Command:
    """Start containerd with its store on a device; returns once it answers."""
    links = "\n".join(f"ln -sfn {tool_path(name)} /usr/local/bin/{name}" for name in _TOOLS)
    guest.write("/etc/containerd/config.toml", _CONTAINERD)
    guest.sh(
        f"{_PREPARE}{links}\n"
        f"mkdir -p /var/lib/containerd; mountpoint -q /var/lib/containerd || mount {device} /var/lib/containerd"
    )
    containerd = guest.spawn(["containerd"], name="containerd")
    until(guest, "ctr version >/dev/null 2>&1", "containerd", 400)
    return containerd


def stop_containerd(guest: Guest, containerd: Command) -> None:
    """Stop it in the orderly way and let go of its disk."""
    containerd.signal(15)
    containerd.wait(60)
    guest.sh("umount /var/lib/containerd")


def start_kubelet(guest: Guest, control: ControlPlane, settings: Mapping[str, object]) -> Command:
    """Start kubelet; the node registers itself with the control plane. /var/lib/kubelet must be on a real disk.

    settings: of KubeletConfiguration, beside those that the lab needs.
    """
    network = {
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": f"10.97.{guest.number}.0/24"}}],
    }
    guest.write("/etc/cni/net.d/10-lab.conflist", json.dumps(network))
    guest.write("/etc/kubernetes/kubelet.json", json.dumps({**_kubelet_config(), **settings}))
    guest.write("/etc/kubernetes/kubeconfig", json.dumps(control.kubeconfig(guest.name)), mode=0o600)
    # There is no kube-proxy: the only Service in use is that of the API server, whose address is a real one here.
    guest.sh(f"ip route replace {SERVICES} via {HOST_IP}")
    return guest.spawn(
        [
            "kubelet",
            "--config=/etc/kubernetes/kubelet.json",
            "--kubeconfig=/etc/kubernetes/kubeconfig",
            f"--hostname-override={guest.name}",
            f"--node-ip={guest.ip}",
        ],
        name="kubelet",
    )


def _kubelet_config() -> dict[str, object]:
    """Defaults but for what the lab lacks: systemd, swap accounting, certificates, DNS, a large disk."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "localStorageCapacityIsolation": False,
        "evictionHard": {"memory.available": "10Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "resolvConf": "",
    }
