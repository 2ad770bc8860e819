"""CSI's Identity service: who we are, what we can do, whether we are ready."""

import logging

from csi import __version__
from csi.background import Readiness
from csi.deadline import Deadline
from csi.errors import InUse
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.method import Calls, method

#: How long the very first Probe waits for the first look at the parts; later ones answer from its latest result.
_FIRST_LOOK_SECONDS = 0.3

_Service = pb.PluginCapability.Service
_Expansion = pb.PluginCapability.VolumeExpansion


class Identity(csi_pb2_grpc.IdentityServicer):
    """The Identity servicer; one for each server, whatever roles it has."""

    def __init__(self, *, calls: Calls, name: str, readiness: Readiness) -> None:
        self.calls = calls
        self._name = name
        self._readiness = readiness

    @method(slot=False, level=logging.DEBUG)
    def GetPluginInfo(self, request: pb.GetPluginInfoRequest, deadline: Deadline) -> pb.GetPluginInfoResponse:
        """Name and version."""
        return pb.GetPluginInfoResponse(name=self._name, vendor_version=__version__)

    @method(slot=False, level=logging.DEBUG)
    def GetPluginCapabilities(
        self, request: pb.GetPluginCapabilitiesRequest, deadline: Deadline
    ) -> pb.GetPluginCapabilitiesResponse:
        """What the plugin can do as a whole. A node plugin answers the same: its volumes need a publish_context, so a
        CO must not take it for one without a controller.
        """
        services = [_Service.CONTROLLER_SERVICE, _Service.VOLUME_ACCESSIBILITY_CONSTRAINTS]
        return pb.GetPluginCapabilitiesResponse(
            capabilities=[
                *(pb.PluginCapability(service=_Service(type=kind)) for kind in services),
                pb.PluginCapability(volume_expansion=_Expansion(type=_Expansion.ONLINE)),
            ]
        )

    # Asked every few seconds: what keeps us from being ready is logged once, when it is found.
    @method(slot=False, level=logging.DEBUG, failure_level=logging.DEBUG)
    def Probe(self, request: pb.ProbeRequest, deadline: Deadline) -> pb.ProbeResponse:
        """OK when ready, ready=false before the first look at the parts, FAILED_PRECONDITION with the reasons else."""
        problems = self._readiness.problems(wait_seconds=min(_FIRST_LOOK_SECONDS, deadline.remaining()))
        if problems:
            # "Missing required dependency" and "Plugin not healthy" are FAILED_PRECONDITION in CSI's table for Probe.
            raise InUse("; ".join(problems))
        response = pb.ProbeResponse()
        response.ready.value = problems is not None
        return response
