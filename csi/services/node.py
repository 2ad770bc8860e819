"""CSI's Node service, served on a CNODE: translation and validation; the work is in `staging.py`."""

import logging

from csi.deadline import Deadline
from csi.errors import InUse
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.method import Calls, method
from csi.services import values
from csi.staging import Staging

_Rpc = pb.NodeServiceCapability.RPC
CAPABILITIES = (
    _Rpc.STAGE_UNSTAGE_VOLUME,
    _Rpc.GET_VOLUME_STATS,
    _Rpc.EXPAND_VOLUME,
    _Rpc.GET_VOLUME_HEALTH,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)
_UNITS = {"bytes": pb.VolumeUsage.BYTES, "inodes": pb.VolumeUsage.INODES}


class Node(csi_pb2_grpc.NodeServicer):
    """The Node servicer. RPCs that are not here are UNIMPLEMENTED by the generated base class."""

    def __init__(self, *, calls: Calls, staging: Staging) -> None:
        self.calls = calls
        self._staging = staging

    @method()
    def NodeStageVolume(self, request: pb.NodeStageVolumeRequest, deadline: Deadline) -> pb.NodeStageVolumeResponse:
        """CSI spec, NodeStageVolume."""
        values.require(request, "volume_id", "staging_target_path", "volume_capability")
        values.check_sizes(request)
        staging_path = values.absolute_path(request, "staging_target_path")
        capability = values.capability(request.volume_capability)
        self._staging.stage(
            values.known_id(request.volume_id),
            staging_path=staging_path,
            capability=capability,
            publish_context=dict(request.publish_context),
            deadline=deadline,
        )
        return pb.NodeStageVolumeResponse()

    @method()
    def NodeUnstageVolume(
        self, request: pb.NodeUnstageVolumeRequest, deadline: Deadline
    ) -> pb.NodeUnstageVolumeResponse:
        """CSI spec, NodeUnstageVolume."""
        values.require(request, "volume_id", "staging_target_path")
        values.check_sizes(request)
        staging_path = values.absolute_path(request, "staging_target_path")
        self._staging.unstage(values.known_id(request.volume_id), staging_path=staging_path, deadline=deadline)
        return pb.NodeUnstageVolumeResponse()

    @method()
    def NodePublishVolume(
        self, request: pb.NodePublishVolumeRequest, deadline: Deadline
    ) -> pb.NodePublishVolumeResponse:
        """CSI spec, NodePublishVolume."""
        values.require(request, "volume_id", "target_path", "volume_capability")
        values.check_sizes(request)
        target_path = values.absolute_path(request, "target_path")
        capability = values.capability(request.volume_capability)
        if not request.staging_target_path:
            # CSI's table of errors has FAILED_PRECONDITION for this one, unlike for other missing fields.
            raise InUse("staging_target_path: not set; call NodeStageVolume first and name its path here")
        self._staging.publish(
            values.known_id(request.volume_id),
            staging_path=values.absolute_path(request, "staging_target_path"),
            target_path=target_path,
            capability=capability,
            readonly=request.readonly,
            publish_context=dict(request.publish_context),
            deadline=deadline,
        )
        return pb.NodePublishVolumeResponse()

    @method()
    def NodeUnpublishVolume(
        self, request: pb.NodeUnpublishVolumeRequest, deadline: Deadline
    ) -> pb.NodeUnpublishVolumeResponse:
        """CSI spec, NodeUnpublishVolume."""
        values.require(request, "volume_id", "target_path")
        values.check_sizes(request)
        target_path = values.absolute_path(request, "target_path")
        self._staging.unpublish(values.known_id(request.volume_id), target_path=target_path, deadline=deadline)
        return pb.NodeUnpublishVolumeResponse()

    @method(level=logging.DEBUG)
    def NodeGetVolumeStats(
        self, request: pb.NodeGetVolumeStatsRequest, deadline: Deadline
    ) -> pb.NodeGetVolumeStatsResponse:
        """CSI spec, NodeGetVolumeStats."""
        values.require(request, "volume_id", "volume_path")
        values.check_sizes(request)
        usages = self._staging.stats(
            values.known_id(request.volume_id),
            volume_path=values.volume_path(request),
            deadline=deadline,
        )
        return pb.NodeGetVolumeStatsResponse(
            usage=[
                pb.VolumeUsage(unit=_UNITS[usage.unit], available=usage.available, total=usage.total, used=usage.used)
                for usage in usages
            ]
        )

    @method(level=logging.DEBUG)
    def NodeGetVolumeHealth(
        self, request: pb.NodeGetVolumeHealthRequest, deadline: Deadline
    ) -> pb.NodeGetVolumeHealthResponse:
        """CSI spec, NodeGetVolumeHealth."""
        values.require(request, "volume_id")
        values.check_sizes(request)
        complaints = self._staging.complaints(values.known_id(request.volume_id))
        entries = [
            pb.VolumeHealth.VolumeHealthEntry(status=pb.INACCESSIBLE, reason=each.reason, message=each.message)
            for each in complaints
        ]
        health = pb.VolumeHealth(volume_id=request.volume_id, health_statuses=entries)
        return pb.NodeGetVolumeHealthResponse(volume_health=health)

    @method()
    def NodeExpandVolume(self, request: pb.NodeExpandVolumeRequest, deadline: Deadline) -> pb.NodeExpandVolumeResponse:
        """CSI spec, NodeExpandVolume."""
        values.require(request, "volume_id", "volume_path")
        values.check_sizes(request)
        required, _limit = values.sizes(request.capacity_range)
        block = None
        if request.HasField("volume_capability"):
            block = values.capability(request.volume_capability).block
        size_bytes = self._staging.expand(
            values.known_id(request.volume_id),
            volume_path=values.volume_path(request),
            block=block,
            required_bytes=required,
            deadline=deadline,
        )
        return pb.NodeExpandVolumeResponse(capacity_bytes=size_bytes)

    @method(slot=False, level=logging.DEBUG)
    def NodeGetCapabilities(
        self, request: pb.NodeGetCapabilitiesRequest, deadline: Deadline
    ) -> pb.NodeGetCapabilitiesResponse:
        """CSI spec, NodeGetCapabilities."""
        return pb.NodeGetCapabilitiesResponse(
            capabilities=[pb.NodeServiceCapability(rpc=_Rpc(type=kind)) for kind in CAPABILITIES]
        )

    @method(slot=False)
    def NodeGetInfo(self, request: pb.NodeGetInfoRequest, deadline: Deadline) -> pb.NodeGetInfoResponse:
        """CSI spec, NodeGetInfo."""
        info = self._staging.info(deadline)
        return pb.NodeGetInfoResponse(
            node_id=info.node_id,
            max_volumes_per_node=info.max_volumes,
            accessible_topology=pb.Topology(segments=info.topology) if info.topology else None,
        )
