import grpc

from csi import __version__
from csi.background import Readiness
from csi.deadline import Deadline
from csi.pb import csi_pb2 as pb
from csi.rpc.status import PROBLEMS
from tests.rpc.service import Driver


def test_says_name_and_version() -> None:
    info = Driver().ok(pb.GetPluginInfoRequest())
    assert (info.name, info.vendor_version) == ("csi.test", __version__)


def _services(driver: Driver) -> set[int]:
    capabilities = driver.ok(pb.GetPluginCapabilitiesRequest()).capabilities
    return {c.service.type for c in capabilities if c.HasField("service")}


def test_controller_service_is_claimed_only_where_it_is_served() -> None:
    service = pb.PluginCapability.Service
    assert _services(Driver()) == {service.CONTROLLER_SERVICE, service.VOLUME_ACCESSIBILITY_CONSTRAINTS}


def test_volumes_grow_online() -> None:
    capabilities = Driver().ok(pb.GetPluginCapabilitiesRequest()).capabilities
    expansion = [c.volume_expansion.type for c in capabilities if c.HasField("volume_expansion")]
    assert expansion == [pb.PluginCapability.VolumeExpansion.ONLINE]


def test_probe_says_ready_then_why_not_then_ready_again() -> None:
    driver = Driver()
    assert driver.ok(pb.ProbeRequest()).ready.value
    driver.problems.append("tgtd does not answer; start it")
    driver.readiness.look(Deadline.after(1))
    # Not an error: Kubernetes' sidecars would end, and come back later and later.
    reply = driver.call(pb.ProbeRequest())
    assert reply.code is grpc.StatusCode.OK
    assert not reply.message.ready.value
    assert reply.trailing[PROBLEMS] == b"tgtd does not answer; start it"
    driver.problems.clear()
    driver.readiness.look(Deadline.after(1))
    assert driver.ok(pb.ProbeRequest()).ready.value


def test_probe_is_not_ready_before_the_first_look() -> None:
    driver = Driver()
    driver.readiness.__init__([])  # type: ignore[misc]
    response = driver.ok(pb.ProbeRequest())
    assert response.HasField("ready")
    assert not response.ready.value


def test_a_check_that_hangs_is_a_problem() -> None:
    readiness = Readiness([lambda _: []], stale_seconds=-1)
    readiness.look(Deadline.after(1))
    problems = readiness.problems()
    assert problems is not None
    assert "hangs" in problems[0]
