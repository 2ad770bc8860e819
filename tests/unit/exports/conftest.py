"""Daemons, devices and publications."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.exports.tgt import TgtExport
from csi.model import MIB, AccessMode, Capability, Chap, NodeId, Publication, volume_id_of
from tests.fakes.runner import FakeRunner
from tests.scratch_folder import ON_DISK, scratch_folder
from tests.unit.exports.daemons import Daemon, FakeDaemon, RealDaemon

NODE = NodeId(name="node-a", public_key="k" * 43, initiator="iqn.1993-08.org.debian:01:aaaaaaaa")
OTHER_NODE = NodeId(name="node-b", public_key="k" * 43, initiator="iqn.1993-08.org.debian:01:bbbbbbbb")

#: Makes a publication of a new volume; keyword arguments replace its fields.
Make = Callable[..., Publication]
#: Makes a TgtExport on a daemon; keyword arguments go to the constructor.
Build = Callable[..., TgtExport]


def soon(seconds: float = 20.0) -> Deadline:
    """A deadline that a healthy test never meets."""
    return Deadline.after(seconds)


def tgtd_version(text: str = "1.0.85\n") -> FakeRunner:
    """A runner with the one command that the export knows."""
    return FakeRunner({"tgtd": lambda argv, _input: (0, text, "")})


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a disk, because tmpfs may not take O_DIRECT; short, because a socket's path has at most 107 bytes."""
    with scratch_folder("tgt", base=ON_DISK) as path:
        yield path


@pytest.fixture
def make(folder: Path) -> Make:
    """A factory of publications, each with a device file of its own size."""
    numbers = itertools.count(1)

    def build(*, node: NodeId = NODE, size_bytes: int = 64 * MIB, **fields: object) -> Publication:
        number = next(numbers)
        device = folder / f"disk{number}"
        with device.open("wb") as file:
            file.truncate(size_bytes)
        publication = Publication(
            volume_id=volume_id_of(f"volume {number}"),
            pool="fast",
            node_id=str(node),
            protocol="iscsi",
            nonce=f"{number:016x}",
            tid=(1 << 30) + number,
            device=device,
            size_bytes=size_bytes,
            readonly=False,
            capability=Capability(AccessMode.SINGLE_NODE_WRITER),
            chap=Chap(
                user=f"n{number:016x}",
                secret=f"secret-of-node-{number:04}",
                mutual_user=f"t{number:016x}",
                mutual_secret=f"secret-of-target-{number:04}",
            ),
        )
        return replace(publication, **fields)  # type: ignore[arg-type]

    return build


@pytest.fixture
def fake_daemon(folder: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(folder)
    yield daemon
    daemon.stop()
    assert daemon.fake.unexpected == []


@pytest.fixture
def real_daemon(folder: Path) -> Iterator[RealDaemon]:
    daemon = RealDaemon(folder)
    yield daemon
    daemon.stop()


@pytest.fixture(params=["fake", "real"])
def daemon(request: pytest.FixtureRequest) -> Daemon:
    """Both, one after the other."""
    found: Daemon = request.getfixturevalue(f"{request.param}_daemon")
    return found


def build_export(daemon: Daemon, **arguments: object) -> TgtExport:
    """A TgtExport on a daemon."""
    fields: dict[str, object] = {"portals": [daemon.portal], "runner": tgtd_version(), **arguments}
    return TgtExport(daemon.socket, **fields)  # type: ignore[arg-type]
