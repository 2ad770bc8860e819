"""Nomad for real: the jobs of deploy/nomad as a user runs them, and what happens to volumes under them.

A server on the host, a client on the SNODE and two on CNODEs, each with dockerd; the driver runs from its own image.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Lab, roles
from tests.lab.conftest import Say, seconds
from tests.lab.docker_host import IMAGE
from tests.lab.kernel import PROJECT
from tests.lab.nomad import Client, Nomad
from tests.lab.nomad_look import leftovers, on_cnode
from tests.lab.product_image import get_image

from . import readme

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

_DEPLOY = PROJECT / "deploy" / "nomad"
_PRODUCT = "localhost/snode-csi:1"
_POOLS = """
[pools.thick]
type = "lvm"
vg = "vg0"

[pools.thin]
type = "lvm-thin"
vg = "vg0"
thin_pool = "thin"
"""
_MIB = 1 << 20


def run_driver(nomad: Nomad) -> float:
    """Run the driver's two jobs as a user does; seconds until all of it is healthy."""
    began = time.monotonic()
    image = ["-var", f"image={_PRODUCT}", "-var", "log_level=debug"]
    portals = f'portals=["{roles.portal(nomad.snode.guest)}"]'
    controller = str(_DEPLOY / "controller.nomad.hcl")
    nomad("job", "run", "-detach", *image, "-var", portals, "-var", f"pools={_POOLS}", controller)
    nomad("job", "run", "-detach", *image, str(_DEPLOY / "node.nomad.hcl"))
    nomad.wait("the driver is healthy everywhere", lambda: nomad.plugin() == (1, len(nomad.cnodes)), 120)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def nomad() -> Iterator[Nomad]:
    with Lab() as lab:
        began = time.monotonic()
        made = Nomad(lab, [get_image(_PRODUCT)])
        booted = time.monotonic()
        run_driver(made)
        print(f"server and clients up in {booted - began:.1f} s, driver healthy {seconds(booted)} later")
        yield made


def specification(name: str, size: str) -> str:
    """A file of deploy/nomad/volumes with another size."""
    text, count = re.subn(r'(capacity_min *= *)"[^"]+"', rf'\1"{size}"', (_DEPLOY / "volumes" / name).read_text())
    assert count == 1
    return text


@dataclass
class App:
    """The application job, which writes line after line to the volume `data`."""

    nomad: Nomad
    acknowledged: list[int] = field(default_factory=list)

    def run(self) -> float:
        """Run the job; seconds until it writes."""
        began = time.monotonic()
        self.nomad("job", "run", "-detach", "-var", f"image={IMAGE}", str(_DEPLOY / "app.nomad.hcl"))
        self.nomad.wait("the application runs", self.allocation, 180)
        return time.monotonic() - began

    def allocation(self) -> dict[str, Any] | None:
        return self.nomad.running("app")

    def place(self) -> Client:
        """The client that it runs on."""
        found = self.allocation()
        assert found is not None, "the application does not run"
        return self.nomad.client(found["NodeName"])

    def elsewhere(self, name: str) -> bool:
        """Whether it runs, and on another client than this one."""
        found = self.allocation()
        return found is not None and found["NodeName"] != name

    def lines(self) -> list[int]:
        """What is on the volume, as the task sees it."""
        return [int(line) for line in self.inside("cat", "/data/lines").splitlines()]

    def size(self) -> int:
        """Bytes of the filesystem, as the task sees it."""
        return int(self.inside("df", "-B1", "/data").splitlines()[-1].split()[1])

    def inside(self, *argv: str) -> str:
        found = self.allocation()
        assert found is not None, "the application does not run"
        return self.nomad("alloc", "exec", "-i=false", "-t=false", found["ID"], *argv)

    def answers(self) -> bool:
        """Whether Nomad reaches the task."""
        found = self.allocation()
        return (
            found is not None and self.nomad.run("alloc", "exec", "-i=false", "-t=false", found["ID"], "true")[0] == 0
        )

    def listen(self) -> None:
        """Hear of each line that the task has made durable, as it says so."""
        found = self.allocation()
        assert found is not None
        argv = ["docker", "logs", "--tail=1", "-f", f"app-{found['ID']}"]
        self.place().guest.spawn(argv, name="app", on_line=self._hear).wait_for("written", 30)

    def _hear(self, line: str) -> None:
        if match := re.match(r"written (\d+)", line):
            self.acknowledged.append(int(match[1]))

    def check(self) -> int:
        """Every line is there that was acknowledged, once, and nothing else; returns how many there are."""
        found = self.lines()
        assert found == list(range(1, len(found) + 1)), "lines are missing or foreign"
        assert not self.acknowledged or len(found) >= self.acknowledged[-1], "an acknowledged line is lost"
        return len(found)

    def wait_for_lines(self, count: int) -> None:
        self.nomad.wait(f"line {count}", lambda: len(self.lines()) >= count, 30)

    def stop(self) -> None:
        """Stop the job, and wait until nobody holds its volume."""
        self.nomad("job", "stop", "-purge", "-detach", "app")
        self.nomad.wait("no claim of the volume is left", lambda: self.nomad.is_free("data"), 90)


@pytest.fixture
def app(nomad: Nomad) -> Iterator[App]:
    """The application on a new volume. At the end the volume is deleted, and nothing of it may be left anywhere."""
    nomad("volume", "create", "-", stdin=specification("data.hcl", "128MiB"))
    made = App(nomad)
    made.run()
    made.wait_for_lines(3)
    yield made
    made.stop()
    nomad("volume", "delete", "data")
    assert leftovers(nomad) == {}


