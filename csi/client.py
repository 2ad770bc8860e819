"""A small CSI client: what the command line asks a running driver."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from csi.errors import DriverError, NotFound, Unavailable
from csi.model import NodeId
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.endpoint import Endpoint, TlsFiles

_PAGE = 500


@dataclass(frozen=True)
class VolumeLine:
    """A volume as the command line shows it."""

    volume_id: str
    name: str
    pool: str
    size_bytes: int
    nodes: tuple[str, ...]  # names of the nodes that it is published to
    reachable_from: tuple[str, ...]  # names of the only nodes that can reach it; () = every node


class Client:
    """A connection to one driver; close it, or use it in a `with`."""

    def __init__(self, endpoint: Endpoint, *, tls: TlsFiles | None = None, timeout_seconds: float = 30.0) -> None:
        self._endpoint = endpoint
        self._timeout = timeout_seconds
        self._channel = _channel(endpoint, tls)
        self._controller: Any = csi_pb2_grpc.ControllerStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def volumes(self) -> list[VolumeLine]:
        """All volumes of the driver, by id. Raises Unavailable when no driver answers."""
        lines: list[VolumeLine] = []
        token = ""
        while True:
            request = pb.ListVolumesRequest(max_entries=_PAGE, starting_token=token)
            page = self._call(self._controller.ListVolumes, request)
            lines += [_line(entry.volume, entry.status.published_node_ids) for entry in page.entries]
            token = page.next_token
            if not token:
                return lines

    def volume(self, volume_id: str) -> VolumeLine:
        """One volume. Raises NotFound, Unavailable."""
        response = self._call(self._controller.ControllerGetVolume, pb.ControllerGetVolumeRequest(volume_id=volume_id))
        return _line(response.volume, response.status.published_node_ids)

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        with _as_driver_error(self._endpoint):
            return method(request, timeout=self._timeout)


def _channel(endpoint: Endpoint, tls: TlsFiles | None) -> grpc.Channel:
    if endpoint.socket is not None:
        return grpc.insecure_channel(endpoint.target)
    if tls is None:
        raise Unavailable(f"{endpoint}: a driver on TCP is reached with mutual TLS; set tls.ca, tls.cert and tls.key")
    try:
        ca, key, cert = (path.read_bytes() for path in (tls.ca, tls.key, tls.cert))
    except OSError as error:
        raise Unavailable(f"tls: can't read {error.filename}: {error.strerror}") from error
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.secure_channel(endpoint.target, credentials)


@contextmanager
def _as_driver_error(endpoint: Endpoint) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        # Every RpcError that a call raises is a Call too, which has the code; the stubs do not say so.
        call: Any = error
        code, details = call.code(), call.details()
        if code is grpc.StatusCode.NOT_FOUND:
            raise NotFound(details) from error
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise Unavailable(f"{endpoint}: this driver serves no controller; ask the one of a SNODE") from error
        if code is grpc.StatusCode.UNAVAILABLE and "connect" in details:
            raise Unavailable(
                f"{endpoint}: nothing answers there; is the driver running, is this its endpoint, and are you root?"
            ) from error
        raise DriverError(f"{code.name}: {details}") from error


def _line(volume: pb.Volume, node_ids: Any) -> VolumeLine:
    segments = [value for topology in volume.accessible_topology for value in topology.segments.values()]
    return VolumeLine(
        volume_id=volume.volume_id,
        name=volume.volume_context.get("name", ""),
        pool=volume.volume_context.get("pool", ""),
        size_bytes=volume.capacity_bytes,
        nodes=tuple(sorted(NodeId.parse(node_id).name for node_id in node_ids)),
        reachable_from=tuple(sorted(segments)),
    )
