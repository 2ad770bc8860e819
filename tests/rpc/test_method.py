"""What all RPCs have in common: codes, deadline, slots, the stop flag, the log."""

import logging
from typing import Any

import grpc
import pytest
import structlog

from csi import errors
from csi.pb import csi_pb2 as pb
from csi.rpc.redact import redacted
from csi.rpc.status import CODES, code_of
from tests.rpc.service import Driver, create, mount

CSI_TABLE = {
    errors.Invalid: "INVALID_ARGUMENT",
    errors.NotFound: "NOT_FOUND",
    errors.Conflict: "ALREADY_EXISTS",
    errors.OutOfRange: "OUT_OF_RANGE",
    errors.NoSpace: "RESOURCE_EXHAUSTED",
    errors.InUse: "FAILED_PRECONDITION",
    errors.Busy: "ABORTED",
    errors.Stale: "ABORTED",
    errors.Timeout: "DEADLINE_EXCEEDED",
    errors.Forbidden: "PERMISSION_DENIED",
    errors.Unsupported: "UNIMPLEMENTED",
    errors.Unavailable: "UNAVAILABLE",
    errors.DataLoss: "DATA_LOSS",
    errors.CommandFailed: "INTERNAL",
    errors.DriverError: "INTERNAL",
}


@pytest.mark.parametrize("kind", CSI_TABLE, ids=lambda kind: kind.__name__)
def test_each_error_reaches_the_caller_with_its_code_and_message(kind: type[errors.DriverError]) -> None:
    driver = Driver()
    driver.volumes.raises = kind("pool fast: the reason; the repair")
    driver.fails(create(), grpc.StatusCode[CSI_TABLE[kind]], "pool fast: the reason; the repair")


def test_no_error_is_without_a_code() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type)}
    assert classes == set(CODES) == set(CSI_TABLE)


def test_a_subclass_has_its_ancestors_code() -> None:
    class Fuller(errors.NoSpace):
        pass

    assert code_of(Fuller("x")) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unforeseen_exception_is_internal_and_its_text_stays_in_the_log() -> None:
    driver = Driver()
    driver.volumes.raises = KeyError("private-detail")
    with structlog.testing.capture_logs() as lines:
        details = driver.fails(create(), grpc.StatusCode.INTERNAL, "KeyError", "CreateVolume")
    assert "private-detail" not in details
    assert any("private-detail" in line.get("traceback", "") for line in lines)


def test_a_message_that_headers_can_not_carry_is_cut() -> None:
    driver = Driver()
    driver.volumes.raises = errors.NoSpace("\udc80" + "x" * 10_000)
    assert 1000 < len(driver.fails(create(), grpc.StatusCode.RESOURCE_EXHAUSTED)) < 3000


@pytest.mark.parametrize(("client", "expected"), [(5.0, 5.0), (None, 30.0), (3600.0, 30.0)])
def test_the_deadline_is_the_clients_or_the_longest(client: float | None, expected: float) -> None:
    driver = Driver(longest_seconds=30.0)
    driver.call(create(), timeout=client)
    assert expected - 2 < driver.volumes.deadlines[0] <= expected


def test_when_all_slots_are_taken_probe_and_info_still_answer() -> None:
    import threading

    driver = Driver(slots=3)
    gate = driver.volumes.gate = threading.Event()
    held = [driver.begin(create(f"held-{at}")) for at in range(3)]
    for _ in held:
        assert driver.volumes.entered.acquire(timeout=5)
    driver.fails(create("late"), grpc.StatusCode.UNAVAILABLE, "3 requests are under way")
    driver.fails(pb.ListVolumesRequest(), grpc.StatusCode.UNAVAILABLE)
    assert driver.ok(pb.ProbeRequest()).ready.value
    for request in (
        pb.GetPluginInfoRequest(),
        pb.GetPluginCapabilitiesRequest(),
        pb.ControllerGetCapabilitiesRequest(),
        pb.NodeGetCapabilitiesRequest(),
        pb.NodeGetInfoRequest(),
    ):
        driver.ok(request)
    gate.set()
    assert all(call.termination()[2] is grpc.StatusCode.OK for call in held)
    driver.ok(create("late"))


def test_a_stopping_service_ends_waits_with_unavailable() -> None:
    import threading

    driver = Driver()
    gate = driver.volumes.gate = threading.Event()
    call = driver.begin(create())
    assert driver.volumes.entered.acquire(timeout=5)
    assert driver.calls.wait_idle(0.05) != []
    driver.stop.set()
    gate.set()
    _, _, code, details = call.termination()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in details
    assert driver.calls.wait_idle(5) == []