def test_a_volume_grows_under_its_task(app: App, nomad: Nomad, say: Say) -> None:
    assert 96 * _MIB < app.size() <= 128 * _MIB
    allocation = app.allocation()
    began = time.monotonic()
    nomad("volume", "create", "-", stdin=specification("data.hcl", "256MiB"))
    took = seconds(began)
    assert 192 * _MIB < app.size() <= 256 * _MIB
    app.wait_for_lines(app.check() + 3)
    app.check()
    now = app.allocation()
    assert allocation and now and now["ID"] == allocation["ID"], "the task was not left alone"
    say(f"volume grown under its task in {took}")
    # Not smaller, and not deleted while it is in use.
    code, out = nomad.run("volume", "delete", "data")
    assert code and "unpublish it first" in out, out


def test_a_drain_moves_the_task_with_its_data(app: App, nomad: Nomad, say: Say) -> None:
    """Without -ignore-system Nomad stops the node's plugin too, in the moment in which it should detach."""
    here = app.place()
    app.listen()
    began = time.monotonic()
    nomad("node", "drain", "-enable", "-yes", "-detach", nomad.node(here.name)["ID"])
    nomad.wait("the application runs elsewhere", lambda: app.elsewhere(here.name), 90)
    moved = seconds(began)
    app.check()
    nomad.wait("the drain is done", lambda: not nomad.node(here.name)["Drain"], 90)
    nomad.wait("the plugin is stopped too", lambda: not nomad.plugin_on(here.name), 60)
    say(f"drained: running elsewhere after {moved}")
    assert on_cnode(here.guest) == {}
    nomad("node", "eligibility", "-enable", nomad.node(here.name)["ID"])
    nomad.wait("the plugin is back", lambda: nomad.plugin_on(here.name), 60)


def test_a_lost_client_keeps_nothing_back(app: App, nomad: Nomad, say: Say) -> None:
    lost = app.place()
    app.listen()
    app.wait_for_lines(app.check() + 3)
    began = time.monotonic()
    lost.guest.kill9()
    written = app.acknowledged[-1]
    nomad.wait("Nomad has noticed", lambda: nomad.node(lost.name)["Status"] == "down", 90)
    noticed = seconds(began)
    nomad.wait("the application runs elsewhere", lambda: app.elsewhere(lost.name), 120)
    say(f"power cut: client down after {noticed}, running elsewhere after {seconds(began)}, {written} lines kept")
    assert app.check() >= written
    allocation = app.allocation()
    assert allocation
    nomad.wait("the claim of the lost client is free", lambda: nomad.claims("data") == [allocation["ID"]], 60)
    # It comes back: its plugin gets healthy by itself, and the volume can be used there again.
    began = time.monotonic()
    lost.boot()
    nomad.wait("the client is back", lambda: nomad.node(lost.name)["Status"] == "ready", 60)
    back = seconds(began)
    nomad.wait("its plugin is healthy", lambda: nomad.plugin_on(lost.name), 120)
    say(f"client back after {back}, its plugin healthy after {seconds(began)}")
    nomad.wait("nothing is left there", lambda: not on_cnode(lost.guest), 30)
    other = app.place()
    nomad("node", "drain", "-enable", "-yes", "-detach", "-ignore-system", nomad.node(other.name)["ID"])
    nomad.wait("the application runs there again", lambda: app.elsewhere(other.name), 120)
    app.check()
    nomad("node", "eligibility", "-enable", nomad.node(other.name)["ID"])


def test_restarts_under_a_task(app: App, nomad: Nomad, say: Say) -> None:
    """The driver's containers and Nomad's agent die under a task that writes, and it goes on."""
    allocation, here = app.allocation(), app.place()
    for client in (here, nomad.snode):
        client.guest.sh("docker ps -q --filter name=snode- | xargs docker kill")
    assert here.agent is not None
    here.agent.signal(9)
    here.start_agent()
    nomad.wait("the agent answers", app.answers, 90)
    nomad.wait("the plugins are healthy", lambda: nomad.plugin() == (1, 2) and nomad.plugin_on(here.name), 120)
    app.wait_for_lines(app.check() + 3)
    now = app.allocation()
    assert allocation and now and now["ID"] == allocation["ID"], "the task was not left alone"
    app.check()


def test_a_volume_of_a_thin_pool(nomad: Nomad) -> None:
    nomad("volume", "create", "-", stdin=specification("thin.hcl", "512MiB"))
    assert "thin" in nomad.snode.guest.sh("lvs --noheadings -o pool_lv vg0")
    nomad("volume", "delete", "thin")
    assert leftovers(nomad) == {}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('pool = "thick"', 'pool = "fast"', "fast"),
        ('pool = "thick"', 'pol = "thick"', "'pol' is unknown; this driver knows: fs_type, pool"),
        ("128MiB", "900GiB", "is free on 1 disks"),
        ('fs_type = "ext4"', 'fs_type = "ntfs"', "supported are ext4, xfs, btrfs"),
    ],
    ids=["unknown pool", "unknown parameter", "full pool", "unknown filesystem"],
)
def test_what_is_wrong_with_a_volume_is_told(nomad: Nomad, old: str, new: str, words: str) -> None:
    text = specification("data.hcl", "128MiB")
    assert old in text
    code, out = nomad.run("volume", "create", "-", stdin=text.replace(old, new))
    assert code and words in out, out
    assert nomad.volumes() == []


def test_the_commands_of_the_readme(nomad: Nomad, tmp_path: Path, say: Say) -> None:
    """The last one: it runs the driver's jobs anew, with the pool thick alone."""
    began = time.monotonic()
    assert "data" in readme.run_for_nomad(nomad, _PRODUCT, tmp_path)
    app = App(nomad)
    app.wait_for_lines(3)
    say(f"the task of README.md has written after {seconds(began)}")
    app.stop()
    nomad("volume", "delete", "data")
    assert leftovers(nomad) == {}
