"""proto/csi.proto says the same as the published CSI v1.13.0, in all that goes over the wire."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from csi.pb import csi_pb2
from tests.contract.facts import NAMED, differences, facts_of

# The first run builds a Go program.
pytestmark = pytest.mark.timeout(900)

# A descriptor of any kind: file, message, field, enum, value, service, method.
Part = Any


def test_same_as_published(ours: FileDescriptorProto, published: FileDescriptorProto) -> None:
    found = differences(ours, published)
    if found:
        pytest.fail("proto/csi.proto is not CSI v1.13.0:\n  " + "\n  ".join(found), pytrace=False)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("csi.v1: package", "csi.v1"),
        ("csi.v1.Volume.volume_id: number", "2"),
        ("csi.v1.Volume.volume_id: json_name", "volumeId"),
        ("csi.v1.VolumeCapability.block: oneof", "access_type"),
        ("csi.v1.CreateVolumeRequest.secrets: option (csi.v1.csi_secret)", "True"),
        ("csi.v1.CreateVolumeRequest.SecretsEntry: option map_entry", "True"),
        ("csi.v1.SnapshotMetadata: option (csi.v1.alpha_service)", "True"),
        ("csi.v1.SnapshotMetadata.GetMetadataDelta: server_streaming", "True"),
        ("csi.v1.ControllerServiceCapability.RPC.Type: reserved_range", "start: 11 end: 11"),
        ("csi.v1.csi_secret: number", "1059"),
    ],
)
def test_published_is_read_whole(published: FileDescriptorProto, fact: str, value: str) -> None:
    """One fact of each kind, so that an empty or half-read descriptor can't pass as equal."""
    assert facts_of(published).get(fact) == value


def _set(**values: Any) -> Callable[[Part], None]:
    def change(part: Part) -> None:
        for name, value in values.items():
            setattr(part, name, value)

    return change


def _drop_last(parts: str) -> Callable[[Part], None]:
    return lambda part: getattr(part, parts).pop()


def _drop_secret_mark(field: Part) -> None:
    field.options.ClearExtension(csi_pb2.csi_secret)


def _mark_alpha(method: Part) -> None:
    method.options.Extensions[csi_pb2.alpha_method] = True


@pytest.mark.parametrize(
    ("full_name", "change", "report"),
    [
        ("csi.v1", _set(package="csi.v2"), "csi.v1.Volume: kind is absent"),
        ("csi.v1", _drop_last("message_type"), "csi.v1.GetMetadataDeltaResponse.block_metadata: number is absent"),
        ("csi.v1", _drop_last("dependency"), "csi.v1: dependency is google/protobuf/descriptor.proto"),
        ("csi.v1.Volume.volume_id", _set(number=9), "csi.v1.Volume.volume_id: number is 9, published is 2"),
        (
            "csi.v1.Volume.volume_id",
            _set(type=FieldDescriptorProto.TYPE_BYTES),
            "csi.v1.Volume.volume_id: type is 12, published is 9",
        ),
        (
            "csi.v1.Volume.volume_id",
            _set(label=FieldDescriptorProto.LABEL_REPEATED),
            "csi.v1.Volume.volume_id: label is 3, published is 1",
        ),
        ("csi.v1.Volume.volume_id", _set(name="id"), "csi.v1.Volume.id: number is 2, published is absent"),
        ("csi.v1.Volume.volume_id", _set(json_name="id"), "csi.v1.Volume.volume_id: json_name is id"),
        (
            "csi.v1.Volume.volume_id",
            _set(proto3_optional=True),
            "csi.v1.Volume.volume_id: proto3_optional is True, published is absent",
        ),
        (
            "csi.v1.CreateVolumeResponse.volume",
            _set(type_name=".csi.v1.Snapshot"),
            "csi.v1.CreateVolumeResponse.volume: type_name is .csi.v1.Snapshot, published is .csi.v1.Volume",
        ),
        (
            "csi.v1.VolumeCapability.block",
            lambda field: field.ClearField("oneof_index"),
            "csi.v1.VolumeCapability.block: oneof is absent, published is access_type",
        ),
        (
            "csi.v1.NodeStageVolumeRequest.secrets",
            _drop_secret_mark,
            "csi.v1.NodeStageVolumeRequest.secrets: option (csi.v1.csi_secret) is absent, published is True",
        ),
        (
            "csi.v1.ListVolumesResponse.VolumeStatus",
            _drop_last("reserved_range"),
            "csi.v1.ListVolumesResponse.VolumeStatus: reserved_range is absent, published is start: 2 end: 3",
        ),
        (
            "csi.v1.Volume",
            lambda message: message.reserved_name.append("old"),
            "csi.v1.Volume: reserved_name is old, published is absent",
        ),
        ("csi.v1.VolumeUsage.Unit", _drop_last("value"), "csi.v1.VolumeUsage.Unit.INODES: number is absent"),
        ("csi.v1.VolumeUsage.Unit.INODES", _set(number=3), "csi.v1.VolumeUsage.Unit.INODES: number is 3"),
        ("csi.v1.Node", _drop_last("method"), "csi.v1.Node.NodeGetInfo: input_type is absent"),
        (
            "csi.v1.Node.NodeGetInfo",
            _set(output_type=".csi.v1.Volume"),
            "csi.v1.Node.NodeGetInfo: output_type is .csi.v1.Volume",
        ),
        (
            "csi.v1.Node.NodeGetInfo",
            _set(client_streaming=True),
            "csi.v1.Node.NodeGetInfo: client_streaming is True, published is absent",
        ),
        (
            "csi.v1.Node.NodeGetInfo",
            _mark_alpha,
            "csi.v1.Node.NodeGetInfo: option (csi.v1.alpha_method) is True, published is absent",
        ),
        ("csi.v1.csi_secret", _set(number=1061), "csi.v1.csi_secret: number is 1061, published is 1059"),
        ("csi.v1.csi_secret", _set(extendee=".google.protobuf.EnumOptions"), "csi.v1.csi_secret: extendee is"),
    ],
)
def test_a_change_is_reported(
    ours: FileDescriptorProto,
    published: FileDescriptorProto,
    full_name: str,
    change: Callable[[Part], None],
    report: str,
) -> None:
    """The comparison above can fail: each kind of change is seen, and called by its full name."""
    change(_part(ours, full_name))
    found = differences(ours, published)
    assert any(line.startswith(report) for line in found), found


def test_an_unknown_option_is_reported(ours: FileDescriptorProto) -> None:
    """An option that no loaded extension explains, as a newer specification would have it."""
    newer = _copy(ours)
    _part(newer, "csi.v1.Volume").options.MergeFromString(b"\xb0\x42\x01")  # field 1062, varint 1
    assert differences(ours, newer) == ["csi.v1.Volume: option number 1062 is absent, published is 1"]


def test_order_is_not_reported(ours: FileDescriptorProto) -> None:
    """The order of declarations is no part of the contract."""
    reordered = _copy(ours)
    reordered.message_type.sort(key=lambda message: message.name)
    capability = _part(reordered, "csi.v1.PluginCapability")
    capability.field.sort(key=lambda field: -field.number)
    assert reordered != ours
    assert differences(reordered, ours) == []


def _copy(file: FileDescriptorProto) -> FileDescriptorProto:
    return FileDescriptorProto.FromString(file.SerializeToString())


def _part(file: FileDescriptorProto, full_name: str) -> Part:
    part: Part = file
    for name in full_name.removeprefix("csi.v1").split(".")[1:]:
        part = next(child for kind in NAMED for child in getattr(part, kind, ()) if child.name == name)
    return part
