from typing import Any

import grpc
import pytest

from csi.model import volume_id_of
from csi.pb import csi_pb2 as pb
from tests.rpc.service import Driver, block, create, mount
from tests.rpc.use_cases import NODE_ID

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ID = volume_id_of("one")
FOREIGN_IDS = ["../../x", "vg/lv", "-x", "v-" + "A" * 26, "x" * 4096, "v-" + "a" * 26 + "\0", "vol-ü", "v-" + "a" * 27]


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_advertises_what_it_serves(driver: Driver) -> None:
    rpc = pb.ControllerServiceCapability.RPC
    capabilities = driver.ok(pb.ControllerGetCapabilitiesRequest()).capabilities
    assert {rpc.Type.Name(c.rpc.type) for c in capabilities} == {
        "CREATE_DELETE_VOLUME",
        "PUBLISH_UNPUBLISH_VOLUME",
        "LIST_VOLUMES",
        "LIST_VOLUMES_PUBLISHED_NODES",
        "GET_CAPACITY",
        "EXPAND_VOLUME",
        "GET_VOLUME",
        "PUBLISH_READONLY",
        "SINGLE_NODE_MULTI_WRITER",
    }


@pytest.mark.parametrize(
    "request_",
    [
        pb.CreateSnapshotRequest(name="s", source_volume_id=ID),
        pb.ListSnapshotsRequest(),
        pb.ControllerModifyVolumeRequest(volume_id=ID),
        pb.ControllerGetVolumeHealthRequest(volume_id=ID),
        pb.NodeGetStorageHealthRequest(),
    ],
    ids=lambda request: type(request).__name__,
)
def test_the_rest_is_unimplemented(request_: Any) -> None:
    # grpc's test server passes the base class's NotImplementedError on; the real one answers UNIMPLEMENTED.
    with pytest.raises(NotImplementedError):
        raise _error_of(Driver(), request_)


def _error_of(driver: Driver, request: Any) -> BaseException:
    from csi.services.controller import Controller
    from csi.services.node import Node

    class Context:
        def set_code(self, code: object) -> None:
            assert code is grpc.StatusCode.UNIMPLEMENTED

        def set_details(self, details: object) -> None:
            assert details

    name = type(request).__name__.removesuffix("Request")
    servicer: Any = Node if name.startswith("Node") else Controller
    try:
        getattr(servicer, name)(object(), request, Context())
    except NotImplementedError as error:
        return error
    raise AssertionError(f"{name} is implemented")


# -- create ----------------------------------------------------------------------------------------------------------


def test_create_answers_with_the_volume(driver: Driver) -> None:
    volume = driver.ok(
        create("one", capacity_range=pb.CapacityRange(required_bytes=5), parameters={"pool": "fast"})
    ).volume
    assert (volume.volume_id, volume.capacity_bytes) == (ID, 5)
    assert dict(volume.volume_context) == {"name": "one", "pool": "fast"}
    assert not volume.accessible_topology


def test_create_tells_where_a_local_volume_is(driver: Driver) -> None:
    driver.volumes.local_to = "node-a"
    volume = driver.ok(create()).volume
    assert [dict(t.segments) for t in volume.accessible_topology] == [{"topology.csi.snode.io/node": "node-a"}]


def test_parameters_of_the_provisioner_are_accepted_and_not_kept(driver: Driver) -> None:
    driver.ok(create(parameters={"pool": "fast", "csi.storage.k8s.io/pvc/name": "claim"}))
    assert driver.volumes.volumes[ID].parameters == {"pool": "fast"}


@pytest.mark.parametrize("name", ["x" * 128, "ü" * 64, "tab\tand\nnewline", "🚲", "../../etc", "a b"])
def test_any_name_of_the_specification_is_accepted(driver: Driver, name: str) -> None:
    assert driver.ok(create(name)).volume.volume_id == volume_id_of(name)


