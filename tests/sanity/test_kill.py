"""The real process is killed at every step of one volume's life, started again, and the request repeated.

Here with real loop devices, mkfs and mounts; what a client can see must be right, and nothing may be left behind.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from csi.pb import csi_pb2 as pb
from tests.driver import Driver
from tests.leftovers import all_below, loops_below, mounts_below

CONFIG = """
[node]
name = "killed"
[pools.files]
type = "files"
directory = "{folder}/pool"
"""

CAPABILITY = pb.VolumeCapability(
    mount=pb.VolumeCapability.MountVolume(fs_type="ext4"),
    access_mode=pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
)
SIZE_BYTES = 16 << 20


@dataclass
class Life:
    """One volume's life, request by request."""

    driver: Driver
    folder: Path
    volume_id: str = ""
    node_id: str = ""

    def create(self) -> None:
        request = pb.CreateVolumeRequest(
            name="killed",
            capacity_range=pb.CapacityRange(required_bytes=SIZE_BYTES),
            volume_capabilities=[CAPABILITY],
        )
        self.volume_id = self.driver.controller.CreateVolume(request, timeout=20).volume.volume_id

    def publish(self) -> None:
        self.node_id = self.driver.node.NodeGetInfo(pb.NodeGetInfoRequest(), timeout=20).node_id
        self._publish()

    def _publish(self) -> dict[str, str]:
        request = pb.ControllerPublishVolumeRequest(
            volume_id=self.volume_id, node_id=self.node_id, volume_capability=CAPABILITY
        )
        return dict(self.driver.controller.ControllerPublishVolume(request, timeout=20).publish_context)

    def stage(self) -> None:
        request = pb.NodeStageVolumeRequest(
            volume_id=self.volume_id,
            publish_context=self._publish(),
            staging_target_path=str(self.folder / "staging"),
            volume_capability=CAPABILITY,
        )
        self.driver.node.NodeStageVolume(request, timeout=20)

    def mount(self) -> None:
        request = pb.NodePublishVolumeRequest(
            volume_id=self.volume_id,
            staging_target_path=str(self.folder / "staging"),
            target_path=str(self.folder / "target"),
            volume_capability=CAPABILITY,
        )
        self.driver.node.NodePublishVolume(request, timeout=20)
        file = self.folder / "target" / "data"
        if not file.exists():
            with file.open("wb") as out:
                out.write(b"acknowledged")
                out.flush()
                os.fsync(out.fileno())

    def grow(self) -> None:
        assert (self.folder / "target" / "data").read_bytes() == b"acknowledged"
        request = pb.ControllerExpandVolumeRequest(
            volume_id=self.volume_id, capacity_range=pb.CapacityRange(required_bytes=2 * SIZE_BYTES)
        )
        assert self.driver.controller.ControllerExpandVolume(request, timeout=20).capacity_bytes == 2 * SIZE_BYTES

    def unmount(self) -> None:
        request = pb.NodeUnpublishVolumeRequest(volume_id=self.volume_id, target_path=str(self.folder / "target"))
        self.driver.node.NodeUnpublishVolume(request, timeout=20)
        assert not (self.folder / "target").exists()

    def unstage(self) -> None:
        request = pb.NodeUnstageVolumeRequest(
            volume_id=self.volume_id, staging_target_path=str(self.folder / "staging")
        )
        self.driver.node.NodeUnstageVolume(request, timeout=20)
        assert (mounts_below(self.folder), loops_below(self.folder)) == ([], [])

    def unpublish(self) -> None:
        request = pb.ControllerUnpublishVolumeRequest(volume_id=self.volume_id, node_id=self.node_id)
        self.driver.controller.ControllerUnpublishVolume(request, timeout=20)

    def delete(self) -> None:
        self.driver.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=self.volume_id), timeout=20)

    def requests(self) -> list[Callable[[], None]]:
        return [self.create, self.publish, self.stage, self.mount, self.grow, self.unmount, self.unstage,
                self.unpublish, self.delete]  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_kill_9_at_every_step_of_a_volumes_life(tmp_path: Path) -> None:
    """The process is killed at its first step, started and killed at the next one, and so on: each start goes one
    step further than the one before, so that every step of the whole life is a moment of death once."""
    (tmp_path / "staging").mkdir()
    driver = Driver(tmp_path, CONFIG.format(folder=tmp_path))
    life = Life(driver, tmp_path)
    steps = 0
    for request in life.requests():
        step = 0
        while True:
            step += 1
            try:
                driver.start(environment={"SNODE_CRASH_AT": str(step)})
                request()
            except (grpc.RpcError, RuntimeError) as error:
                if isinstance(error, grpc.RpcError) and error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                assert driver.wait() == -9, f"{request.__name__}: {error}\n{driver.log()[-2000:]}"
                steps += 1
                continue
            driver.stop()
            break
    print(f"killed at {steps} steps")
    assert steps > 30
    assert list((tmp_path / "pool").glob("v-*")) == []
    assert all_below(tmp_path) == []
    assert [path.name for path in (tmp_path / "state").rglob("v-*")] == []
