"""Docker for real, on two CNODEs that have their volumes from a SNODE: a database outlives its machine."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from csi import certs
from tests.lab import Lab, roles
from tests.lab.conftest import Say
from tests.lab.docker_host import IMAGE, DockerHost, add_docker_host, copy_certificate
from tests.lab.guest import Guest
from tests.lab.kernel import PROJECT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

_RUN = "docker run --network none"
_TLS_PORT = 9750
#: Commits row after row, each durable, and says so.
_WRITER = (
    "sqlite3 /data/db 'pragma journal_mode=wal; create table if not exists t (n integer primary key)' >/dev/null; "
    "n=$(sqlite3 /data/db 'select coalesce(max(n), 0) from t'); "
    "while true; do n=$((n+1)); "
    'sqlite3 /data/db "pragma synchronous=full; insert into t values ($n)" && echo committed $n; done'
)

_SNODE = """
listen = "tcp://{ip}:{port}"
[tls]
ca = "/etc/snode/tls/ca.pem"
cert = "/etc/snode/tls/snode.pem"
key = "/etc/snode/tls/snode.key"
[controller]
portals = ["{portal}"]
[pools.thick]
type = "lvm"
vg = "vg0"
"""
_CNODE = """
[tls]
ca = "/etc/snode/tls/ca.pem"
cert = "/etc/snode/tls/{name}.pem"
key = "/etc/snode/tls/{name}.key"
[docker]
controller = "tcp://{ip}:{port}"
[node]
name = "{name}"
replacement_timeout = 20
"""
_SNODE_COMMAND = (str(PROJECT / ".venv/bin/snode"),)


@dataclass
class Cloud:
    """A SNODE and two Docker hosts that take their volumes from it, over mutual TLS."""

    snode: Guest
    first: DockerHost
    second: DockerHost


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    ca = tmp_path_factory.mktemp("ca")
    with Lab() as lab:
        snode = roles.add_snode(lab)
        cnodes = [add_docker_host(lab, f"cnode{number}") for number in (1, 2)]
        lab.boot_all()
        certs.init(ca)
        certs.issue(ca, "snode", roles=["server"], addresses=[snode.ip])
        for cnode in cnodes:
            certs.issue(ca, cnode.name, roles=["node", "volumes"])
        for guest in (snode, *cnodes):
            copy_certificate(ca, guest)
        roles.start_snode(snode)
        config = _SNODE.format(ip=snode.ip, port=_TLS_PORT, portal=roles.portal(snode))
        roles.start_driver(snode, "controller", config)
        configs = {cnode.name: _CNODE.format(name=cnode.name, ip=snode.ip, port=_TLS_PORT) for cnode in cnodes}
        hosts = [DockerHost(cnode, configs[cnode.name], ca) for cnode in cnodes]
        lab.each(cnodes, lambda guest: hosts[cnodes.index(guest)].boot_work())
        yield Cloud(snode, *hosts)


class Writer:
    """A container that commits row after row, and what it said."""

    def __init__(self, host: DockerHost) -> None:
        self.rows: list[int] = []
        argv = [*_RUN.split(), "--rm", "--name", "writer", "-v", "data:/data", IMAGE, "sh", "-c", _WRITER]
        self._process = host.guest.spawn(argv, name="writer", on_line=self._hear)

    def _hear(self, line: str) -> None:
        if match := re.match(r"committed (\d+)", line):
            self.rows.append(int(match[1]))

    def wait(self, rows: int) -> None:
        """Wait for so many rows more."""
        self._process.wait_for(f"committed {(self.rows or [0])[-1] + rows}", 180)


def read(host: DockerHost) -> list[int]:
    """The rows that a container on this host finds."""
    found = host.docker(f"{_RUN.removeprefix('docker')} --rm -v data:/data {IMAGE} sqlite3 /data/db 'select n from t'")
    return sorted(int(line) for line in found.splitlines())


def refusal(host: DockerHost, volume: str = "data") -> str:
    """What a user of this host is told who wants the volume; it must be a refusal."""
    code, out = host.guest.run(f"{_RUN} --rm -v {volume}:/data {IMAGE} ls /data", 120)
    assert code, f"{host.guest.name} has the volume: {out}"
    return out


def take(host: DockerHost) -> float:
    """Seconds until a container of this host has the volume."""
    began = time.monotonic()
    while host.guest.run(f"{_RUN} --rm -v data:/data {IMAGE} ls /data", 120)[0]:
        assert time.monotonic() - began < 60
        time.sleep(0.5)
    return time.monotonic() - began


def restart(host: DockerHost) -> None:
    """Power comes back to a CNODE."""
    host.guest.boot()
    host.boot_work()


def leave_nothing(cloud: Cloud, *volumes: str) -> None:
    """The volumes can be removed from either host, and nothing of them stays."""
    for volume in volumes:
        cloud.second.docker(f"volume rm {volume}")
    assert cloud.first.docker("volume ls -q") == ""
    assert cloud.snode.run("lvs vg0 | grep v-")[0] == 1
    assert cloud.snode.run("tgtadm --lld iscsi --op show --mode target | grep io.snode")[0] == 1
    for host in (cloud.first, cloud.second):
        assert host.mounts() == []
        assert host.guest.run("ls /sys/class/iscsi_session/ | grep .")[0] == 1


def test_a_database_outlives_its_cnode(cloud: Cloud, say: Say) -> None:
    first, second = cloud.first, cloud.second
    first.docker("volume create -d snode -o size=200M -o pool=thick data")
    writer = Writer(first)
    writer.wait(20)
    out = refusal(second)
    assert "volume data is in use on node cnode1; stop its containers there" in out
    assert "snode volumes release data --node cnode1" in out
    code, out = second.guest.run([*_SNODE_COMMAND, "volumes", "release", "data", "--node", "cnode1"])
    assert code == 1 and "the certificate of cnode2" in out and "it is about the node cnode1" in out
    first.guest.kill9()
    rows = list(writer.rows)
    out = cloud.snode.sh([*_SNODE_COMMAND, "volumes", "release", "data", "--node", "cnode1"])
    assert out.endswith("data is free; node cnode1 can no longer reach it")
    present = read(second)
    assert present[: len(rows)] == rows == list(range(1, len(rows) + 1)), "a committed row is lost"
    say(f"{len(rows)} committed rows, {len(present)} found on the other CNODE")
    # The lost one comes back; nobody else uses the volume now.
    restart(first)
    assert read(first) == present
    leave_nothing(cloud, "data")


def test_a_silent_holder_loses_its_volume(cloud: Cloud, say: Say) -> None:
    first, second = cloud.first, cloud.second
    first.docker("volume create -d snode -o size=200M -o pool=thick -o takeover=15s data")
    assert '"takeover": "15s"' in second.docker("volume inspect data")
    second.docker("volume create -d snode -o size=100M -o takeover=15s other")
    second.docker(f"{_RUN.removeprefix('docker')} -d --name other -v other:/data {IMAGE}")
    writer = Writer(first)
    writer.wait(10)
    assert "s ago, and the volume may be taken after 15 s of silence" in refusal(second)
    # A holder whose network is slow is alive.
    first.guest.delay(1000, loss_percent=10)
    slow = time.monotonic()
    while time.monotonic() - slow < 25:
        assert "in use on node cnode1" in refusal(second)
    first.guest.delay()
    # So are holders that all fall silent at once: it is the SNODE that is cut off.
    cloud.snode.cut()
    time.sleep(20)
    cloud.snode.heal()
    told = [refusal(second) for _ in range(8)]
    assert "in use on node cnode1" in told[-1], told
    writer.wait(10)
    # The holder loses its power.
    first.guest.kill9()
    rows = list(writer.rows)
    seconds = take(second)
    present = read(second)
    assert present[: len(rows)] == rows == list(range(1, len(rows) + 1)), "a committed row is lost"
    say(f"taken {seconds:.1f} s after the power cut: {len(rows)} committed rows, {len(present)} found")
    restart(first)
    _a_holder_that_is_cut_off(cloud, say)
    leave_nothing(cloud, "data", "other")


def _a_holder_that_is_cut_off(cloud: Cloud, say: Say) -> None:
    """It is alive, and writes no more when it is back."""
    first, second = cloud.first, cloud.second
    writer = Writer(second)
    writer.wait(5)
    second.guest.cut()
    seconds = take(first)
    rows = list(writer.rows)
    present = read(first)
    assert set(rows) <= set(present), "a committed row is lost"
    second.guest.heal()
    time.sleep(5)
    assert read(first) == present
    assert writer.rows == rows
    say(f"taken {seconds:.1f} s after the cut, {len(present)} rows; none came when the old holder was back")
    second.docker("rm -f writer", 180)
    second.docker("rm -f other")
    roles.until(second.guest, "! grep -q /var/lib/snode/docker/ /proc/self/mountinfo", "the end of the mounts", 2400)
