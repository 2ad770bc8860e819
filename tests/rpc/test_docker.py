"""Docker's volume plugin API over its socket, with a real CSI server behind it whose use cases are in memory."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from csi.client import Client
from csi.deadline import Deadline
from csi.docker.api import Api, ApiServer
from csi.docker.options import Options, size_bytes
from csi.docker.plugin import Plugin
from csi.errors import InUse, Invalid, NotFound
from csi.model import Capability
from csi.pb import csi_pb2_grpc
from csi.records import RecordStore
from csi.rpc.endpoint import Endpoint
from csi.rpc.method import Calls
from csi.rpc.server import Server
from csi.services.controller import Controller
from csi.services.node import Node
from csi.staging import Staging
from csi.volumes import Volumes
from tests.rpc.use_cases import MemoryStaging, MemoryVolumes

OTHER = "1;node-b;;"


class OneNode(MemoryVolumes):
    """A volume is for one node at a time."""

    def publish(
        self, volume_id: str, *, node_id: str, capability: Capability, readonly: bool, deadline: Deadline
    ) -> dict[str, str]:
        if set(self.published.get(volume_id, {})) - {node_id}:
            raise InUse(f"volume {volume_id}: published to another node")
        return super().publish(volume_id, node_id=node_id, capability=capability, readonly=readonly, deadline=deadline)


class Machine:
    """A machine with the plugin; Docker speaks to it by `call`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.volumes, self.staging = OneNode(), MemoryStaging()
        calls = Calls()
        controller = Controller(calls=calls, volumes=cast(Volumes, self.volumes))
        node = Node(calls=calls, staging=cast(Staging, self.staging))
        self.endpoint = Endpoint(socket=folder / "csi.sock")
        self.server = Server(
            self.endpoint,
            calls=calls,
            registrations=[
                partial(csi_pb2_grpc.add_ControllerServicer_to_server, controller),
                partial(csi_pb2_grpc.add_NodeServicer_to_server, node),
            ],
        )
        self.server.start()
        self.client = Client(self.endpoint)
        self.shown: set[Path] = set()  # what containers show
        self.api: ApiServer | None = None
        self.start()

    def start(self, boot: str = "first") -> None:
        """Start the plugin, again if it runs."""
        self.stop()
        self.plugin = Plugin(
            controller=self.client,
            node=self.client,
            records=RecordStore(self.folder / "uses"),
            folder=self.folder,
            boot=boot,
            is_shown=lambda path: path in self.shown,
        )
        path = self.folder / "snode.sock"
        path.unlink(missing_ok=True)
        self.api = ApiServer(path, Api(self.plugin))
        self.api.start()

    def stop(self) -> None:
        if self.api is not None:
            self.api.shutdown()
            self.api.server_close()

    def ask(self, call: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("docker")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.folder / "snode.sock"))
        try:
            connection.request("POST", f"/{call}", json.dumps(fields))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def ok(self, call: str, **fields: Any) -> dict[str, Any]:
        status, answer = self.ask(f"VolumeDriver.{call}", **fields)
        assert (status, answer["Err"]) == (200, ""), answer
        return answer

    def fails(self, call: str, **fields: Any) -> str:
        status, answer = self.ask(f"VolumeDriver.{call}", **fields)
        assert status == 500, answer
        return str(answer["Err"])

    def in_use(self) -> bool:
        """Whether the volume is published, staged and shown, which must agree."""
        published = any(self.volumes.published.values())
        assert published == bool(self.staging.staged) == bool(self.staging.targets)
        return published


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.stop()
    made.client.close()
    assert made.server.stop(grace_seconds=0)


def test_a_volume_from_its_making_to_its_end(machine: Machine) -> None:
    assert machine.ask("Plugin.Activate") == (200, {"Implements": ["VolumeDriver"], "Err": ""})
    assert machine.ok("Capabilities")["Capabilities"] == {"Scope": "global"}
    options = {"size": "1G", "pool": "fast", "fs": "xfs", "takeover": "15s"}
    machine.ok("Create", Name="data", Opts=options)
    machine.ok("Create", Name="data", Opts=options)
    machine.ok("Create", Name="data")
    found = machine.ok("Get", Name="data")["Volume"]
    assert found["Mountpoint"] == ""
    wanted = {"pool": "fast", "size_bytes": 1 << 30, "fs": "xfs", "takeover": "15s", "used_on": []}
    assert {key: value for key, value in found["Status"].items() if key != "id"} == wanted
    path = machine.ok("Mount", Name="data", ID="one")["Mountpoint"]
    assert machine.ok("List")["Volumes"] == [{"Name": "data", "Mountpoint": path}]
    assert machine.ok("Path", Name="data")["Mountpoint"] == path
    assert "1 container(s) of this machine use it" in machine.fails("Remove", Name="data")
    machine.ok("Unmount", Name="data", ID="one")
    assert not machine.in_use()
    machine.ok("Remove", Name="data")
    machine.ok("Remove", Name="data")
    assert machine.ok("List")["Volumes"] == []
    assert "make it: docker volume create -d snode" in machine.fails("Get", Name="data")
    assert list((machine.folder / "uses").glob("*.json")) == []


