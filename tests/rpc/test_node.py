from pathlib import Path
from typing import Any

import grpc
import pytest

from csi.model import Complaint, volume_id_of
from csi.pb import csi_pb2 as pb
from tests.rpc.service import Driver, block, mount
from tests.rpc.test_controller import FOREIGN_IDS
from tests.rpc.use_cases import NODE_ID

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ID = volume_id_of("one")
STAGING, TARGET = "/staging/one", "/target/one"


@pytest.fixture
def driver() -> Driver:
    return Driver()


def _stage(**fields: Any) -> pb.NodeStageVolumeRequest:
    defaults = {
        "volume_id": ID,
        "staging_target_path": STAGING,
        "volume_capability": mount(),
        "publish_context": {"format": "1"},
    }
    return pb.NodeStageVolumeRequest(**{**defaults, **fields})


def _publish(**fields: Any) -> pb.NodePublishVolumeRequest:
    defaults = {
        "volume_id": ID,
        "staging_target_path": STAGING,
        "target_path": TARGET,
        "volume_capability": mount(),
    }
    return pb.NodePublishVolumeRequest(**{**defaults, **fields})


def test_advertises_what_it_serves(driver: Driver) -> None:
    rpc = pb.NodeServiceCapability.RPC
    capabilities = driver.ok(pb.NodeGetCapabilitiesRequest()).capabilities
    assert {rpc.Type.Name(c.rpc.type) for c in capabilities} == {
        "STAGE_UNSTAGE_VOLUME",
        "GET_VOLUME_STATS",
        "EXPAND_VOLUME",
        "GET_VOLUME_HEALTH",
        "SINGLE_NODE_MULTI_WRITER",
    }


def test_info(driver: Driver) -> None:
    info = driver.ok(pb.NodeGetInfoRequest())
    assert (info.node_id, info.max_volumes_per_node) == (NODE_ID, 7)
    assert dict(info.accessible_topology.segments) == {"topology.csi.snode.io/node": "node-a"}


def test_the_way_of_a_volume_and_back(driver: Driver) -> None:
    driver.ok(_stage())
    driver.ok(_publish(readonly=True))
    assert driver.staging.contexts == [{"format": "1"}]
    assert driver.staging.targets == {Path(TARGET): (ID, True)}
    usage = driver.ok(pb.NodeGetVolumeStatsRequest(volume_id=ID, volume_path=TARGET)).usage
    assert [(u.unit, u.available, u.total, u.used) for u in usage] == [
        (pb.VolumeUsage.BYTES, 1, 3, 2),
        (pb.VolumeUsage.INODES, 10, 30, 20),
    ]
    expand = pb.NodeExpandVolumeRequest(
        volume_id=ID, volume_path=TARGET, capacity_range=pb.CapacityRange(required_bytes=9)
    )
    assert driver.ok(expand).capacity_bytes == 9
    expand.volume_capability.CopyFrom(block())
    driver.ok(expand)
    assert driver.staging.blocks == [None, True]
    driver.ok(pb.NodeUnpublishVolumeRequest(volume_id=ID, target_path=TARGET))
    driver.ok(pb.NodeUnstageVolumeRequest(volume_id=ID, staging_target_path=STAGING))
    assert not driver.staging.staged
    assert not driver.staging.targets


