"""The server on real sockets."""

import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from csi import certs
from csi.deadline import Deadline, wait_until
from csi.errors import Invalid, Unavailable
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.endpoint import Endpoint, TlsFiles, parse_endpoint
from csi.rpc.method import Calls
from csi.rpc.server import Server
from csi.services.controller import Controller
from csi.volumes import Volumes
from tests.rpc.service import create
from tests.rpc.use_cases import MemoryVolumes


class Running:
    """A server with a Controller on memory."""

    def __init__(self, endpoint: Endpoint, *, tls: TlsFiles | None = None) -> None:
        self.calls = Calls()
        self.volumes = MemoryVolumes()
        controller = Controller(calls=self.calls, volumes=cast(Volumes, self.volumes))
        register = partial(csi_pb2_grpc.add_ControllerServicer_to_server, controller)
        self.server = Server(endpoint, calls=self.calls, registrations=[register], tls=tls)
        self.server.start()


@contextmanager
def running(endpoint: Endpoint, *, tls: TlsFiles | None = None) -> Iterator[Running]:
    server = Running(endpoint, tls=tls)
    try:
        yield server
    finally:
        assert server.server.stop(grace_seconds=0)


@contextmanager
def channel(endpoint: Endpoint, credentials: grpc.ChannelCredentials | None = None) -> Iterator[Any]:
    options = [("grpc.ssl_target_name_override", "localhost")]
    opened = (
        grpc.secure_channel(endpoint.target, credentials, options=options)
        if credentials
        else grpc.insecure_channel(endpoint.target)
    )
    with opened:
        yield opened


def list_volumes(endpoint: Endpoint, credentials: grpc.ChannelCredentials | None = None) -> Any:
    with channel(endpoint, credentials) as opened:
        stub: Any = csi_pb2_grpc.ControllerStub(opened)
        return stub.ListVolumes(pb.ListVolumesRequest(), timeout=5)


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(socket=tmp_path / "run" / "csi.sock")


def socket_of(endpoint: Endpoint) -> Path:
    assert endpoint.socket is not None
    return endpoint.socket


# -- unix sockets ----------------------------------------------------------------------------------------------------


def test_socket_is_for_root_alone(endpoint: Endpoint) -> None:
    path = socket_of(endpoint)
    before = os.umask(0)
    try:
        with running(endpoint):
            assert os.umask(0) == 0, "the umask of the process is as it was"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.with_name("csi.sock.lock").stat().st_mode) == 0o600
            list_volumes(endpoint)
    finally:
        os.umask(before)


def test_nobody_else_can_connect(endpoint: Endpoint) -> None:
    path = socket_of(endpoint)
    path.parent.mkdir(mode=0o755)
    for folder in list(path.parents)[:3]:
        folder.chmod(0o755)  # so that the socket's own mode is what keeps others out
    with running(endpoint):
        thread, results = _in_thread(partial(_connect_as_nobody, path))
        thread.join(10)
        assert results == ["PermissionError"]


def _connect_as_nobody(path: Path) -> str:
    """Connect with another user's rights; on Linux the filesystem user id is the calling thread's own."""
    libc = ctypes.CDLL(None)
    libc.setfsuid(65534)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    except OSError as error:
        return type(error).__name__
    finally:
        libc.setfsuid(0)
    return "connected"


def test_a_second_server_is_refused_and_the_first_serves_on(endpoint: Endpoint) -> None:
    with running(endpoint):
        with pytest.raises(Unavailable, match=f"another driver .process {os.getpid()}. serves there; stop it"):
            Running(endpoint)
        list_volumes(endpoint)
        assert socket_of(endpoint).exists()


def test_a_stopped_server_can_be_followed(endpoint: Endpoint) -> None:
    for _ in range(3):
        with running(endpoint):
            list_volumes(endpoint)


def test_a_socket_left_by_a_kill_is_replaced(endpoint: Endpoint) -> None:
    path = socket_of(endpoint)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with running(endpoint):
        list_volumes(endpoint)


def test_a_live_socket_of_another_program_is_left_alone(endpoint: Endpoint) -> None:
    path = socket_of(endpoint)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(Unavailable, match="another program listens there"):
            Running(endpoint)
        assert path.exists()


def test_a_file_in_the_place_of_the_socket_is_left_alone(endpoint: Endpoint) -> None:
    path = socket_of(endpoint)
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(Unavailable, match="not a socket"):
        Running(endpoint)
    assert path.read_text() == "precious"


