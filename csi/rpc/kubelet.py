"""Being registered with kubelet: what the sidecar node-driver-registrar does elsewhere."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from csi.errors import Unavailable
from csi.log import get_logger
from csi.pb import pluginregistration_pb2 as pb
from csi.pb import pluginregistration_pb2_grpc
from csi.rpc import unix_socket
from csi.rpc.endpoint import Endpoint

#: The versions of CSI that kubelet asks for; the whole of 1.x is one to it.
_VERSIONS = ("1.0.0",)


class KubeletRegistration:
    """A socket in kubelet's registry folder. kubelet forgets the driver when it is removed, and asks again when it is
    made anew."""

    def __init__(self, registry: Path, *, name: str, endpoint: Endpoint) -> None:
        """endpoint: where CSI is served; kubelet must see the socket at the same path."""
        self._path = registry / f"{name}-reg.sock"
        self._lock_fd: int | None = None
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2, thread_name_prefix="kubelet"))
        pluginregistration_pb2_grpc.add_RegistrationServicer_to_server(_Registration(name, endpoint), self._server)

    def start(self) -> None:
        """Serve. Raises Unavailable when the socket can't be had."""
        self._lock_fd = unix_socket.claim(self._path)
        with unix_socket.umask(0o177):
            try:
                self._server.add_insecure_port(f"unix:{self._path}")
            except RuntimeError as error:
                raise Unavailable(f"{self._path}: can't listen there: {error}") from error
        self._server.start()

    def stop(self) -> None:
        """Stop, and remove the socket."""
        self._server.stop(None).wait()
        self._path.unlink(missing_ok=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


class _Registration(pluginregistration_pb2_grpc.RegistrationServicer):
    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self._name = name
        self._endpoint = endpoint
        self._log = get_logger("kubelet")

    def GetInfo(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.PluginInfo:
        return pb.PluginInfo(
            type="CSIPlugin", name=self._name, endpoint=str(self._endpoint.socket), supported_versions=_VERSIONS
        )

    def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: grpc.ServicerContext
    ) -> pb.RegistrationStatusResponse:
        if request.plugin_registered:
            self._log.info("registered with kubelet", driver=self._name)
        else:  # it tries again by itself
            self._log.error("kubelet refuses the driver", driver=self._name, error=request.error)
        return pb.RegistrationStatusResponse()
