"""Registration with kubelet, asked as kubelet asks."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from csi.config import load
from csi.errors import Unavailable
from csi.pb import pluginregistration_pb2 as pb
from csi.pb import pluginregistration_pb2_grpc
from csi.rpc.endpoint import Endpoint
from csi.rpc.kubelet import KubeletRegistration
from csi.wire import _register_with_kubelet


@pytest.fixture
def registration(tmp_path: Path) -> KubeletRegistration:
    return KubeletRegistration(tmp_path, name="csi.snode.io", endpoint=Endpoint(socket=Path("/plugins/csi.sock")))


def test_kubelet_is_told_who_is_there_and_forgets_it_at_the_end(
    registration: KubeletRegistration, tmp_path: Path
) -> None:
    registration.start()
    path = tmp_path / "csi.snode.io-reg.sock"
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub: Any = pluginregistration_pb2_grpc.RegistrationStub(channel)
        info = stub.GetInfo(pb.InfoRequest(), timeout=10)
        assert (info.type, info.name, info.endpoint) == ("CSIPlugin", "csi.snode.io", "/plugins/csi.sock")
        assert list(info.supported_versions) == ["1.0.0"]
        for status in (pb.RegistrationStatus(plugin_registered=True), pb.RegistrationStatus(error="no such version")):
            assert stub.NotifyRegistrationStatus(status, timeout=10) == pb.RegistrationStatusResponse()
    registration.stop()
    assert not path.exists()


def test_a_second_driver_is_refused(registration: KubeletRegistration, tmp_path: Path) -> None:
    registration.start()
    again = KubeletRegistration(tmp_path, name="csi.snode.io", endpoint=Endpoint(socket=Path("/x")))
    with pytest.raises(Unavailable, match="another driver"):
        again.start()
    registration.stop()


def test_the_wire_is_that_of_kubelet() -> None:
    assert pb.DESCRIPTOR.services_by_name["Registration"].full_name == "pluginregistration.Registration"
    fields = {field.name: field.number for field in pb.PluginInfo.DESCRIPTOR.fields}
    assert fields == {"type": 1, "name": 2, "endpoint": 3, "supported_versions": 4}


def test_kubelet_is_told_of_every_snode(tmp_path: Path) -> None:
    """Each SNODE is a driver of its own to Kubernetes, and one node plugin serves them all."""
    config = tmp_path / "snode.toml"
    config.write_text(
        f'[node]\nkubelet_registry = "{tmp_path}"\nkubelet_drivers = ["csi.snode.io", "b.csi.snode.io"]\n'
    )
    registrations = _register_with_kubelet(load(config, environment={}))
    told = {}
    for path in sorted(tmp_path.glob("*-reg.sock")):
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub: Any = pluginregistration_pb2_grpc.RegistrationStub(channel)
            info = stub.GetInfo(pb.InfoRequest(), timeout=10)
            told[info.name] = info.endpoint
    assert told == {"csi.snode.io": "/run/snode/csi.sock", "b.csi.snode.io": "/run/snode/csi.sock"}
    for registration in registrations:
        registration.stop()
    assert list(tmp_path.glob("*.sock")) == []
