"""One SNODE and CNODEs with the driver in them, and the CSI calls that an orchestrator would make."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc as rpc

from . import roles
from .channel import Command
from .guest import Guest
from .lab import Lab

MIB = 1 << 20
STAGING = "/var/lib/kubelet/staging"
TARGET = "/var/lib/kubelet/pods/one"

_CONTROLLER = """
log_level = "{log_level}"

[controller]
portals = ["{portal}"]
default_pool = "thick"

[pools.thick]
type = "lvm"
vg = "vg0"
"""
_NODE = """
log_level = "{log_level}"

[node]
target_roots = ["/var/lib/kubelet"]
{node}
"""
_RPC_PORT = 9000

_Mode = pb.VolumeCapability.AccessMode


def capability(*, block: bool = False, fs_type: str = "ext4", mode: str = "SINGLE_NODE_WRITER") -> pb.VolumeCapability:
    """How a volume is to be used."""
    access_mode = _Mode(mode=mode)
    if block:
        return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=access_mode)
    return pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(fs_type=fs_type), access_mode=access_mode)


@dataclass
class Machine:
    """A guest with the driver in it."""

    guest: Guest
    role: str
    config: str
    daemon: Command | None = None  # tgtd or iscsid
    driver: roles.Driver | None = None
    stubs: dict[str, Any] = field(default_factory=dict)
    node_id: str = ""


class Cluster:
    """Boots everything; `thick` is the default pool. Other pools come by `pools`, as TOML."""

    def __init__(
        self,
        lab: Lab,
        *,
        cnodes: int = 2,
        pools: str = "",
        legs: int = 0,
        node: str = "",
        prepare: Callable[[Guest], None] = lambda _snode: None,
        pool_size: str = "4G",
        log_level: str = "debug",
    ) -> None:
        """prepare: called with the SNODE before its driver starts, to make thin pools and the like."""
        self.lab = lab
        snode = roles.add_snode(lab, pool=pool_size, legs=legs)
        controller = _CONTROLLER.format(log_level=log_level, portal=roles.portal(snode)) + pools
        self.snode = Machine(snode, "controller", controller)
        node = _NODE.format(log_level=log_level, node=node)
        self.cnodes = [Machine(roles.add_cnode(lab, f"cnode{n + 1}"), "node", node) for n in range(cnodes)]
        lab.boot_all()
        self._prepare = prepare
        lab.each([machine.guest for machine in self.machines], self._start_guest)
        for machine in self.cnodes:
            machine.node_id = machine.stubs["node"].NodeGetInfo(pb.NodeGetInfoRequest(), timeout=60).node_id

    @property
    def machines(self) -> Sequence[Machine]:
        """All of them, the SNODE first."""
        return [self.snode, *self.cnodes]

    # -- machines ------------------------------------------------------------------------------------------------

    def boot(self, machine: Machine) -> None:
        """Boot a machine that lost its power, with its daemon and driver."""
        machine.guest.boot()
        self._start_guest(machine.guest)

    def restore(self) -> None:
        """Heal the network, boot what has no power, and start every daemon and driver that does not run."""
        for machine in self.machines:
            guest = machine.guest
            guest.heal()
            if not guest.alive:
                self.boot(machine)
                continue
            guest.resume()
            guest.delay()
            if machine.daemon is None or machine.daemon.rc is not None:
                machine.daemon = roles.start_tgtd(guest) if machine is self.snode else roles.start_iscsid(guest)
            if machine.driver is None or machine.driver.process.rc is not None:
                self.start_driver(machine)

    def start_driver(self, machine: Machine, *, environment: Sequence[str] = ()) -> None:
        """Start the driver of a machine, again if it was killed, and wait for it to answer."""
        guest = machine.guest
        machine.driver = roles.start_driver(guest, machine.role, machine.config, environment=environment)
        if not guest.run(["test", "-e", "/run/relay.ready"])[0]:
            return
        roles.serve_tcp(guest, machine.driver.socket, _RPC_PORT)
        guest.sh(["touch", "/run/relay.ready"])
        # The driver is killed and started again: a broken connection is tried again at once, and that of a guest which
        # lost its power is not used again.
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        channel = grpc.insecure_channel(f"unix:{self.lab.forward(guest.ip, _RPC_PORT)}", options=options)
        machine.stubs = {
            "controller": rpc.ControllerStub(channel),
            "node": rpc.NodeStub(channel),
            "identity": rpc.IdentityStub(channel),
        }

    def _start_guest(self, guest: Guest) -> None:
        machine = next(machine for machine in self.machines if machine.guest is guest)
        if machine is self.snode:
            machine.daemon = roles.start_snode(guest)
            self._prepare(guest)
        else:
            machine.daemon = roles.start_cnode(guest)
        self.start_driver(machine)

    # -- the orchestrator's calls --------------------------------------------------------------------------------

    def create(
        self, name: str = "one", *, size_bytes: int = 96 * MIB, parameters: Mapping[str, str] | None = None
    ) -> str:
        """CreateVolume; returns the volume id."""
        request = pb.CreateVolumeRequest(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=size_bytes),
            volume_capabilities=[capability()],
            parameters=parameters or {},
        )
        response = self._call(self.snode, "controller", "CreateVolume", request)
        return str(response.volume.volume_id)

    def delete(self, volume_id: str) -> None:
        """DeleteVolume."""
        self._call(self.snode, "controller", "DeleteVolume", pb.DeleteVolumeRequest(volume_id=volume_id))

    def publish(
        self, volume_id: str, cnode: Machine, *, how: pb.VolumeCapability | None = None, readonly: bool = False
    ) -> dict[str, str]:
        """ControllerPublishVolume; returns the publish_context."""
        request = pb.ControllerPublishVolumeRequest(
            volume_id=volume_id, node_id=cnode.node_id, volume_capability=how or capability(), readonly=readonly
        )
        return dict(self._call(self.snode, "controller", "ControllerPublishVolume", request).publish_context)

    def unpublish(self, volume_id: str, cnode: Machine) -> None:
        """ControllerUnpublishVolume: the fence."""
        request = pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=cnode.node_id)
        self._call(self.snode, "controller", "ControllerUnpublishVolume", request)

    def stage(
        self,
        volume_id: str,
        cnode: Machine,
        context: Mapping[str, str],
        *,
        how: pb.VolumeCapability | None = None,
        timeout: float = 120,
    ) -> None:
        """NodeStageVolume at STAGING/<id>."""
        request = pb.NodeStageVolumeRequest(
            volume_id=volume_id,
            publish_context=context,
            staging_target_path=f"{STAGING}/{volume_id}",
            volume_capability=how or capability(),
        )
        self._call(cnode, "node", "NodeStageVolume", request, timeout=timeout)

    def mount(self, volume_id: str, cnode: Machine, *, how: pb.VolumeCapability | None = None) -> str:
        """NodePublishVolume; returns the container's path."""
        path = f"{TARGET}/{volume_id}"
        request = pb.NodePublishVolumeRequest(
            volume_id=volume_id,
            staging_target_path=f"{STAGING}/{volume_id}",
            target_path=path,
            volume_capability=how or capability(),
        )
        self._call(cnode, "node", "NodePublishVolume", request)
        return path

    def attach(self, volume_id: str, cnode: Machine, *, how: pb.VolumeCapability | None = None) -> str:
        """Publish, stage and mount; returns the container's path."""
        self.stage(volume_id, cnode, self.publish(volume_id, cnode, how=how), how=how)
        return self.mount(volume_id, cnode, how=how)

    def leave(self, volume_id: str, cnode: Machine, *, timeout: float = 120) -> None:
        """Unmount and unstage."""
        self.unmount(volume_id, cnode, timeout=timeout)
        self.unstage(volume_id, cnode, timeout=timeout)

    def unmount(self, volume_id: str, cnode: Machine, *, timeout: float = 120) -> None:
        """NodeUnpublishVolume."""
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=f"{TARGET}/{volume_id}")
        self._call(cnode, "node", "NodeUnpublishVolume", request, timeout=timeout)

    def unstage(self, volume_id: str, cnode: Machine, *, timeout: float = 120) -> None:
        """NodeUnstageVolume."""
        request = pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=f"{STAGING}/{volume_id}")
        self._call(cnode, "node", "NodeUnstageVolume", request, timeout=timeout)

    def detach(self, volume_id: str, cnode: Machine) -> None:
        """Unmount, unstage, unpublish."""
        self.leave(volume_id, cnode)
        self.unpublish(volume_id, cnode)

    def expand(self, volume_id: str, size_bytes: int) -> int:
        """ControllerExpandVolume; returns the new size in bytes."""
        request = pb.ControllerExpandVolumeRequest(
            volume_id=volume_id, capacity_range=pb.CapacityRange(required_bytes=size_bytes)
        )
        return int(self._call(self.snode, "controller", "ControllerExpandVolume", request).capacity_bytes)

    def expand_node(self, volume_id: str, cnode: Machine, size_bytes: int) -> None:
        """NodeExpandVolume."""
        request = pb.NodeExpandVolumeRequest(
            volume_id=volume_id,
            volume_path=f"{TARGET}/{volume_id}",
            capacity_range=pb.CapacityRange(required_bytes=size_bytes),
        )
        self._call(cnode, "node", "NodeExpandVolume", request)

    def _call(self, machine: Machine, service: str, method: str, request: Any, *, timeout: float = 120) -> Any:
        return getattr(machine.stubs[service], method)(request, timeout=timeout)

    # -- what is there -------------------------------------------------------------------------------------------

    def leftovers(self) -> dict[str, str]:
        """What is still there of any volume; {} when all is gone. Waits for the wipe of deleted volumes."""
        snode, found = self.snode.guest, {}
        roles.until(snode, "! lvs --noheadings -o lv_name | grep -q trash", "the wipe of deleted volumes", 1200)
        looks = {
            "logical volumes": "lvs --noheadings -o lv_name | grep v-",
            "targets": "tgtadm --lld iscsi --op show --mode target | grep io.snode",
            "accounts": "tgtadm --lld iscsi --op show --mode account | grep -v 'Account list'",
            "publications": "ls /var/lib/snode/publications",
        }
        for what, look in looks.items():
            out = snode.run(look)[1].strip()
            if out:
                found[f"{snode.name}: {what}"] = out
        for machine in self.cnodes:
            looks = {
                "sessions": "ls /sys/class/iscsi_session",
                "records": "find /etc/iscsi/nodes /var/lib/iscsi/nodes -type f",
                "mounts": "grep -E 'staging|pods' /proc/self/mountinfo",
                "node records": "ls /var/lib/snode/node | grep v-",
            }
            for what, look in looks.items():
                out = machine.guest.run(f"{look} 2>/dev/null")[1].strip() if machine.guest.alive else ""
                if out:
                    found[f"{machine.guest.name}: {what}"] = out
        return found

    def wait_for_targets(self, count: int, timeout: float = 30) -> float:
        """Seconds until tgtd has so many targets of ours."""
        began = time.monotonic()
        look = "tgtadm --lld iscsi --op show --mode target | grep -c '^Target .*io.snode'"
        while self.snode.guest.run(look)[1].strip() != str(count):
            assert time.monotonic() - began < timeout, f"tgtd does not have {count} targets after {timeout} s"
            time.sleep(0.05)
        return time.monotonic() - began


def refused(call: Callable[[], object]) -> grpc.RpcError | None:
    """The error that a call ends with, or None when it succeeds."""
    with suppress(StopIteration):
        try:
            call()
        except grpc.RpcError as error:
            return error
    return None