def test_a_folder_that_others_can_write_to_is_refused(endpoint: Endpoint) -> None:
    path = socket_of(endpoint)
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(Unavailable, match="chmod 0700"):
        Running(endpoint)


def test_a_folder_of_another_user_is_refused(endpoint: Endpoint) -> None:
    path = socket_of(endpoint)
    path.parent.mkdir()
    os.chown(path.parent, 65534, 65534)
    with pytest.raises(Unavailable, match="another user"):
        Running(endpoint)


@pytest.mark.parametrize(
    "text",
    [
        "", "csi.sock", "unix:relative.sock", "unix:///a/../b.sock", "unix:///tmp/", "unix:///a%20b", "http://x:1",
        "tcp://x", "tcp://x:0", "tcp://x:70000", "tcp:x:1", "unix:///" + "x" * 107,
    ],
)  # fmt: skip
def test_bad_endpoints_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="endpoint"):
        parse_endpoint(text)


def test_good_endpoints() -> None:
    assert parse_endpoint("unix:///run/x/csi.sock") == Endpoint(socket=Path("/run/x/csi.sock"))
    assert parse_endpoint("unix:/run/x/csi.sock") == Endpoint(socket=Path("/run/x/csi.sock"))
    assert parse_endpoint("tcp://[::1]:9000") == Endpoint(address="[::1]:9000")


# -- TCP -------------------------------------------------------------------------------------------------------------


def test_tcp_without_tls_is_refused() -> None:
    with pytest.raises(Invalid, match="mutual TLS only"):
        Running(Endpoint(address="127.0.0.1:0"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    """A CA with a certificate of its own ("ours"), and another CA with one ("foreign")."""
    made = {}
    for name in ("ours", "foreign"):
        folder = tmp_path_factory.mktemp(name)
        certs.init(folder)
        certs.issue(folder, "both", roles=["server", "admin"], addresses=["localhost"])
        made[name] = certs.files_of(folder, "both")
    return made


def credentials(trust: TlsFiles, own: TlsFiles | None) -> grpc.ChannelCredentials:
    if own is None:
        return grpc.ssl_channel_credentials(trust.ca.read_bytes())
    return grpc.ssl_channel_credentials(trust.ca.read_bytes(), own.key.read_bytes(), own.cert.read_bytes())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_tcp_serves_only_clients_of_our_ca(certificates: dict[str, TlsFiles]) -> None:
    ours, foreign = certificates["ours"], certificates["foreign"]
    endpoint = Endpoint(address=f"127.0.0.1:{free_port()}")
    with running(endpoint, tls=ours):
        list_volumes(endpoint, credentials(ours, ours))
        for bad in (credentials(ours, None), credentials(ours, foreign), None):
            with pytest.raises(grpc.RpcError) as caught:
                list_volumes(endpoint, bad)
            failure: Any = caught.value
            assert failure.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(Unavailable, match="can't listen"):
            Running(endpoint, tls=ours)


def test_missing_tls_files_are_named(tmp_path: Path) -> None:
    tls = TlsFiles(ca=tmp_path / "ca", cert=tmp_path / "cert", key=tmp_path / "key")
    with pytest.raises(Unavailable, match="tls: can't read"):
        Running(Endpoint(address="127.0.0.1:0"), tls=tls)


# -- health, deadlines, stop -----------------------------------------------------------------------------------------


def test_health_service_says_serving(endpoint: Endpoint) -> None:
    with running(endpoint), channel(endpoint) as opened:
        stub: Any = health_pb2_grpc.HealthStub(opened)
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
        assert status == health_pb2.HealthCheckResponse.SERVING


def test_health_is_of_the_whole_server_and_is_not_watched(endpoint: Endpoint) -> None:
    with running(endpoint), channel(endpoint) as opened:
        stub: Any = health_pb2_grpc.HealthStub(opened)
        cases: list[tuple[Callable[[], object], grpc.StatusCode]] = [
            (lambda: stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=5), grpc.StatusCode.NOT_FOUND),
            (lambda: next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)), grpc.StatusCode.UNIMPLEMENTED),
        ]
        for call, code in cases:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            failure: Any = caught.value
            assert failure.code() is code


def test_a_deadline_of_the_client_reaches_the_use_case(endpoint: Endpoint) -> None:
    with running(endpoint) as server, channel(endpoint) as opened:
        stub: Any = csi_pb2_grpc.ControllerStub(opened)
        stub.CreateVolume(create(), timeout=7)
        stub.CreateVolume(create())
        assert 5 < server.volumes.deadlines[0] < 7.5  # gRPC rounds up a little
        assert server.volumes.deadlines[1] > 60


