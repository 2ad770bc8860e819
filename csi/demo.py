"""`snode demo`: one volume from request to container path and back, through the real driver, on this machine.

Starts `snode all` as a process of its own and talks CSI to it, as an orchestrator does. One line a step: its time, and
what exists now.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from csi.deadline import Deadline, wait_until
from csi.demo_ground import Ground
from csi.demo_service import Service
from csi.errors import DriverError, Unavailable
from csi.fs.grow import may_grow_mounted_ext4
from csi.log import set_up
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc as rpc
from csi.run import SubprocessRunner

T = TypeVar("T")
#: Sizes before and after growth: small, but xfs has a minimum.
_SIZES = {"ext4": (64 << 20, 128 << 20), "xfs": (320 << 20, 448 << 20)}
_CONTENT_BYTES = 8 << 20


def main() -> int:
    """Run the demo; 0 when every step worked and nothing is left, else 1."""
    if os.geteuid() != 0:
        print(
            "snode demo: needs root, since it makes devices and mounts; run it with sudo.",
            file=sys.stderr,
        )
        return 1
    set_up(level="warning")
    try:
        ground = Ground(SubprocessRunner(), Deadline.after(60))
    except DriverError as error:
        print(f"snode demo: {error}", file=sys.stderr)
        return 1
    try:
        print(_headline(ground))
        walk = Walk(ground, fs_type=_fs_type())
        walk.go()
        left = ground.left_behind()
        print(f"         left behind: {', '.join(left) if left else 'nothing'}")
        return 1 if left else 0
    except (grpc.RpcError, DriverError, OSError) as error:
        print(f"snode demo: failed: {_words(error)}", file=sys.stderr)
        _print_log(ground.folder / "driver.log")
        return 1
    finally:
        ground.close()


def _fs_type() -> str:
    """ext4, unless this process may not grow a mounted one: the growth is part of the walk."""
    if may_grow_mounted_ext4():
        return "ext4"
    print("(with xfs, since root lacks CAP_SYS_RESOURCE here, without which the kernel grows no mounted ext4)")
    return "xfs"


def _headline(ground: Ground) -> str:
    if ground.lvm:
        return "SNODE CSI demo on LVM + tgt + iSCSI, SNODE and CNODE both on this machine:"
    return f"SNODE CSI demo on sparse files + loop devices, since {ground.reason}:"


class Walk:
    """The steps of one volume's life."""

    def __init__(self, ground: Ground, *, fs_type: str) -> None:
        self._ground = ground
        self._fs_type = fs_type
        self._size_bytes, self._grown_bytes = _SIZES[fs_type]
        self._mount_point = ground.folder / "container" / "data"
        self._staging = ground.folder / "staging"
        self._staging.mkdir()
        self._mount_point.parent.mkdir()
        self._driver = self._step("start", self._start, lambda _: f"driver on {ground.endpoint}")

    def go(self) -> None:
        """Walk through all steps; on a failure what was made is unmade as far as it goes."""
        capability = pb.VolumeCapability(
            mount=pb.VolumeCapability.MountVolume(fs_type=self._fs_type),
            access_mode=pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
        )
        node_id = self._call("node", "NodeGetInfo", pb.NodeGetInfoRequest()).node_id
        create = pb.CreateVolumeRequest(
            name="demo",
            capacity_range=pb.CapacityRange(required_bytes=self._size_bytes),
            volume_capabilities=[capability],
        )
        volume_id = self._step(
            "create",
            lambda: self._call("controller", "CreateVolume", create),
            self._volume,
        ).volume.volume_id
        self._ground.on_close(lambda: self._unmake(volume_id, node_id))
        publish = pb.ControllerPublishVolumeRequest(volume_id=volume_id, node_id=node_id, volume_capability=capability)
        context = self._step(
            "publish",
            lambda: self._call("controller", "ControllerPublishVolume", publish),
            self._export,
        ).publish_context
        stage = pb.NodeStageVolumeRequest(
            volume_id=volume_id,
            publish_context=context,
            staging_target_path=str(self._staging),
            volume_capability=capability,
        )
        self._step(
            "stage",
            lambda: self._call("node", "NodeStageVolume", stage),
            lambda _: self._device(),
        )
        bind = pb.NodePublishVolumeRequest(
            volume_id=volume_id,
            publish_context=context,
            staging_target_path=str(self._staging),
            target_path=str(self._mount_point),
            volume_capability=capability,
        )
        self._step(
            "mount",
            lambda: self._call("node", "NodePublishVolume", bind),
            lambda _: f"bind mount {self._mount_point}",
        )
        self._data()
        grow = pb.ControllerExpandVolumeRequest(
            volume_id=volume_id,
            capacity_range=pb.CapacityRange(required_bytes=self._grown_bytes),
        )
        expand = pb.NodeExpandVolumeRequest(
            volume_id=volume_id,
            volume_path=str(self._mount_point),
            capacity_range=grow.capacity_range,
        )
        self._step(
            "grow",
            lambda: self._call("controller", "ControllerExpandVolume", grow),
            lambda r: f"volume of {_mib(r.capacity_bytes)}",
        )
        self._step(
            "grow fs",
            lambda: self._call("node", "NodeExpandVolume", expand),
            lambda _: self._room(),
        )
        self._back(volume_id, node_id)

    def _data(self) -> None:
        content = os.urandom(_CONTENT_BYTES)
        file = self._mount_point / "data"
        self._step(
            "write",
            lambda: _write(file, content),
            lambda _: f"{_mib(_CONTENT_BYTES)} written and synced",
        )

        def read() -> str:
            if file.read_bytes() != content:
                raise DriverError("what was read back differs from what was written")
            return hashlib.sha256(content).hexdigest()

        self._step("read", read, lambda digest: f"the same bytes, sha256 {digest[:16]}…")

    def _back(self, volume_id: str, node_id: str) -> None:
        unbind = pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(self._mount_point))
        unstage = pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=str(self._staging))
        unpublish = pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node_id)
        delete = pb.DeleteVolumeRequest(volume_id=volume_id)
        device = "session and device" if self._ground.lvm else "loop device"
        export = "target" if self._ground.lvm else "publication"
        self._step(
            "unmount",
            lambda: self._call("node", "NodeUnpublishVolume", unbind),
            lambda _: "bind mount gone",
        )
        self._step(
            "unstage",
            lambda: self._call("node", "NodeUnstageVolume", unstage),
            lambda _: f"mount, {device} gone",
        )
        self._step(
            "unpublish",
            lambda: self._call("controller", "ControllerUnpublishVolume", unpublish),
            lambda _: f"{export} gone",
        )
        self._step(
            "delete",
            lambda: self._call("controller", "DeleteVolume", delete),
            lambda _: self._deleted(),
        )

    def _start(self) -> Service:
        ground = self._ground
        argv = [sys.executable, "-m", "csi", "all", "--config", str(ground.config)]
        package = str(Path(__file__).parent.parent)
        service = Service(argv, log=ground.folder / "driver.log", environment={"PYTHONPATH": package})
        ground.on_close(service.stop)
        channel = grpc.insecure_channel(ground.endpoint, options=[("grpc.initial_reconnect_backoff_ms", 50)])
        ground.on_close(channel.close)
        self._stubs = {
            "identity": rpc.IdentityStub(channel),
            "controller": rpc.ControllerStub(channel),
            "node": rpc.NodeStub(channel),
        }

        def ready() -> bool:
            if not service.running:
                raise Unavailable("the driver ended at its start")
            try:
                return bool(self._call("identity", "Probe", pb.ProbeRequest()).ready.value)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return False
                raise

        wait_until(ready, Deadline.after(20), what="the driver to answer")
        return service

    def _call(self, service: str, method: str, request: Any) -> Any:
        return getattr(self._stubs[service], method)(request, timeout=60)

    def _step(self, name: str, action: Callable[[], T], exists: Callable[[T], str]) -> T:
        began = time.monotonic()
        result = action()
        print(f"{time.monotonic() - began:6.3f} s {name:<10}{exists(result)}", flush=True)
        return result

    def _volume(self, response: Any) -> str:
        volume = response.volume
        self._volume_id = volume.volume_id
        where = f"/dev/{self._ground.vg}/{volume.volume_id}" if self._ground.lvm else str(self._file(volume.volume_id))
        if not Path(where).exists():
            raise DriverError(f"{where}: the driver answered, but it is not there")
        return f"{'logical volume' if self._ground.lvm else 'sparse file'} {where} of {_mib(volume.capacity_bytes)}"

    def _file(self, volume_id: str) -> Path:
        return next((self._ground.folder / "pool").glob(f"{volume_id}.img"))

    def _export(self, response: Any) -> str:
        context = response.publish_context
        if "paths" in context:
            path = json.loads(context["paths"])[0]
            return f"target {path['target']} at {path['portal']}"
        return "publication to this node (nothing to export on one machine)"

    def _device(self) -> str:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[4] == str(self._staging):
                source = fields[fields.index("-") + 2]
                kind = "iSCSI session, disk" if self._ground.lvm else "loop device"
                return f"{kind} {source}, {self._fs_type} at {self._staging}"
        raise DriverError(f"{self._staging}: the driver answered, but nothing is mounted there")

    def _room(self) -> str:
        status = os.statvfs(self._mount_point)
        return f"filesystem of {_mib(status.f_blocks * status.f_frsize)}, while mounted"

    def _deleted(self) -> str:
        if self._ground.lvm:
            devices = Path(f"/dev/{self._ground.vg}")
            wait_until(
                lambda: not list(devices.glob("*")),
                Deadline.after(30),
                what="the wipe of the deleted volume",
            )
            return "logical volume gone, its space wiped"
        return "file gone"

    def _unmake(self, volume_id: str, node_id: str) -> None:
        """After a failure: undo in the order of the way back; what is gone already is fine, other errors are told."""
        for service, method, request in (
            (
                "node",
                "NodeUnpublishVolume",
                pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(self._mount_point)),
            ),
            (
                "node",
                "NodeUnstageVolume",
                pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=str(self._staging)),
            ),
            (
                "controller",
                "ControllerUnpublishVolume",
                pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node_id),
            ),
            ("controller", "DeleteVolume", pb.DeleteVolumeRequest(volume_id=volume_id)),
        ):
            try:
                self._call(service, method, request)
            except (grpc.RpcError, DriverError, OSError) as error:
                print(f"  while cleaning up: {method}: {_words(error)}")


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.0f} MiB"


def _words(error: Exception) -> str:
    details = getattr(error, "details", None)
    return f"{error.code().name}: {details()}" if callable(details) and hasattr(error, "code") else str(error)


def _print_log(log: Path) -> None:
    if log.exists():
        print("the driver's last words:", file=sys.stderr)
        for line in log.read_text(errors="replace").splitlines()[-15:]:
            print(f"  {line}", file=sys.stderr)