def test_health_tells_what_is_wrong(driver: Driver) -> None:
    request = pb.NodeGetVolumeHealthRequest(volume_id=ID, volume_publish_path=TARGET, staging_target_path=STAGING)
    driver.fails(request, NOT_FOUND)
    driver.ok(_stage())
    assert driver.ok(request).volume_health == pb.VolumeHealth(volume_id=ID)
    driver.staging.trouble = [Complaint("SessionLost", "the session is lost")]
    (entry,) = driver.ok(request).volume_health.health_statuses
    assert (entry.status, entry.reason, entry.message) == (pb.INACCESSIBLE, "SessionLost", "the session is lost")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.NodeStageVolumeRequest(), "volume_id"),
        (pb.NodeStageVolumeRequest(volume_id="x"), "staging_target_path"),
        (pb.NodeStageVolumeRequest(volume_id="x", staging_target_path="y"), "volume_capability"),
        (pb.NodeUnstageVolumeRequest(), "volume_id"),
        (pb.NodeUnstageVolumeRequest(volume_id="x"), "staging_target_path"),
        (pb.NodePublishVolumeRequest(), "volume_id"),
        (pb.NodePublishVolumeRequest(volume_id="x"), "target_path"),
        (pb.NodePublishVolumeRequest(volume_id="x", target_path="y"), "volume_capability"),
        (pb.NodeUnpublishVolumeRequest(), "volume_id"),
        (pb.NodeUnpublishVolumeRequest(volume_id="x"), "target_path"),
        (pb.NodeGetVolumeStatsRequest(), "volume_id"),
        (pb.NodeGetVolumeStatsRequest(volume_id="x"), "volume_path"),
        (pb.NodeGetVolumeHealthRequest(), "volume_id"),
        (pb.NodeExpandVolumeRequest(), "volume_id"),
        (pb.NodeExpandVolumeRequest(volume_id="x"), "volume_path"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_missing_field_is_named_whatever_else_is_wrong(driver: Driver, request_: Any, field: str) -> None:
    assert driver.fails(request_, INVALID).startswith(field)


def test_publish_without_a_staging_path_is_a_precondition(driver: Driver) -> None:
    driver.fails(_publish(staging_target_path=""), grpc.StatusCode.FAILED_PRECONDITION, "staging_target_path")


@pytest.mark.parametrize("path", ["relative/path", "/nul\0byte", "/" + "x" * 4096])
def test_an_unusable_path_is_refused_and_named(driver: Driver, path: str) -> None:
    driver.fails(_stage(staging_target_path=path), INVALID, "staging_target_path")
    driver.fails(_publish(target_path=path), INVALID, "target_path")
    driver.fails(pb.NodeUnpublishVolumeRequest(volume_id=ID, target_path=path), INVALID, "target_path")
    driver.fails(pb.NodeUnstageVolumeRequest(volume_id=ID, staging_target_path=path), INVALID, "staging_target_path")


def test_no_volume_is_at_a_relative_path(driver: Driver) -> None:
    driver.fails(pb.NodeGetVolumeStatsRequest(volume_id=ID, volume_path="some/path"), NOT_FOUND, "volume_path")
    driver.fails(pb.NodeExpandVolumeRequest(volume_id=ID, volume_path="some/path"), NOT_FOUND, "volume_path")


@pytest.mark.parametrize("volume_id", FOREIGN_IDS)
def test_a_foreign_id_names_no_volume(driver: Driver, volume_id: str) -> None:
    for request in (
        _stage(volume_id=volume_id),
        _publish(volume_id=volume_id),
        pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=STAGING),
        pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=TARGET),
        pb.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=TARGET),
        pb.NodeGetVolumeHealthRequest(volume_id=volume_id),
        pb.NodeExpandVolumeRequest(volume_id=volume_id, volume_path=TARGET),
    ):
        driver.fails(request, NOT_FOUND, "volume_id")
    assert not driver.staging.staged


def test_tokens_in_the_volume_context_may_be_long(driver: Driver) -> None:
    driver.ok(_stage(volume_context={"csi.storage.k8s.io/serviceAccount.tokens": "t" * 20_000}))
    driver.fails(_stage(publish_context={"sealed": "x" * 5000}), INVALID, "publish_context")


@pytest.mark.parametrize("capability", [mount(fs_type="zfs"), mount(flags=("remount",)), mount(flags=("x,suid",))])
def test_a_bad_capability_is_refused(driver: Driver, capability: pb.VolumeCapability) -> None:
    driver.fails(_stage(volume_capability=capability), INVALID, "volume_capability.mount")
    driver.fails(_publish(volume_capability=capability), INVALID, "volume_capability.mount")