def test_the_last_use_detaches_whatever_restarts_between(machine: Machine) -> None:
    machine.ok("Create", Name="data")
    for use in ("one", "two", "two"):
        machine.ok("Mount", Name="data", ID=use)
    machine.start()
    machine.ok("Unmount", Name="data", ID="unknown")
    machine.ok("Unmount", Name="data", ID="one")
    machine.ok("Unmount", Name="data", ID="one")
    assert machine.in_use()
    machine.start()
    machine.ok("Unmount", Name="data", ID="two")
    assert not machine.in_use()


def test_uses_end_with_docker_and_with_the_machine(machine: Machine) -> None:
    machine.ok("Create", Name="data")
    path = machine.ok("Mount", Name="data", ID="one")["Mountpoint"]
    machine.shown = {Path(path)}
    machine.ask("Plugin.Activate")
    assert machine.in_use(), "a container that outlived Docker has it"
    machine.shown = set()
    machine.ask("Plugin.Activate")
    assert not machine.in_use()
    machine.ok("Mount", Name="data", ID="two")
    machine.start(boot="second")
    machine.staging.staged.clear()
    machine.staging.targets.clear()
    assert machine.ok("Path", Name="data")["Mountpoint"] == ""
    machine.ok("Mount", Name="data", ID="three")
    machine.ok("Unmount", Name="data", ID="three")
    assert not machine.in_use(), "the use of the boot before counts no more"


def test_a_volume_of_another_node_is_refused_by_that_nodes_name(machine: Machine) -> None:
    machine.ok("Create", Name="data")
    (volume_id,) = machine.volumes.volumes
    machine.volumes.published[volume_id] = {OTHER: (cast(Capability, None), False)}
    told = machine.fails("Mount", Name="data", ID="one")
    assert told.startswith("volume data is in use on node node-b; stop its containers there.")
    assert "If that node is lost: snode volumes release data --node node-b" in told
    assert machine.ok("Path", Name="data")["Mountpoint"] == ""
    assert machine.ok("Get", Name="data")["Volume"]["Status"]["used_on"] == ["node-b"]
    # Released, it can be used here.
    line = machine.client.find("data")
    with pytest.raises(NotFound, match="volume data: is published to node-b, not to node-c"):
        machine.client.release(line, node="node-c")
    machine.client.release(line, node="node-b")
    machine.ok("Mount", Name="data", ID="one")
    machine.ok("Unmount", Name="data", ID="one")


def test_what_no_snode_can_cut_is_not_released(machine: Machine) -> None:
    machine.volumes.local_to = "node-a"
    machine.ok("Create", Name="data")
    machine.ok("Mount", Name="data", ID="one")
    with pytest.raises(InUse, match="on node node-a itself"):
        machine.client.release(machine.client.find("data"), node="node-a")
    assert machine.in_use()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "lots"}, "'lots' is no size; write 1G, 500M or 1.5T"),
        ({"siz": "1G"}, "option 'siz' is unknown; did you mean size?"),
        ({"takeovr": "1G"}, "did you mean takeover?"),
        ({"takeover": "15"}, "parameters.takeover: '15' is not a time from 10s to 24h, such as 15s"),
        ({"fs": "ntfs"}, "'ntfs'"),
    ],
)
def test_a_wrong_option_is_told(machine: Machine, options: Mapping[str, str], words: str) -> None:
    assert words in machine.fails("Create", Name="data", Opts=options)
    assert machine.volumes.volumes == {}


@pytest.mark.parametrize(
    ("text", "size"),
    [("1G", 1 << 30), ("1.5g", 3 << 29), ("500M", 500 << 20), ("10GiB", 10 << 30), ("7", 7), ("1 T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size == Options.parse({"size": text}).size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1G", "G", "1X", "1e3", "9E", "1G1", "0.0001"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(Invalid, match="option size"):
        size_bytes(text)


def test_nonsense_harms_nothing(machine: Machine) -> None:
    assert machine.ask("VolumeDriver.Unknown")[0] == 404
    assert machine.ask("VolumeDriver.Create")[0] == 400
    for name in ("", "../x", "a b", "x" * 129, "-x"):
        assert "a name has 1 to 128" in machine.fails("Create", Name=name)
    assert machine.ok("List")["Volumes"] == []
