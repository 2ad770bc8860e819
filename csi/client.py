"""A small CSI client: what the command line asks a running driver."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from csi.errors import (
    Busy,
    Conflict,
    DataLoss,
    DriverError,
    Forbidden,
    InUse,
    Invalid,
    NoSpace,
    NotFound,
    OutOfRange,
    Unavailable,
)
from csi.model import NodeId
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.endpoint import Endpoint, TlsFiles
from csi.rpc.status import PROBLEMS
from csi.rpc.tls import Renewed

_PAGE = 500
#: How gRPC's own words begin when there is no connection, or it broke.
_NO_CONNECTION = ("failed to connect", "connections to all", "Socket closed", "recvmsg:", "Connection reset", "DNS")
#: What a driver says keeps its meaning here.
_ERRORS: dict[grpc.StatusCode, type[DriverError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NoSpace,
    grpc.StatusCode.FAILED_PRECONDITION: InUse,
    grpc.StatusCode.ABORTED: Busy,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.DATA_LOSS: DataLoss,
}


@dataclass(frozen=True)
class VolumeLine:
    """A volume as the command line shows it."""

    volume_id: str
    name: str
    pool: str
    size_bytes: int
    nodes: tuple[str, ...]  # names of the nodes that it is published to
    reachable_from: tuple[str, ...]  # names of the only nodes that can reach it; () = every node
    fs_type: str = ""  # what it was made for; "" = the driver's default
    takeover: str = ""  # after what silence of its node another one may take it; "" = never


@dataclass(frozen=True)
class VolumeUse:
    """How Docker uses a volume: a filesystem for one node at a time."""

    fs_type: str = ""
    flags: tuple[str, ...] = ()

    def capability(self) -> pb.VolumeCapability:
        """Its CSI form."""
        return pb.VolumeCapability(
            mount=pb.VolumeCapability.MountVolume(fs_type=self.fs_type, mount_flags=self.flags),
            access_mode=pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
        )


class Client:
    """A connection to one driver; close it, or use it in a `with`."""

    def __init__(self, endpoint: Endpoint, *, tls: TlsFiles | None = None, timeout_seconds: float = 30.0) -> None:
        self._endpoint = endpoint
        self._timeout = timeout_seconds
        self._connection = _Plain(endpoint.target) if endpoint.socket is not None else _renewed(endpoint, tls)
        self._connection.channel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @property
    def _controller(self) -> Any:
        return csi_pb2_grpc.ControllerStub(self._connection.channel())

    @property
    def _node(self) -> Any:
        return csi_pb2_grpc.NodeStub(self._connection.channel())

    def problem(self) -> str:
        """What keeps the driver from being ready, as it says itself; "" when it is. Raises Unavailable."""
        identity: Any = csi_pb2_grpc.IdentityStub(self._connection.channel())
        with _as_driver_error(self._endpoint):
            response, call = identity.Probe.with_call(pb.ProbeRequest(), timeout=self._timeout)
        if response.ready.value:
            return ""
        told = dict(call.trailing_metadata() or ()).get(PROBLEMS, b"")
        return told.decode() or "it has not looked at its parts yet"

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

    def find(self, name_or_id: str) -> VolumeLine:
        """The volume of this name or id. Raises NotFound."""
        for line in self.volumes():
            if name_or_id in (line.volume_id, line.name):
                return line
        raise NotFound(f"volume {name_or_id}: there is none; `snode volumes list` shows all")

    def release(self, line: VolumeLine, *, node: str) -> None:
        """Fence a node, by name. Raises NotFound when it does not have the volume, InUse when it can't be fenced."""
        what = f"volume {line.name or line.volume_id}"
        if line.reachable_from:
            raise InUse(f"{what}: its data is on node {node} itself, so there is no way to cut; end its use there")
        ids = {NodeId.parse(node_id).name: node_id for node_id in self.published_to(line.volume_id)}
        if node not in ids:
            raise NotFound(f"{what}: is published to {', '.join(ids) or 'no node'}, not to {node}")
        self.unpublish(line.volume_id, node_id=ids[node])

    # -- controller ----------------------------------------------------------------------------------------------

    def create(self, name: str, *, size_bytes: int, parameters: Mapping[str, str], use: VolumeUse) -> VolumeLine:
        """CreateVolume; a volume that is there and answers the request is returned. Raises what the driver says."""
        request = pb.CreateVolumeRequest(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=size_bytes) if size_bytes else None,
            parameters=parameters,
            volume_capabilities=[use.capability()],
        )
        return _line(self._call(self._controller.CreateVolume, request).volume, ())

    def delete(self, volume_id: str) -> None:
        """DeleteVolume; absent is fine."""
        self._call(self._controller.DeleteVolume, pb.DeleteVolumeRequest(volume_id=volume_id))

    def publish(self, volume_id: str, *, node_id: str, use: VolumeUse) -> dict[str, str]:
        """ControllerPublishVolume; returns the publish_context."""
        request = pb.ControllerPublishVolumeRequest(
            volume_id=volume_id, node_id=node_id, volume_capability=use.capability()
        )
        return dict(self._call(self._controller.ControllerPublishVolume, request).publish_context)

    def unpublish(self, volume_id: str, *, node_id: str) -> None:
        """ControllerUnpublishVolume: fences the node; not published is fine."""
        request = pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node_id)
        self._call(self._controller.ControllerUnpublishVolume, request)

    def published_to(self, volume_id: str) -> tuple[str, ...]:
        """The ids of the nodes that hold a volume. Raises NotFound."""
        response = self._call(self._controller.ControllerGetVolume, pb.ControllerGetVolumeRequest(volume_id=volume_id))
        return tuple(response.status.published_node_ids)

    # -- node ----------------------------------------------------------------------------------------------------

    def node_id(self) -> str:
        """The id of the driver's node."""
        return str(self._call(self._node.NodeGetInfo, pb.NodeGetInfoRequest()).node_id)

    def stage(self, volume_id: str, *, path: Path, context: Mapping[str, str], use: VolumeUse) -> None:
        """NodeStageVolume."""
        request = pb.NodeStageVolumeRequest(
            volume_id=volume_id,
            staging_target_path=str(path),
            publish_context=context,
            volume_capability=use.capability(),
        )
        self._call(self._node.NodeStageVolume, request)

    def unstage(self, volume_id: str, *, path: Path) -> None:
        """NodeUnstageVolume; not staged is fine."""
        request = pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=str(path))
        self._call(self._node.NodeUnstageVolume, request)

    def show(self, volume_id: str, *, staging_path: Path, path: Path, use: VolumeUse) -> None:
        """NodePublishVolume: show a staged volume at a path."""
        request = pb.NodePublishVolumeRequest(
            volume_id=volume_id,
            staging_target_path=str(staging_path),
            target_path=str(path),
            volume_capability=use.capability(),
        )
        self._call(self._node.NodePublishVolume, request)

    def hide(self, volume_id: str, *, path: Path) -> None:
        """NodeUnpublishVolume; not shown is fine."""
        self._call(
            self._node.NodeUnpublishVolume, pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(path))
        )

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        with _as_driver_error(self._endpoint):
            return method(request, timeout=self._timeout)


