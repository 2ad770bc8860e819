"""How orchestrators ask whether the driver is well: `snode probe`, and the setting `health` over HTTP."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from http.client import RemoteDisconnected
from pathlib import Path
from urllib.error import HTTPError

import pytest
import structlog
from click.testing import CliRunner

from csi import cli
from csi.background import Readiness
from csi.config import load
from csi.deadline import Deadline, wait_until
from csi.errors import DriverError, Unavailable
from csi.health import Health, serve_health
from csi.pb import csi_pb2_grpc
from csi.rpc import http_pages
from csi.rpc.endpoint import Endpoint
from csi.rpc.method import Calls
from csi.rpc.server import Server
from csi.services.identity import Identity

_PROBLEM = "tgtd does not answer -> systemctl start tgt"


class _Driver:
    """A server with CSI's Identity alone, whose problems are set."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.problems: list[str] = []
        self.readiness = Readiness([lambda _: self.problems])
        calls = Calls()
        identity = Identity(calls=calls, name="csi.test", readiness=self.readiness)
        register = partial(csi_pb2_grpc.add_IdentityServicer_to_server, identity)
        self.server = Server(endpoint, calls=calls, registrations=[register])
        self.server.start()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[_Driver]:
    made = _Driver(Endpoint(socket=tmp_path / "csi.sock"))
    yield made
    assert made.server.stop(grace_seconds=0)
    structlog.reset_defaults()


def _probe(folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and what was said, the error's sentence included."""
    result = CliRunner().invoke(cli.snode, ["probe", "--endpoint", f"unix://{folder}/csi.sock", *words])
    if isinstance(result.exception, DriverError):
        return 1, str(result.exception)
    return result.exit_code, result.output


def test_ready_is_0(driver: _Driver, tmp_path: Path) -> None:
    driver.readiness.look(Deadline.after(1))
    assert _probe(tmp_path) == (0, "ready\n")


def test_not_ready_is_1_with_the_reason_but_alive(driver: _Driver, tmp_path: Path) -> None:
    driver.problems.append(_PROBLEM)
    driver.readiness.look(Deadline.after(1))
    assert _probe(tmp_path) == (1, f"unix://{tmp_path}/csi.sock: the driver is not ready: {_PROBLEM}")
    assert _probe(tmp_path, "--alive") == (0, f"not ready, but alive: {_PROBLEM}\n")


def test_before_the_first_look_it_is_not_ready(driver: _Driver, tmp_path: Path) -> None:
    code, words = _probe(tmp_path)
    assert code == 1
    assert "not looked at its parts yet" in words
    assert _probe(tmp_path, "--alive")[0] == 0


@pytest.mark.parametrize("words", [(), ("--alive",)])
def test_no_driver_is_1(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, said = _probe(tmp_path, *words)
    assert code == 1
    assert "nothing answers there; is the driver running" in said


@pytest.mark.parametrize("words", [(), ("--alive",)])
def test_a_driver_that_hangs_is_1_in_time(tmp_path: Path, words: tuple[str, ...]) -> None:
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(tmp_path / "csi.sock"))
        hanging.listen()
        began = time.monotonic()
        code, said = _probe(tmp_path, "--timeout", "0.5", *words)
    assert code == 1
    assert "did not answer in time" in said
    assert time.monotonic() - began < 5


def test_as_a_program_it_says_a_sentence(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "CSI_ENDPOINT": f"unix://{tmp_path}/csi.sock"}
    done = subprocess.run(
        [sys.executable, "-m", "csi", "probe"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"snode: unix://{tmp_path}/csi.sock: nothing answers there")
    assert len(done.stderr.splitlines()) == 1


# -- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def address() -> str:
    """A free one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def health(tmp_path: Path, address: str) -> Iterator[str]:
    """Where the pages of the driver in `tmp_path` are."""
    environment = {"CSI_ENDPOINT": f"unix://{tmp_path}/csi.sock", "SNODE_HEALTH": address}
    server = serve_health(load(None, environment=environment))
    yield f"http://{address}"
    server.shutdown()
    server.server_close()


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_pages_of_a_driver_that_gets_ready(driver: _Driver, health: str) -> None:
    code, said = _get(f"{health}/readyz")
    assert (code, said) == (503, "not ready: it has not looked at its parts yet\n")
    assert _get(f"{health}/livez") == (200, "not ready, but alive: it has not looked at its parts yet\n")
    driver.readiness.look(Deadline.after(1))
    assert _get(f"{health}/readyz") == _get(f"{health}/livez") == (200, "ready\n")


def test_pages_of_a_driver_that_lacks_something(driver: _Driver, health: str) -> None:
    driver.problems.append(_PROBLEM)
    driver.readiness.look(Deadline.after(1))
    assert _get(f"{health}/readyz") == (503, f"not ready: {_PROBLEM}\n")
    assert _get(f"{health}/livez") == (200, f"not ready, but alive: {_PROBLEM}\n")


def test_a_driver_that_does_not_answer_is_not_alive(health: str) -> None:
    code, said = _get(f"{health}/livez")
    assert code == 503
    assert "nothing answers there; is the driver running" in said


def test_no_other_page(health: str) -> None:
    code, said = _get(f"{health}/metrics")
    assert code == 404
    assert "/readyz, /livez" in said


def test_a_client_that_says_nothing_keeps_nobody_waiting(driver: _Driver, health: str, address: str) -> None:
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port))):
        assert _get(f"{health}/livez")[0] == 200


def test_many_clients_that_say_nothing_are_sent_away(driver: _Driver, health: str, address: str) -> None:
    host, _, port = address.partition(":")
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(12)]
        clients[-1].settimeout(5)
        assert clients[-1].recv(1) == b"", "more than eight are served at once"
    wait_until(lambda: _answers(health), Deadline.after(5), what="answers again")


def _answers(health: str) -> bool:
    try:
        return _get(f"{health}/livez")[0] == 200
    except (OSError, RemoteDisconnected):
        return False


def test_a_client_that_says_a_little_at_a_time_is_left(
    driver: _Driver, health: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pages, "_SECONDS", 0.5)
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.settimeout(0.1)
        end = time.monotonic() + 5
        left = False
        while not left and time.monotonic() < end:
            try:
                client.sendall(b"G")
                left = client.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                left = True
        assert left


def test_an_address_that_is_taken_is_had_once_it_is_free(driver: _Driver, tmp_path: Path, address: str) -> None:
    host, _, port = address.partition(":")
    settings = load(None, environment={"CSI_ENDPOINT": f"unix://{tmp_path}/csi.sock", "SNODE_HEALTH": address})
    health = Health(settings)
    with (
        socket.create_server((host, int(port))),
        pytest.raises(Unavailable, match=f"health {address}: can't listen there: Address already in use"),
    ):
        health.turn(Deadline.after(1))
    health.turn(Deadline.after(1))
    health.turn(Deadline.after(1))
    assert _get(f"http://{address}/livez")[0] == 200
    assert health.server is not None
    health.server.shutdown()
    health.server.server_close()