def _held_call(server: Running, opened: Any) -> Any:
    server.volumes.gate = threading.Event()
    stub: Any = csi_pb2_grpc.ControllerStub(opened)
    call = stub.CreateVolume.future(create(), timeout=60)
    assert server.volumes.entered.acquire(timeout=10)
    return call


def _in_thread(action: Callable[[], object]) -> "tuple[threading.Thread, list[object]]":
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    return thread, results


def test_stop_lets_running_requests_end_and_takes_no_new_ones(endpoint: Endpoint) -> None:
    server = Running(endpoint)
    with channel(endpoint) as opened:
        call = _held_call(server, opened)
        thread, results = _in_thread(lambda: server.server.stop(grace_seconds=20))
        wait_until(lambda: _refused(endpoint), Deadline.after(10), what="new requests to be refused")
        assert not call.done()
        assert server.volumes.gate is not None
        server.volumes.gate.set()
        assert call.result(timeout=10).volume.volume_id
        thread.join(10)
        assert results == [True]


def _refused(endpoint: Endpoint) -> bool:
    try:
        list_volumes(endpoint)
    except grpc.RpcError:
        return True
    return False


def test_stop_ends_waits_and_children_after_the_grace(endpoint: Endpoint) -> None:
    server = Running(endpoint)
    with channel(endpoint) as opened:
        _held_call(server, opened)
        gate = server.volumes.gate
        assert gate is not None
        assert server.server.stop(grace_seconds=0.1, end_children=gate.set)
    assert server.calls.stop.is_set()


def test_a_stuck_request_is_told_and_left_behind(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi.rpc.server._LAST_SECONDS", 0.1)
    server = Running(endpoint)
    with channel(endpoint) as opened:
        _held_call(server, opened)
        assert not server.server.stop(grace_seconds=0.1)
    assert server.volumes.gate is not None
    server.volumes.gate.set()
    assert server.calls.wait_idle(10) == []


# -- the process -----------------------------------------------------------------------------------------------------

_STUCK = """
import os, sys, threading, time
from csi.rpc.server import leave
threading.Thread(target=time.sleep, args=(60,)).start()
leave(False)
"""


def test_a_stuck_thread_does_not_keep_the_process() -> None:
    result = subprocess.run([sys.executable, "-c", _STUCK], timeout=20, check=False)
    assert result.returncode == 1


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Endpoint]]:
    """`snode controller` on files, as a process."""
    endpoint = Endpoint(socket=tmp_path / "run" / "csi.sock")
    config = tmp_path / "snode.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\n[pools.p]\ntype = "files"\ndirectory = "{tmp_path}/pool"\n')
    argv = [sys.executable, "-m", "csi", "controller", "--config", str(config)]
    environment = {**os.environ, "CSI_ENDPOINT": str(endpoint)}
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, endpoint
        finally:
            process.kill()


def _probe_ready(endpoint: Endpoint) -> bool:
    options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 20)]
    with grpc.insecure_channel(endpoint.target, options=options) as opened:
        stub: Any = csi_pb2_grpc.IdentityStub(opened)
        try:
            return bool(stub.Probe(pb.ProbeRequest(), timeout=5).ready.value)
        except grpc.RpcError:
            return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_starts_small_and_ends_on_a_signal(
    service: tuple["subprocess.Popen[str]", Endpoint], number: signal.Signals
) -> None:
    process, endpoint = service
    wait_until(lambda: _probe_ready(endpoint), Deadline.after(20), what="Probe")
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    assert resident < 60 * 1024, f"{resident} KiB"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "stopping" in errors
    assert "Traceback" not in errors


def test_two_processes_on_one_state_folder_are_refused(
    service: tuple["subprocess.Popen[str]", Endpoint], tmp_path: Path
) -> None:
    _, endpoint = service
    wait_until(lambda: _probe_ready(endpoint), Deadline.after(20), what="Probe")
    argv = [sys.executable, "-m", "csi", "controller", "--config", str(tmp_path / "snode.toml")]
    environment = {**os.environ, "CSI_ENDPOINT": f"unix://{tmp_path}/run/other.sock"}
    second = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert second.returncode == 1
    assert "another controller works in this state folder; stop it first" in second.stderr