def _line(lines: list[Any], method: str) -> Any:
    (line,) = [line for line in lines if line["event"] == "rpc" and line.get("method", method) == method]
    return line


def test_one_log_line_an_rpc_and_probe_at_debug() -> None:
    driver = Driver()
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        volume_id = driver.ok(create("claim")).volume.volume_id
        driver.fails(pb.ControllerGetVolumeRequest(volume_id="v-nope"), grpc.StatusCode.NOT_FOUND)
        driver.ok(pb.ProbeRequest())
        driver.ok(pb.DeleteVolumeRequest(volume_id=volume_id))
    made = _line(lines, "CreateVolume")
    assert (made["code"], made["volume"], made["log_level"]) == ("OK", "claim", "info")
    assert made["ms"] >= 0
    missing = _line(lines, "ControllerGetVolume")
    assert (missing["code"], missing["volume"], missing["log_level"]) == ("NOT_FOUND", "v-nope", "warning")
    assert _line(lines, "Probe")["log_level"] == "debug"
    assert _line(lines, "DeleteVolume")["volume"] == volume_id


def test_a_foreign_id_can_not_forge_log_lines() -> None:
    driver = Driver()
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        driver.call(pb.DeleteVolumeRequest(volume_id="x\n2026 [error] forged\x1b[2J" + "y" * 5000))
    (line,) = [line for line in lines if line["event"] == "rpc"]
    assert "\n" not in line["volume"]
    assert "\x1b" not in line["volume"]
    assert len(line["volume"]) < 200


SECRET = "s3ntinel-" + "f00d" * 4


def _with_secrets() -> list[Any]:
    secrets, context = {"key": SECRET}, {"sealed": SECRET}
    tokens = {"csi.storage.k8s.io/serviceAccount.tokens": SECRET}
    volume_id = "v-" + "a" * 26
    path = "/nowhere/x"
    return [
        create(secrets=secrets),
        create(volume_capabilities=[mount(flags=(f"context={SECRET}",))]),
        pb.DeleteVolumeRequest(volume_id=volume_id, secrets=secrets),
        pb.ControllerPublishVolumeRequest(
            volume_id=volume_id, node_id="1;a;;", volume_capability=mount(), secrets=secrets, volume_context=tokens
        ),
        pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, secrets=secrets),
        pb.ValidateVolumeCapabilitiesRequest(
            volume_id=volume_id, volume_capabilities=[mount()], secrets=secrets, volume_context=tokens
        ),
        pb.ControllerExpandVolumeRequest(
            volume_id=volume_id, capacity_range=pb.CapacityRange(required_bytes=1), secrets=secrets
        ),
        pb.NodeStageVolumeRequest(
            volume_id=volume_id,
            staging_target_path=path,
            volume_capability=mount(),
            secrets=secrets,
            publish_context=context,
            volume_context=tokens,
        ),
        pb.NodePublishVolumeRequest(
            volume_id=volume_id,
            staging_target_path=path,
            target_path=path,
            volume_capability=mount(),
            secrets=secrets,
            publish_context=context,
            volume_context=tokens,
        ),
        pb.NodeExpandVolumeRequest(volume_id=volume_id, volume_path=path, secrets=secrets),
    ]


@pytest.mark.parametrize("request_", _with_secrets(), ids=lambda request: type(request).__name__)
def test_no_secret_reaches_the_log_or_the_caller(
    request_: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from csi import log

    log.set_up(level="debug")
    assert logging.DEBUG  # the request itself is logged at this level
    try:
        driver = Driver()
        driver.volumes.raises = ValueError(f"unexpected {SECRET} in a dependency")
        reply = driver.call(request_)
    finally:
        structlog.reset_defaults()
    output = "".join(capfd.readouterr())
    assert "request" in output
    assert SECRET not in output
    if "mount_flags" not in reply.details:  # the caller's own flag is named to the caller
        assert SECRET not in reply.details


def test_what_is_hidden_shows_that_it_was_there() -> None:
    shown = redacted(create(secrets={"user": SECRET}, parameters={"pool": "fast"}))
    assert shown["secrets"] == {"user": "***"}
    assert shown["parameters"] == {"pool": "fast"}
    assert shown["name"] == "one"


def test_every_secret_field_of_the_contract_is_hidden() -> None:
    marked: Any = pb.csi_secret
    for name, kind in pb.DESCRIPTOR.message_types_by_name.items():
        for field in kind.fields:
            if field.GetOptions().Extensions[marked]:
                message = getattr(pb, name)()
                getattr(message, field.name)["k"] = SECRET
                assert SECRET not in str(redacted(message)), f"{name}.{field.name}"
