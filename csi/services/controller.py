"""CSI's Controller service, served on a SNODE: translation and validation; the work is in `volumes.py`."""

import logging

from google.protobuf.wrappers_pb2 import Int64Value

from csi.deadline import Deadline
from csi.errors import Invalid
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.method import Calls, method
from csi.services import values
from csi.volumes import Entry, Volumes

_Rpc = pb.ControllerServiceCapability.RPC
CAPABILITIES = (
    _Rpc.CREATE_DELETE_VOLUME,
    _Rpc.PUBLISH_UNPUBLISH_VOLUME,
    _Rpc.LIST_VOLUMES,
    _Rpc.LIST_VOLUMES_PUBLISHED_NODES,
    _Rpc.GET_CAPACITY,
    _Rpc.EXPAND_VOLUME,
    _Rpc.GET_VOLUME,
    _Rpc.PUBLISH_READONLY,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)


class Controller(csi_pb2_grpc.ControllerServicer):
    """The Controller servicer. RPCs that are not here are UNIMPLEMENTED by the generated base class."""

    def __init__(self, *, calls: Calls, volumes: Volumes) -> None:
        self.calls = calls
        self._volumes = volumes

    @method()
    def CreateVolume(self, request: pb.CreateVolumeRequest, deadline: Deadline) -> pb.CreateVolumeResponse:
        """CSI spec, CreateVolume."""
        values.require(request, "name", "volume_capabilities")
        values.check_sizes(request)
        values.check_name(request.name)
        if request.HasField("volume_content_source"):
            raise Invalid("volume_content_source: volumes from snapshots or other volumes are not supported")
        _refuse_mutable(request.mutable_parameters)
        required, limit = values.sizes(request.capacity_range)
        volume = self._volumes.create(
            name=request.name,
            required_bytes=required,
            limit_bytes=limit,
            capabilities=values.capabilities(request.volume_capabilities),
            parameters=values.parameters(request.parameters),
            requisite=values.requisite(request.accessibility_requirements),
            deadline=deadline,
        )
        return pb.CreateVolumeResponse(volume=values.volume_message(volume, self._volumes.topology_of(volume)))

    @method()
    def DeleteVolume(self, request: pb.DeleteVolumeRequest, deadline: Deadline) -> pb.DeleteVolumeResponse:
        """CSI spec, DeleteVolume: a volume that can't exist is deleted already."""
        values.require(request, "volume_id")
        values.check_sizes(request)
        if values.is_volume_id(request.volume_id):
            self._volumes.delete(request.volume_id, deadline)
        return pb.DeleteVolumeResponse()

    @method()
    def ControllerPublishVolume(
        self, request: pb.ControllerPublishVolumeRequest, deadline: Deadline
    ) -> pb.ControllerPublishVolumeResponse:
        """CSI spec, ControllerPublishVolume."""
        values.require(request, "volume_id", "node_id", "volume_capability")
        values.check_sizes(request)
        capability = values.capability(request.volume_capability)
        context = self._volumes.publish(
            values.known_id(request.volume_id),
            node_id=values.known_node(request.node_id),
            capability=capability,
            readonly=request.readonly,
            deadline=deadline,
        )
        return pb.ControllerPublishVolumeResponse(publish_context=context)

    @method()
    def ControllerUnpublishVolume(
        self, request: pb.ControllerUnpublishVolumeRequest, deadline: Deadline
    ) -> pb.ControllerUnpublishVolumeResponse:
        """CSI spec, ControllerUnpublishVolume: an empty node_id means all nodes; what can't be published is OK."""
        values.require(request, "volume_id")
        values.check_sizes(request)
        if values.is_volume_id(request.volume_id):
            self._volumes.unpublish(request.volume_id, node_id=request.node_id, deadline=deadline)
        return pb.ControllerUnpublishVolumeResponse()

    @method()
    def ValidateVolumeCapabilities(
        self, request: pb.ValidateVolumeCapabilitiesRequest, deadline: Deadline
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        """CSI spec, ValidateVolumeCapabilities: what is well formed but can't be done is a message, not an error."""
        values.require(request, "volume_id", "volume_capabilities")
        values.check_sizes(request)
        for at, message in enumerate(request.volume_capabilities):
            values.check_capability(message, field=f"volume_capabilities[{at}]")
        volume_id = values.known_id(request.volume_id)
        try:
            _refuse_mutable(request.mutable_parameters)
            capabilities = values.capabilities(request.volume_capabilities)
            parameters = values.parameters(request.parameters)
        except Invalid as unsupported:
            self._volumes.get(volume_id, deadline)  # a missing volume is NOT_FOUND before anything else
            return pb.ValidateVolumeCapabilitiesResponse(message=str(unsupported))
        reason = self._volumes.validate(volume_id, capabilities=capabilities, parameters=parameters, deadline=deadline)
        if reason:
            return pb.ValidateVolumeCapabilitiesResponse(message=reason)
        return pb.ValidateVolumeCapabilitiesResponse(
            confirmed=pb.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    @method()
    def ListVolumes(self, request: pb.ListVolumesRequest, deadline: Deadline) -> pb.ListVolumesResponse:
        """CSI spec, ListVolumes."""
        if request.max_entries < 0:
            raise Invalid(f"max_entries: {request.max_entries} is negative")
        page = self._volumes.list_volumes(
            starting_token=request.starting_token, max_entries=request.max_entries, deadline=deadline
        )
        entries = [
            pb.ListVolumesResponse.Entry(
                volume=self._message(entry),
                status=pb.ListVolumesResponse.VolumeStatus(published_node_ids=entry.node_ids),
            )
            for entry in page.entries
        ]
        return pb.ListVolumesResponse(entries=entries, next_token=page.next_token)

    # Kubernetes asks for each StorageClass and node, every minute.
    @method(level=logging.DEBUG)
    def GetCapacity(self, request: pb.GetCapacityRequest, deadline: Deadline) -> pb.GetCapacityResponse:
        """CSI spec, GetCapacity."""
        values.check_sizes(request)
        capacity = self._volumes.capacity(
            parameters=values.parameters(request.parameters),
            topology=dict(request.accessible_topology.segments),
            capabilities=values.capabilities(request.volume_capabilities),
            deadline=deadline,
        )
        return pb.GetCapacityResponse(
            available_capacity=capacity.available_bytes,
            maximum_volume_size=Int64Value(value=capacity.maximum_volume_bytes),
            minimum_volume_size=Int64Value(value=capacity.minimum_volume_bytes),
        )

    @method(slot=False, level=logging.DEBUG)
    def ControllerGetCapabilities(
        self, request: pb.ControllerGetCapabilitiesRequest, deadline: Deadline
    ) -> pb.ControllerGetCapabilitiesResponse:
        """CSI spec, ControllerGetCapabilities."""
        return pb.ControllerGetCapabilitiesResponse(
            capabilities=[pb.ControllerServiceCapability(rpc=_Rpc(type=kind)) for kind in CAPABILITIES]
        )

    @method()
    def ControllerGetVolume(
        self, request: pb.ControllerGetVolumeRequest, deadline: Deadline
    ) -> pb.ControllerGetVolumeResponse:
        """CSI spec, ControllerGetVolume."""
        values.require(request, "volume_id")
        entry = self._volumes.get(values.known_id(request.volume_id), deadline)
        return pb.ControllerGetVolumeResponse(
            volume=self._message(entry),
            status=pb.ControllerGetVolumeResponse.VolumeStatus(published_node_ids=entry.node_ids),
        )

    @method()
    def ControllerExpandVolume(
        self, request: pb.ControllerExpandVolumeRequest, deadline: Deadline
    ) -> pb.ControllerExpandVolumeResponse:
        """CSI spec, ControllerExpandVolume. The node always has a part: even a raw device must be rescanned there."""
        values.require(request, "volume_id", "capacity_range")
        values.check_sizes(request)
        required, limit = values.sizes(request.capacity_range)
        if not required and not limit:
            raise Invalid("capacity_range: required_bytes or limit_bytes must be set")
        if request.HasField("volume_capability"):
            values.capability(request.volume_capability)
        size_bytes = self._volumes.expand(
            values.known_id(request.volume_id), required_bytes=required, limit_bytes=limit, deadline=deadline
        )
        return pb.ControllerExpandVolumeResponse(capacity_bytes=size_bytes, node_expansion_required=True)

    def _message(self, entry: Entry) -> pb.Volume:
        return values.volume_message(entry.volume, self._volumes.topology_of(entry.volume))


def _refuse_mutable(parameters: object) -> None:
    if parameters:
        raise Invalid("mutable_parameters: not supported (no MODIFY_VOLUME capability)")
