"""CSI's Identity service: who we are, what we can do, whether we are ready."""

import logging

import grpc

from csi import __version__
from csi.background import Readiness
from csi.deadline import Deadline
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.method import Calls, method
from csi.rpc.status import PROBLEMS

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

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        """CSI spec, Probe: whether we are ready; if not, why stands in the trailing metadata.

        Never the error FAILED_PRECONDITION: Kubernetes' sidecars end at it, are started again later and later, and
        nothing is attached or detached for minutes after tgtd or iscsid is back. At ready=false they ask again.
        """
        response = self._probe(request, context)
        if not response.ready.value:
            told = "; ".join(self._readiness.problems() or ())
            context.set_trailing_metadata(((PROBLEMS, told.encode()),))
        return response

    # Asked every few seconds: what keeps us from being ready is logged once, when it is found.
    @method(slot=False, level=logging.DEBUG, failure_level=logging.DEBUG)
    def _probe(self, request: pb.ProbeRequest, deadline: Deadline) -> pb.ProbeResponse:
        problems = self._readiness.problems(wait_seconds=min(_FIRST_LOOK_SECONDS, deadline.remaining()))
        response = pb.ProbeResponse()
        response.ready.value = problems == []  # None: before the first look
        return response