_MANY = {f"key-{at}": "v" * 100 for at in range(50)}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.CreateVolumeRequest(volume_capabilities=[mount()]), ["name: required"]),
        (pb.CreateVolumeRequest(name="one"), ["volume_capabilities: required"]),
        (create("x" * 129), ["name: 129 bytes"]),
        (create("ü" * 65), ["name: 130 bytes"]),
        (create("nul\0"), ["name: has the control character U+0000"]),
        (create("del\x7f"), ["name", "U+007F"]),
        (create("c1\u0085"), ["name", "U+0085"]),
        (create(volume_capabilities=[pb.VolumeCapability()]), ["volume_capabilities[0].access_type: required"]),
        (
            create(volume_capabilities=[pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume())]),
            ["volume_capabilities[0].access_mode: required"],
        ),
        (
            create(volume_capabilities=[mount(), pb.VolumeCapability(access_mode=mount().access_mode)]),
            ["volume_capabilities[1].access_type"],
        ),
        (create(volume_capabilities=[mount(fs_type="ntfs")]), ["mount.fs_type 'ntfs'", "ext4, xfs, btrfs"]),
        (create(volume_capabilities=[mount(fs_type="../mkfs")]), ["mount.fs_type"]),
        (create(volume_capabilities=[mount(fs_type="ext4 -E x")]), ["mount.fs_type"]),
        (create(volume_capabilities=[mount(flags=("bind",))]), ["mount.mount_flags", "bind"]),
        (create(volume_capabilities=[mount(flags=("noatime,suid",))]), ["mount.mount_flags"]),
        (create(volume_capabilities=[mount(flags=("noatime",) * 700)]), ["mount_flags: 4900 bytes in all"]),
        (create(volume_capabilities=[mount(group="1000")]), ["mount.volume_mount_group"]),
        (create(parameters={"pol": "fast"}), ["parameters: 'pol' is unknown", "pool"]),
        (create(parameters={"pool": "x" * 5000}), ["parameters: 5004 bytes in all; at most 4096"]),
        (create(secrets=_MANY), ["secrets:", "bytes in all"]),
        (create(mutable_parameters={"iops": "1"}), ["mutable_parameters: not supported"]),
        (
            create(
                volume_content_source=pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=ID))
            ),
            ["volume_content_source"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_create_refuses_and_names_the_field(driver: Driver, request_: Any, words: list[str]) -> None:
    driver.fails(request_, INVALID, *words)
    assert not driver.volumes.volumes


def test_an_access_mode_of_a_later_specification_is_refused(driver: Driver) -> None:
    capability = mount()
    capability.access_mode.mode = 99  # type: ignore[assignment]
    driver.fails(create(volume_capabilities=[capability]), INVALID, "volume_capabilities[0].access_mode: 99")


@pytest.mark.parametrize(
    ("required", "limit", "word"),
    [
        (-1, 0, "required_bytes: -1 is negative"),
        (0, -5, "limit_bytes: -5 is negative"),
        (10, 9, "limit_bytes: 9 is less than required_bytes 10"),
        (-(1 << 63), -(1 << 63), "negative"),
    ],
)
def test_impossible_sizes_are_out_of_range(driver: Driver, required: int, limit: int, word: str) -> None:
    sizes = pb.CapacityRange(required_bytes=required, limit_bytes=limit)
    driver.fails(create(capacity_range=sizes), grpc.StatusCode.OUT_OF_RANGE, word)
    expand = pb.ControllerExpandVolumeRequest(volume_id=ID, capacity_range=sizes)
    driver.fails(expand, grpc.StatusCode.OUT_OF_RANGE, word)


def test_preferred_topologies_come_first(driver: Driver) -> None:
    from csi.services.values import requisite

    def at(zone: str) -> pb.Topology:
        return pb.Topology(segments={"zone": zone})

    message = pb.TopologyRequirement(requisite=[at("a"), at("b"), at("c")], preferred=[at("c"), at("x")])
    assert [segments["zone"] for segments in requisite(message)] == ["c", "a", "b"]
    assert requisite(pb.TopologyRequirement(preferred=[at("c")])) == []


# -- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume_id", FOREIGN_IDS)
def test_a_foreign_id_names_no_volume(driver: Driver, volume_id: str) -> None:
    driver.ok(pb.DeleteVolumeRequest(volume_id=volume_id))
    driver.ok(pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=NODE_ID))
    for request in (
        pb.ControllerGetVolumeRequest(volume_id=volume_id),
        pb.ControllerPublishVolumeRequest(volume_id=volume_id, node_id=NODE_ID, volume_capability=mount()),
        pb.ValidateVolumeCapabilitiesRequest(volume_id=volume_id, volume_capabilities=[mount()]),
        pb.ControllerExpandVolumeRequest(volume_id=volume_id, capacity_range=pb.CapacityRange(required_bytes=1)),
    ):
        driver.fails(request, NOT_FOUND, "volume_id")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.DeleteVolumeRequest(), "volume_id"),
        (pb.ControllerPublishVolumeRequest(), "volume_id"),
        (pb.ControllerPublishVolumeRequest(volume_id="x"), "node_id"),
        (pb.ControllerPublishVolumeRequest(volume_id="x", node_id="y"), "volume_capability"),
        (pb.ControllerUnpublishVolumeRequest(), "volume_id"),
        (pb.ValidateVolumeCapabilitiesRequest(), "volume_id"),
        (pb.ValidateVolumeCapabilitiesRequest(volume_id="x"), "volume_capabilities"),
        (pb.ControllerGetVolumeRequest(), "volume_id"),
        (pb.ControllerExpandVolumeRequest(), "volume_id"),
        (pb.ControllerExpandVolumeRequest(volume_id="x"), "capacity_range"),
        (pb.ControllerExpandVolumeRequest(volume_id="x", capacity_range=pb.CapacityRange()), "capacity_range"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_missing_field_is_named_whatever_else_is_wrong(driver: Driver, request_: Any, field: str) -> None:
    assert driver.fails(request_, INVALID).startswith(field)


# -- publish ---------------------------------------------------------------------------------------------------------


def _publish(**fields: Any) -> pb.ControllerPublishVolumeRequest:
    fields = {"volume_id": ID, "node_id": NODE_ID, "volume_capability": mount(), **fields}
    return pb.ControllerPublishVolumeRequest(**fields)


def test_publish_returns_the_context_and_list_shows_the_node(driver: Driver) -> None:
    driver.ok(create())
    assert dict(driver.ok(_publish(readonly=True)).publish_context) == {"format": "1", "sealed": "a-sealed-secret"}
    (entry,) = driver.ok(pb.ListVolumesRequest()).entries
    assert list(entry.status.published_node_ids) == [NODE_ID]
    assert list(driver.ok(pb.ControllerGetVolumeRequest(volume_id=ID)).status.published_node_ids) == [NODE_ID]
    driver.fails(pb.DeleteVolumeRequest(volume_id=ID), grpc.StatusCode.FAILED_PRECONDITION)
    driver.ok(pb.ControllerUnpublishVolumeRequest(volume_id=ID))
    driver.ok(pb.DeleteVolumeRequest(volume_id=ID))
    assert not driver.volumes.volumes


@pytest.mark.parametrize("node_id", ["some-node", "2;node-a;;", "1;UPPER;;", "x" * 300])
def test_a_foreign_node_does_not_exist(driver: Driver, node_id: str) -> None:
    driver.ok(create())
    driver.fails(_publish(node_id=node_id), NOT_FOUND, "node_id")
    driver.ok(pb.ControllerUnpublishVolumeRequest(volume_id=ID, node_id=node_id))


# -- validate, list, capacity, expand --------------------------------------------------------------------------------


def _validate(**fields: Any) -> pb.ValidateVolumeCapabilitiesRequest:
    fields = {"volume_id": ID, "volume_capabilities": [mount(), block()], **fields}
    return pb.ValidateVolumeCapabilitiesRequest(**fields)


def test_validate_confirms_with_what_was_asked(driver: Driver) -> None:
    driver.ok(create())
    request = _validate(parameters={"pool": "fast"}, volume_context={"name": "one"})
    confirmed = driver.ok(request).confirmed
    assert list(confirmed.volume_capabilities) == list(request.volume_capabilities)
    assert dict(confirmed.parameters) == {"pool": "fast"}
    assert dict(confirmed.volume_context) == {"name": "one"}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"parameters": {"pool": "slow"}}, "another pool"),
        ({"parameters": {"speed": "9"}}, "speed"),
        ({"mutable_parameters": {"iops": "9"}}, "mutable_parameters"),
        ({"volume_capabilities": [mount(fs_type="ntfs")]}, "ntfs"),
        ({"volume_capabilities": [mount(flags=("loop",))]}, "loop"),
    ],
)
def test_what_can_not_be_done_is_a_message_and_no_error(driver: Driver, fields: dict[str, Any], word: str) -> None:
    driver.ok(create())
    response = driver.ok(_validate(**fields))
    assert not response.HasField("confirmed")
    assert word in response.message
    driver.ok(pb.DeleteVolumeRequest(volume_id=ID))
    driver.fails(_validate(**fields), NOT_FOUND)


