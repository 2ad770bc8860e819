"""When a node was last heard of."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from csi.exports.liveness import GAP_SECONDS, Liveness
from csi.exports.tcp_diag import plain_address, silent_seconds
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_target import Targets
from tests.unit.exports.conftest import Make, build_export, soon
from tests.unit.exports.daemons import FakeDaemon, RealDaemon


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_kernel_tells_how_long_a_peer_is_silent(family: socket.AddressFamily) -> None:
    address = "127.0.0.1" if family is socket.AF_INET else "::1"
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((address, 0), family=family))
        port = server.getsockname()[1]
        client = stack.enter_context(socket.create_connection((address, port)))
        accepted = stack.enter_context(server.accept()[0])
        time.sleep(0.3)
        assert silent_seconds(port).keys() == {address}
        assert silent_seconds(port)[address] >= 0.25
        client.send(b"x")
        accepted.recv(1)
        assert silent_seconds(port)[address] < 0.25
        assert silent_seconds(client.getsockname()[1]).keys() == {address}, "the local port is meant"
        # A bare ACK is a sign of life too.
        time.sleep(0.3)
        accepted.send(b"x")
        time.sleep(0.05)
        assert silent_seconds(port)[address] < 0.25


def test_the_liveliest_connection_counts() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        clients = [stack.enter_context(socket.create_connection(server.getsockname())) for _ in range(3)]
        for _ in clients:
            stack.enter_context(server.accept()[0])
        time.sleep(0.3)
        clients[1].send(b"x")
        time.sleep(0.02)
        assert silent_seconds(server.getsockname()[1])["127.0.0.1"] < 0.2


def test_addresses_have_one_form() -> None:
    assert plain_address("::ffff:192.0.2.1") == "192.0.2.1"
    assert plain_address("[2001:DB8:0::1]") == "2001:db8::1"
    assert plain_address("fe80::1%eth0") == "fe80::1"
    assert plain_address("Unknown") == ""


class World:
    """tgtd, a clock, and the kernel's word."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self.now = 1000.0
        self.silence: dict[str, float] = {"127.0.0.1": 0.0}
        self.born = 1
        client = TgtClient(daemon.socket)
        self._targets = Targets(client)
        self.liveness = Liveness(client, ports=[3260], clock=lambda: self.now, read_silence=lambda _port: self.silence)

    def look(self, *, after: float = 2.0) -> None:
        self.now += after
        self.liveness.look(self._targets.all(soon()), soon(), born=self.born)

    def idle(self, target: str) -> float | None:
        return self.liveness.idle_seconds(target)


@pytest.fixture
def world(fake_daemon: FakeDaemon) -> Iterator[World]:
    yield World(fake_daemon)


def test_silence_counts_on_when_tgtd_gives_the_session_up(world: World, fake_daemon: FakeDaemon, make: Make) -> None:
    publication = make()
    build_export(fake_daemon).ensure(publication, soon())
    target = publication.target
    assert world.idle(target) is None, "not looked yet"
    session = fake_daemon.login(publication)
    world.look()
    assert world.idle(target) == 0 and world.liveness.had_session(target)
    for second in range(2, 14, 2):
        world.silence = {"127.0.0.1": float(second)}
        world.look()
        assert world.idle(target) == second
    session.close()
    world.silence = {}
    world.look()
    assert world.idle(target) == 14
    # It is back, with another session.
    fake_daemon.login(publication)
    world.silence = {"127.0.0.1": 0.5}
    world.look()
    assert world.idle(target) == 0.5


def test_without_a_session_it_counts_from_the_first_look(world: World, fake_daemon: FakeDaemon, make: Make) -> None:
    publication = make()
    build_export(fake_daemon).ensure(publication, soon())
    world.look()
    world.look()
    assert world.idle(publication.target) == 2 and not world.liveness.had_session(publication.target)
    assert world.idle("iqn.a:unknown") is None


@pytest.mark.parametrize("what", ["gap", "restart"])
def test_what_was_not_observed_counts_as_life(what: str, world: World, fake_daemon: FakeDaemon, make: Make) -> None:
    publication = make()
    build_export(fake_daemon).ensure(publication, soon())
    world.look()
    for _ in range(6):
        world.look()
    assert world.idle(publication.target) == 12
    if what == "gap":
        world.now += GAP_SECONDS + 1
        assert world.idle(publication.target) is None, "the last look is too old"
        world.look(after=0)
    else:
        world.born = 2
        world.look()
    assert world.idle(publication.target) == 0


def test_a_session_that_the_kernel_does_not_know_is_alive(world: World, fake_daemon: FakeDaemon, make: Make) -> None:
    """Ports may be mapped between the portal and tgtd."""
    publication = make()
    build_export(fake_daemon).ensure(publication, soon())
    fake_daemon.login(publication)
    world.silence = {}
    for _ in range(10):
        world.look()
    assert world.idle(publication.target) == 0


def test_a_connection_that_is_gone_before_its_session_is_silent(
    world: World, fake_daemon: FakeDaemon, make: Make
) -> None:
    publication = make()
    build_export(fake_daemon).ensure(publication, soon())
    fake_daemon.login(publication)
    world.look()
    world.silence = {}
    world.look()
    world.look()
    assert world.idle(publication.target) == 4


def test_a_real_tgtd_tells_the_peers_address(real_daemon: RealDaemon, make: Make) -> None:
    export = build_export(real_daemon)
    publication = make()
    export.ensure(publication, soon())
    assert export.idle_seconds(publication) is None
    session = real_daemon.login(publication)
    export.reconcile(lambda: [publication], soon())
    assert (export.idle_seconds(publication) or 9) < 0.5
    time.sleep(0.6)
    export.reconcile(lambda: [publication], soon())
    assert 0.5 < (export.idle_seconds(publication) or 0) < 2, "the library sends nothing by itself"
    assert session.alive()
    export.reconcile(lambda: [publication], soon())
    assert (export.idle_seconds(publication) or 9) < 0.5
    session.close()
    time.sleep(0.4)
    export.reconcile(lambda: [publication], soon())
    assert 0.3 < (export.idle_seconds(publication) or 0) < 2
