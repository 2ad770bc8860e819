"""Who may call what over mutual TLS, on a real server with certificates of `snode certs`."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf.message import Message

from csi import certs
from csi.errors import Forbidden
from csi.model import NodeId
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.access import _RULES, Caller, caller_of, check
from csi.rpc.endpoint import Endpoint
from csi.rpc.method import Calls
from csi.rpc.server import Server
from csi.services.controller import Controller
from csi.volumes import Volumes
from tests.rpc.service import create
from tests.rpc.use_cases import MemoryVolumes

CODE = grpc.StatusCode
NODES = {name: str(NodeId(name, initiator=f"iqn.2026-11.io.test:{name}")) for name in ("cnode1", "cnode2")}
ADDRESSES = ["localhost", "127.0.0.1"]
CERTIFICATES = {
    "server": ["server"],
    "operator": ["admin"],
    "cnode1": ["node"],
    "cnode2": ["node"],
    "maker": ["volumes"],
    "docker1": ["node", "volumes"],
}


class Tls:
    """A server on TCP, and a client for each certificate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        certs.init(folder)
        for name, roles in CERTIFICATES.items():
            certs.issue(folder, name, roles=roles, addresses=ADDRESSES if "server" in roles else [])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.endpoint = Endpoint(address=f"127.0.0.1:{probe.getsockname()[1]}")
        self.volumes = MemoryVolumes()
        self.shown: list[bytes] = []  # the certificates that callers showed
        calls = Calls(caller_of=self._caller_of)
        controller = Controller(calls=calls, volumes=cast(Volumes, self.volumes))
        register = partial(csi_pb2_grpc.add_ControllerServicer_to_server, controller)
        self.server = Server(self.endpoint, calls=calls, registrations=[register], tls=certs.files_of(folder, "server"))
        self.server.start()

    def _caller_of(self, context: grpc.ServicerContext) -> Caller:
        facts: Any = context.auth_context()
        self.shown += facts["x509_pem_cert"]
        return caller_of(context)

    @contextmanager
    def channel(self, name: str) -> Iterator[grpc.Channel]:
        files = certs.files_of(self.folder, name)
        credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in (files.ca, files.key, files.cert)))
        options = [("grpc.ssl_target_name_override", "localhost")]
        with grpc.secure_channel(self.endpoint.target, credentials, options=options) as opened:
            yield opened

    def call(self, name: str, request: Message) -> Any:
        """The response to a caller, or the error that it got."""
        with self.channel(name) as opened:
            stub: Any = csi_pb2_grpc.ControllerStub(opened)
            try:
                return getattr(stub, type(request).__name__.removesuffix("Request"))(request, timeout=10)
            except grpc.RpcError as error:
                return error


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    made = Tls(tmp_path_factory.mktemp("tls"))
    yield made
    assert made.server.stop(grace_seconds=0)


def _publish(volume_id: str, node: str) -> pb.ControllerPublishVolumeRequest:
    capability = create().volume_capabilities[0]
    return pb.ControllerPublishVolumeRequest(volume_id=volume_id, node_id=node, volume_capability=capability)


def _unpublish(volume_id: str, node: str) -> pb.ControllerUnpublishVolumeRequest:
    return pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node)


def _refused(answer: Any, *words: str) -> None:
    assert isinstance(answer, grpc.RpcError), answer
    failure: Any = answer
    assert failure.code() is CODE.PERMISSION_DENIED
    for word in words:
        assert word in failure.details()


def test_a_node_speaks_for_itself_alone(tls: Tls) -> None:
    volume_id = tls.call("operator", create("own")).volume.volume_id
    _refused(tls.call("cnode1", _publish(volume_id, NODES["cnode2"])), "cnode2", "cnode1 alone")
    assert tls.call("cnode1", _publish(volume_id, NODES["cnode1"])).publish_context
    _refused(tls.call("cnode2", _unpublish(volume_id, NODES["cnode1"])), "the node cnode1")
    _refused(tls.call("cnode1", _unpublish(volume_id, "")), "this node_id")  # all nodes: administration
    _refused(tls.call("maker", _publish(volume_id, NODES["cnode1"])), "volumes")
    shown = tls.call("cnode1", pb.ControllerGetVolumeRequest(volume_id=volume_id))
    assert shown.status.published_node_ids == [NODES["cnode1"]]
    _refused(tls.call("cnode2", pb.ControllerGetVolumeRequest(volume_id=volume_id)), "not published to cnode2")
    assert [entry.volume.volume_id for entry in tls.call("cnode1", pb.ListVolumesRequest()).entries] == [volume_id]
    for most in (0, 1):
        assert tls.call("cnode2", pb.ListVolumesRequest(max_entries=most)) == pb.ListVolumesResponse()
    assert tls.call("cnode1", _unpublish(volume_id, NODES["cnode1"])) == pb.ControllerUnpublishVolumeResponse()


