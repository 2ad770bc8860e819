"""The servicers below grpc's test server, with use cases in memory."""

import threading
from typing import Any, cast

import grpc
import grpc_testing
from google.protobuf.message import Message

from csi.background import Readiness
from csi.deadline import Deadline
from csi.pb import csi_pb2 as pb
from csi.rpc.method import Calls
from csi.services.controller import Controller
from csi.services.identity import Identity
from csi.services.node import Node
from csi.staging import Staging
from csi.volumes import Volumes
from tests.rpc.use_cases import MemoryStaging, MemoryVolumes

_SERVICES = pb.DESCRIPTOR.services_by_name


class Reply:
    """What a call ended with."""

    def __init__(self, message: Any, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        self.message = message
        self.code = code
        self.details = details
        self.trailing = dict(trailing or ())


class Driver:
    """All three services; `call` runs one RPC to its end in its own thread, as the server does."""

    def __init__(self, *, slots: int = 24, longest_seconds: float = 30.0) -> None:
        self.volumes = MemoryVolumes()
        self.staging = MemoryStaging()
        self.problems: list[str] = []
        self.readiness = Readiness([lambda _deadline: list(self.problems)], fresh_seconds=0)
        self.stop = threading.Event()
        self.calls = Calls(slots=slots, longest_seconds=longest_seconds, stop=self.stop)
        self.readiness.look(Deadline.after(1))
        servicers = {
            _SERVICES["Identity"]: Identity(calls=self.calls, name="csi.test", readiness=self.readiness),
            _SERVICES["Controller"]: Controller(calls=self.calls, volumes=cast(Volumes, self.volumes)),
            _SERVICES["Node"]: Node(calls=self.calls, staging=cast(Staging, self.staging)),
        }
        self._server = grpc_testing.server_from_dictionary(servicers, grpc_testing.strict_real_time())

    def begin(self, request: Message, *, timeout: float | None = 10.0) -> Any:
        """Begin the RPC whose request this is."""
        name = type(request).__name__.removesuffix("Request")
        method = next(s.methods_by_name[name] for s in _SERVICES.values() if name in s.methods_by_name)
        return self._server.invoke_unary_unary(method, {}, request, timeout)

    def call(self, request: Message, *, timeout: float | None = 10.0) -> Reply:
        """Run the RPC whose request this is."""
        message, trailing, code, details = self.begin(request, timeout=timeout).termination()
        return Reply(message, code, details, trailing)

    def ok(self, request: Message) -> Any:
        """The response of an RPC that must succeed."""
        reply = self.call(request)
        assert reply.code is grpc.StatusCode.OK, f"{reply.code}: {reply.details}"
        return reply.message

    def fails(self, request: Message, code: grpc.StatusCode, *words: str) -> str:
        """Assert that an RPC fails with a code and that its message has the words; returns the message."""
        reply = self.call(request)
        assert reply.code is code, f"{reply.code}: {reply.details}"
        for word in words:
            assert word in reply.details
        return reply.details


def mount(
    mode: str = "SINGLE_NODE_WRITER", *, fs_type: str = "", flags: tuple[str, ...] = (), group: str = ""
) -> pb.VolumeCapability:
    """A capability for a filesystem."""
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(fs_type=fs_type, mount_flags=flags, volume_mount_group=group),
        access_mode=_mode(mode),
    )


def block(mode: str = "SINGLE_NODE_WRITER") -> pb.VolumeCapability:
    """A capability for a raw device."""
    return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=_mode(mode))


def _mode(mode: str) -> pb.VolumeCapability.AccessMode:
    return pb.VolumeCapability.AccessMode(mode=mode)


def create(name: str = "one", **fields: Any) -> pb.CreateVolumeRequest:
    """A CreateVolumeRequest that works as it is."""
    fields.setdefault("volume_capabilities", [mount()])
    return pb.CreateVolumeRequest(name=name, **fields)