def test_list_pages_through_all_volumes(driver: Driver) -> None:
    ids = sorted(driver.ok(create(f"volume-{at}")).volume.volume_id for at in range(5))
    seen, token = [], ""
    while True:
        page = driver.ok(pb.ListVolumesRequest(max_entries=2, starting_token=token))
        seen += [entry.volume.volume_id for entry in page.entries]
        token = page.next_token
        if not token:
            break
    assert seen == ids
    assert len(driver.ok(pb.ListVolumesRequest()).entries) == 5


def test_list_refuses_bad_pages(driver: Driver) -> None:
    driver.fails(pb.ListVolumesRequest(max_entries=-1), INVALID, "max_entries")
    driver.fails(pb.ListVolumesRequest(starting_token="nonsense"), grpc.StatusCode.ABORTED, "starting_token")
    driver.fails(pb.ListVolumesRequest(starting_token="x" * 9000), grpc.StatusCode.ABORTED, "starting_token")


def test_capacity(driver: Driver) -> None:
    response = driver.ok(pb.GetCapacityRequest(parameters={"pool": "fast"}, volume_capabilities=[mount()]))
    assert response.available_capacity == 100
    assert (response.maximum_volume_size.value, response.minimum_volume_size.value) == (50, 1)
    driver.fails(pb.GetCapacityRequest(parameters={"x": "y"}), INVALID, "parameters")


def test_expand_grows_and_leaves_a_part_to_the_node(driver: Driver) -> None:
    driver.ok(create(capacity_range=pb.CapacityRange(required_bytes=5)))
    for capability in (mount(), block()):
        response = driver.ok(
            pb.ControllerExpandVolumeRequest(
                volume_id=ID, capacity_range=pb.CapacityRange(required_bytes=9), volume_capability=capability
            )
        )
        assert (response.capacity_bytes, response.node_expansion_required) == (9, True)