def test_pages_of_a_node_hold_and_name_its_own_volumes_alone(tls: Tls) -> None:
    ids = sorted(tls.call("operator", create(f"page{number}")).volume.volume_id for number in range(6))
    own = ids[1::2]
    for volume_id in own:
        assert tls.call("cnode2", _publish(volume_id, NODES["cnode2"])).publish_context
    seen, token = [], ""
    while True:
        page = tls.call("cnode2", pb.ListVolumesRequest(max_entries=2, starting_token=token))
        seen.append([entry.volume.volume_id for entry in page.entries])
        token = page.next_token
        if not token:
            break
        assert token in own
    assert seen == [own[:2], own[2:]]
    for volume_id in ids:
        tls.call("operator", _unpublish(volume_id, ""))
        tls.call("operator", pb.DeleteVolumeRequest(volume_id=volume_id))


FORGED = [
    "1;cnode1;;", "1;cnode1;;iqn.2026-11.io.test:cnode2", "1;cnode1;cnode2;", "1;cnode2;cnode2;cnode2", "1;CNODE2;;",
    " 1;cnode2;;", "1;cnode2;;\n", "1;cnode2\0;;", "2;cnode2;;", "01;cnode2;;", "cnode2", ";cnode2;;", "1;;;",
    "1;cnode2;;;", "1;\u0441node2;;", "1;cnode2.;;", "1;" + "cnode2" * 40 + ";;", NODES["cnode1"] + " ",
]  # fmt: skip


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_node_id_gets_nothing(tls: Tls, forged: str) -> None:
    volume_id = tls.call("operator", create("forged")).volume.volume_id
    for request in (_publish(volume_id, forged), _unpublish(volume_id, forged)):
        _refused(tls.call("cnode2", request))
    assert tls.volumes.published.get(volume_id, {}) == {}


def test_volumes_are_made_by_whoever_has_the_role(tls: Tls) -> None:
    _refused(tls.call("cnode1", create("mine")), "--role volumes")
    volume_id = tls.call("docker1", create("mine")).volume.volume_id
    assert volume_id in {entry.volume.volume_id for entry in tls.call("maker", pb.ListVolumesRequest()).entries}
    _refused(tls.call("cnode1", pb.DeleteVolumeRequest(volume_id=volume_id)))
    assert tls.call("maker", pb.DeleteVolumeRequest(volume_id=volume_id)) == pb.DeleteVolumeResponse()


def test_what_no_rule_allows_is_refused(tls: Tls) -> None:
    nobody = Caller("nobody", frozenset())
    with pytest.raises(Forbidden, match="--role admin"):
        check(pb.NodeStageVolumeRequest(), Caller("docker1", frozenset({"node:docker1", "volumes"})))
    with pytest.raises(Forbidden, match=r"nobody \(no role\)"):
        check(pb.ListVolumesRequest(), nobody)
    served = {name for name in vars(Controller) if name[0].isupper()}
    ruled = {kind.__name__.removesuffix("Request") for kind in _RULES}
    assert served <= ruled, "a request that the controller serves needs a rule, or nodes can't use it"


def test_a_client_without_the_server_role_can_not_serve(tls: Tls) -> None:
    """A node's stolen certificate does not make a false SNODE."""
    files = certs.files_of(tls.folder, "cnode1")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = Endpoint(address=f"127.0.0.1:{probe.getsockname()[1]}")
    false = Server(endpoint, calls=Calls(), registrations=[], tls=files)
    false.start()
    try:
        before, tls.endpoint = tls.endpoint, endpoint
        answer: Any = tls.call("operator", pb.ListVolumesRequest())
        assert answer.code() is CODE.UNAVAILABLE, answer
    finally:
        tls.endpoint = before
        false.stop(grace_seconds=0)


def test_a_renewed_certificate_serves_without_restart(tls: Tls) -> None:
    before = certs.files_of(tls.folder, "server").cert.read_bytes()

    def served() -> bytes:
        context = ssl.create_default_context(cafile=str(tls.folder / "ca.pem"))
        context.check_hostname = False
        mine = certs.files_of(tls.folder, "operator")
        context.load_cert_chain(mine.cert, mine.key)
        host, _, port = tls.endpoint.address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw, context.wrap_socket(raw) as wrapped:
            return ssl.DER_cert_to_PEM_cert(wrapped.getpeercert(binary_form=True) or b"").encode()

    assert served() == before
    certs.issue(tls.folder, "server", roles=["server"], addresses=ADDRESSES)
    fresh = certs.files_of(tls.folder, "server").cert.read_bytes()
    assert fresh != before
    assert served() == fresh
    # A renewal that is broken leaves the old one in service.
    (tls.folder / "server.key").rename(tls.folder / "server.key.away")
    assert served() == fresh
    (tls.folder / "server.key.away").rename(tls.folder / "server.key")
    (tls.folder / "server.key").write_bytes((tls.folder / "cnode1.key").read_bytes())
    assert served() == fresh
    certs.issue(tls.folder, "server", roles=["server"], addresses=ADDRESSES)
    assert served() not in (before, fresh)