class _Plain:
    """A channel over a unix socket; see Renewed for one over TLS."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)

    def channel(self) -> grpc.Channel:
        return self._channel

    def close(self) -> None:
        self._channel.close()


def _renewed(endpoint: Endpoint, tls: TlsFiles | None) -> Renewed:
    if tls is None:
        raise Unavailable(f"{endpoint}: a driver on TCP is reached with mutual TLS; set tls.ca, tls.cert and tls.key")
    return Renewed(endpoint.target, tls)


@contextmanager
def _as_driver_error(endpoint: Endpoint) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        # Every RpcError that a call raises is a Call too, which has the code; the stubs do not say so.
        call: Any = error
        code, details = call.code(), call.details()
        if code in _ERRORS:
            raise _ERRORS[code](details) from error
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise Unavailable(f"{endpoint}: this driver serves no controller; ask the one of a SNODE") from error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise Unavailable(f"{endpoint}: the driver did not answer in time; look at its log, and repeat") from error
        if code is grpc.StatusCode.UNAVAILABLE:
            raise Unavailable(_why_unavailable(endpoint, details)) from error
        raise DriverError(f"{code.name}: {details}") from error


def _why_unavailable(endpoint: Endpoint, details: str) -> str:
    """The driver's own words, or what no connection means; gRPC marks the two in no other way than its wording."""
    if not details.startswith(_NO_CONNECTION):
        return details
    if endpoint.socket is not None:
        return f"{endpoint}: nothing answers there; is the driver running, is this its endpoint, and are you root?"
    return (
        f"{endpoint}: no connection. If the driver runs there, one end refuses the certificate of the other; snode "
        f"doctor says on each end what is wrong with its own. ({details[-200:]})"
    )


def _line(volume: pb.Volume, node_ids: Any) -> VolumeLine:
    segments = [value for topology in volume.accessible_topology for value in topology.segments.values()]
    return VolumeLine(
        volume_id=volume.volume_id,
        name=volume.volume_context.get("name", ""),
        pool=volume.volume_context.get("pool", ""),
        size_bytes=volume.capacity_bytes,
        nodes=tuple(sorted(NodeId.parse(node_id).name for node_id in node_ids)),
        reachable_from=tuple(sorted(segments)),
        fs_type=volume.volume_context.get("fs_type", ""),
        takeover=volume.volume_context.get("takeover", ""),
    )
