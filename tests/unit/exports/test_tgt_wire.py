"""The wire and the grammar before it, against a tgtd that misbehaves, and against the real one."""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi.deadline import Deadline
from csi.errors import DriverError, Invalid, NoSpace, Timeout, Unavailable
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_wire import MAX_TEXT, REQUEST, Code, Mode, Op, Refused, Wire
from csi.run import Boundary
from tests.unit.exports.conftest import soon
from tests.unit.exports.daemons import FakeDaemon, RealDaemon

Stub = Callable[[Callable[[socket.socket], object]], Path]


@pytest.fixture
def stub(folder: Path) -> Iterator[Stub]:
    """A server that does one thing with its first connection, after the header has come."""
    listener = socket.socket(socket.AF_UNIX)
    threads: list[threading.Thread] = []

    def serve(behave: Callable[[socket.socket], object]) -> Path:
        path = folder / "stub"
        listener.bind(os.fspath(path))
        listener.listen(8)

        def answer() -> None:
            with contextlib.suppress(OSError):  # the client may have left already
                connection, _ = listener.accept()
                with connection:
                    connection.recv(REQUEST.size, socket.MSG_WAITALL)
                    behave(connection)

        threads.append(threading.Thread(target=answer, daemon=True))
        threads[0].start()
        return path

    yield serve
    listener.close()
    for thread in threads:
        thread.join(5)


def _recorded(path: Path, ask: Callable[[], object]) -> bytes:
    """What is sent to a socket by one request."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(1)
        asking = threading.Thread(target=ask)
        asking.start()
        connection, _ = listener.accept()
        with connection:
            data = connection.recv(REQUEST.size, socket.MSG_WAITALL)
            data += connection.recv(REQUEST.unpack(data)[3] - REQUEST.size, socket.MSG_WAITALL)
            connection.sendall(struct.pack("=II", 0, 8))
        asking.join()
    return data


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (
            "--mode=target --op=new --tid=5 --targetname=iqn.a:b",
            lambda client: client.create_target(5, "iqn.a:b", soon()),
        ),
        ("--mode=target --op=delete --tid=5", lambda client: client.delete_target(5, "iqn.a:b", soon())),
        (
            "--mode=target --op=update --tid=5 --name=state --value=offline",
            lambda client: client.set_target(5, "state", "offline", soon()),
        ),
        ("--mode=target --op=show", lambda client: client.show_targets(soon())),
        (
            "--mode=target --op=bind --tid=5 --initiator-name=iqn.2001-04.com.example:n",
            lambda client: client.bind_initiator(5, "iqn.2001-04.com.example:n", soon()),
        ),
        (
            "--mode=target --op=unbind --tid=5 --initiator-name=iqn.2001-04.com.example:n",
            lambda client: client.unbind(5, "iqn.2001-04.com.example:n", soon()),
        ),
        (
            "--mode=target --op=unbind --tid=5 --initiator-address=192.0.2.1",
            lambda client: client.unbind(5, "192.0.2.1", soon()),
        ),
        (
            "--mode=account --op=new --user=n1 --password=a-good-secret",
            lambda client: client.create_account("n1", "a-good-secret", soon()),
        ),
        ("--mode=account --op=delete --user=n1", lambda client: client.delete_account("n1", soon())),
        (
            "--mode=account --op=bind --tid=5 --user=n1",
            lambda client: client.bind_account(5, "n1", outgoing=False, deadline=soon()),
        ),
        (
            "--mode=account --op=bind --tid=5 --user=n1 --outgoing",
            lambda client: client.bind_account(5, "n1", outgoing=True, deadline=soon()),
        ),
        (
            "--mode=logicalunit --op=new --tid=5 --lun=1 --backing-store=/dev/x --bstype=rdwr --bsoflags=direct",
            lambda client: client.create_lun(5, 1, Path("/dev/x"), soon()),
        ),
        (
            "--mode=logicalunit --op=update --tid=5 --lun=1 --params=readonly=1,vendor_id=X",
            lambda client: client.update_lun(5, 1, {"readonly": "1", "vendor_id": "X"}, soon()),
        ),
        ("--mode=logicalunit --op=delete --tid=5 --lun=1", lambda client: client.delete_lun(5, 1, soon())),
        (
            "--mode=conn --op=delete --tid=5 --sid=3 --cid=2",
            lambda client: client.close_connection(5, 3, 2, soon()),
        ),
        ("--mode=conn --op=show --tid=5", lambda client: client.show_connections(5, soon())),
        ("--mode=account --op=show", lambda client: client.show_accounts(soon())),
        ("--mode=lld --op=show", lambda client: client.show_names(soon())),
        ("--mode=system --op=show", lambda client: client.show_system(soon())),
        (
            "--mode=system --op=update --name=State --value=offline",
            lambda client: client.set_system_state("offline", soon()),
        ),
    ],
)
def test_requests_are_those_of_tgtadm(folder: Path, arguments: str, ours: Callable[[TgtClient], object]) -> None:
    assert shutil.which("tgtadm"), "tgtadm is missing: install the package tgt"
    path, environment = folder / "s.0", {"PATH": os.environ["PATH"], "TGT_IPC_SOCKET": str(folder / "s")}
    command = ["tgtadm", "--lld=iscsi", *arguments.split()]
    theirs = _recorded(path, lambda: subprocess.run(command, env=environment, check=True, timeout=10))
    mine = _recorded(path, lambda: ours(TgtClient(path)))
    assert _meaning(mine) == _meaning(theirs)


def _meaning(data: bytes) -> tuple[object, ...]:
    """The request without what tgtadm sets and tgtd does not read: a LUN of -1 where there is none, length and pack."""
    mode, op, driver, _, tid, sid, lun, cid, host, kind, direction, _, force = REQUEST.unpack(data[: REQUEST.size])
    text = data[REQUEST.size :].removeprefix(b"targetOps ").rstrip(b"\0").rstrip(b",")
    lun = 0 if lun == (1 << 64) - 1 else lun
    return mode, op, driver.rstrip(b"\0"), tid, sid, lun, cid, host, kind, direction, force, text


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0\0\0", struct.pack("=II", 0, 50), struct.pack("=II", 0, 50) + b"Target 1", struct.pack("=II", 0, 3)],
    ids=["nothing", "half-a-header", "header-only", "half-a-text", "impossible-length"],
)
def test_end_in_the_middle_is_an_error(stub: Stub, answer: bytes) -> None:
    """tgtadm ends with 0 here."""
    with pytest.raises(Unavailable, match="tgtd went away when asked to show targets"):
        TgtClient(stub(lambda connection: connection.sendall(answer))).show_targets(soon())


def test_huge_length_is_refused(stub: Stub) -> None:
    path = stub(lambda connection: connection.sendall(struct.pack("=II", 0, 0xFFFFFFFF)))
    with pytest.raises(Unavailable, match="makes no sense"):
        TgtClient(path).show_targets(soon())


def test_reply_that_does_not_come(stub: Stub) -> None:
    done = threading.Event()
    path = stub(lambda connection: done.wait(10))
    with pytest.raises(Timeout, match="did not answer in time when asked to show targets"):
        TgtClient(path).show_targets(soon(0.1))
    done.set()


def test_reply_that_drips_meets_the_deadline(stub: Stub) -> None:
    done = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(struct.pack("=II", 0, 1000))
        while not done.wait(0.02):
            connection.sendall(b"x")

    path = stub(drip)
    try:
        with pytest.raises(Timeout):
            TgtClient(path).show_targets(soon(0.2))
    finally:
        done.set()


def test_longest_call_is_bounded_without_a_deadline(stub: Stub) -> None:
    done = threading.Event()
    path = stub(lambda connection: done.wait(10))
    with pytest.raises(Timeout):
        TgtClient(path, call_seconds=0.1).show_targets(soon(60))
    done.set()


def test_no_socket_and_nobody_behind_it(folder: Path) -> None:
    path = folder / "socket.0"
    client = TgtClient(path)
    message = f"tgtd does not answer on {path} .* -> start it \\(systemctl start tgt\\)"
    with pytest.raises(Unavailable, match=message):
        client.show_targets(soon())
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with pytest.raises(Unavailable, match=message):
        client.show_targets(soon())


def test_full_queue_is_waited_for(folder: Path) -> None:
    path = folder / "socket.0"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(0)
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(os.fspath(path))
        with waiting, pytest.raises(Timeout, match="tgtd to take a request"):
            TgtClient(path).show_targets(soon(0.2))


def test_another_user_behind_the_socket(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stub(lambda connection: None)
    monkeypatch.setattr("csi.exports.tgt_wire._uid_of", lambda connection: 4711)
    with pytest.raises(Unavailable, match="served by user 4711, not by root"):
        TgtClient(path).create_account("someone", "a-good-secret", soon())


def test_a_past_deadline_sends_nothing(fake_daemon: FakeDaemon) -> None:
    with pytest.raises(Timeout):
        TgtClient(fake_daemon.socket).create_target(1, "iqn.2001-04.com.example:disk", Deadline.after(0))
    assert fake_daemon.fake.count() == 0


def test_boundary_is_called_around_changes_only(fake_daemon: FakeDaemon) -> None:
    names: list[str] = []
    boundary: Boundary = names.append
    client = TgtClient(fake_daemon.socket, boundary=boundary)
    client.show_targets(soon())
    client.create_target(1, "iqn.2001-04.com.example:disk", soon())
    assert names == ["tgt:target-new:before", "tgt:target-new:after"]


@pytest.mark.parametrize("code", [2, 16])
def test_out_of_memory_is_no_space(fake_daemon: FakeDaemon, code: int) -> None:
    fake_daemon.fake.fail("target-new", code=code)
    with pytest.raises(NoSpace, match="no room to create target"):
        TgtClient(fake_daemon.socket).create_target(1, "iqn.2001-04.com.example:disk", soon())


def test_no_driver_is_unavailable(fake_daemon: FakeDaemon) -> None:
    fake_daemon.fake.fail("target-new", code=3)
    with pytest.raises(Unavailable, match="without its iscsi driver"):
        TgtClient(fake_daemon.socket).create_target(1, "iqn.2001-04.com.example:disk", soon())


@pytest.mark.parametrize("code", [1, 17, 22, 99])
def test_refusal_names_the_request_and_the_number(fake_daemon: FakeDaemon, code: int) -> None:
    fake_daemon.fake.fail("target-new", code=code)
    with pytest.raises(Refused, match=rf"refused to create target iqn.2001-04.com.example:disk: .*\({code}\)"):
        TgtClient(fake_daemon.socket).create_target(1, "iqn.2001-04.com.example:disk", soon())


@pytest.fixture(params=["fake", "real"])
def client(request: pytest.FixtureRequest) -> TgtClient:
    return TgtClient(request.getfixturevalue(f"{request.param}_daemon").socket)


def test_error_numbers(client: TgtClient, folder: Path) -> None:
    device = folder / "disk"
    device.write_bytes(bytes(1 << 20))
    name, rule = "iqn.2001-04.com.example:disk", "iqn.2001-04.com.example:node"

    def refused(call: Callable[[], None], code: Code) -> None:
        with pytest.raises(Refused) as caught:
            call()
        assert caught.value.code == code

    refused(lambda: client.delete_target(1, name, soon()), Code.NO_TARGET)
    refused(lambda: client.set_target(1, "state", "ready", soon()), Code.NO_TARGET)
    refused(lambda: client.bind_initiator(1, rule, soon()), Code.NO_TARGET)
    client.create_target(1, name, soon())
    refused(lambda: client.create_target(1, "iqn.2001-04.com.example:other", soon()), Code.TARGET_EXISTS)
    refused(lambda: client.create_target(2, name, soon()), Code.TARGET_EXISTS)
    refused(lambda: client.delete_lun(1, 1, soon()), Code.NO_LUN)
    refused(lambda: client.update_lun(1, 1, {"readonly": "1"}, soon()), Code.NO_LUN)
    refused(lambda: client.create_lun(1, 1, device.with_name("nothing"), soon()), Code.INVALID_REQUEST)
    client.create_lun(1, 1, device, soon())
    refused(lambda: client.create_lun(1, 1, device, soon()), Code.LUN_EXISTS)
    refused(lambda: client.bind_account(1, "someone", outgoing=False, deadline=soon()), Code.NO_USER)
    refused(lambda: client.delete_account("someone", soon()), Code.NO_USER)
    client.create_account("someone", "a-good-secret", soon())
    client.create_account("another", "a-good-secret", soon())
    refused(lambda: client.create_account("someone", "a-good-secret", soon()), Code.USER_EXISTS)
    client.bind_account(1, "someone", outgoing=False, deadline=soon())
    refused(lambda: client.bind_account(1, "someone", outgoing=False, deadline=soon()), Code.USER_EXISTS)
    client.bind_account(1, "another", outgoing=True, deadline=soon())
    refused(lambda: client.bind_account(1, "another", outgoing=True, deadline=soon()), Code.OUTGOING_EXISTS)
    client.bind_initiator(1, rule, soon())
    refused(lambda: client.bind_initiator(1, rule, soon()), Code.ACL_EXISTS)
    client.unbind(1, rule, soon())
    refused(lambda: client.unbind(1, rule, soon()), Code.NO_ACL)
    refused(lambda: client.unbind(1, "192.0.2.1", soon()), Code.NO_ACL)
    refused(lambda: client.close_connection(1, 9, 0, soon()), Code.NO_SESSION)
    refused(lambda: client.set_target(1, "state", "strange", soon()), Code.INVALID_REQUEST)
    refused(lambda: client.set_target(1, "strange", "1", soon()), Code.INVALID_REQUEST)
    refused(lambda: client.set_system_state("strange", soon()), Code.INVALID_REQUEST)


BAD = ["", "a,b", "a\nb", "a\0b", "a b", "ä", "a" * 300, "a=b,c=d", "'; rm", "a\x7f"]


@pytest.mark.parametrize("bad", BAD)
def test_bad_values_are_not_sent(fake_daemon: FakeDaemon, bad: str) -> None:
    client, good = TgtClient(fake_daemon.socket), "a-good-secret"
    calls: list[Callable[[], None]] = [
        lambda: client.create_target(1, bad, soon()),
        lambda: client.create_account(bad, good, soon()),
        lambda: client.create_account("user", bad, soon()),
        lambda: client.delete_account(bad, soon()),
        lambda: client.bind_account(1, bad, outgoing=False, deadline=soon()),
        lambda: client.create_lun(1, 1, Path("/dev") / bad if "\0" in bad or "," in bad else Path(bad), soon()),
        lambda: client.update_lun(1, 1, {"scsi_id": bad}, soon()),
        lambda: client.update_lun(1, 1, {bad: "1"} if bad else {"": "1"}, soon()),
        lambda: client.bind_initiator(1, bad, soon()),
        lambda: client.unbind(1, bad, soon()),
        lambda: client.set_target(1, "state", bad, soon()),
        lambda: client.set_system_state(bad, soon()),
    ]
    for call in calls:
        with pytest.raises(Invalid):
            call()
    assert fake_daemon.fake.count() == 0


@pytest.mark.parametrize("tid", [0, -1, 1 << 31])
def test_bad_numbers_are_not_sent(fake_daemon: FakeDaemon, tid: int) -> None:
    with pytest.raises(Invalid):
        TgtClient(fake_daemon.socket).create_target(tid, "iqn.2001-04.com.example:disk", soon())
    assert fake_daemon.fake.count() == 0


def test_too_long_a_request(folder: Path) -> None:
    with pytest.raises(Invalid):
        Wire(folder / "nothing").ask(Mode.TARGET, Op.NEW, "try", soon(), text="x" * MAX_TEXT)


def test_bad_secret_is_not_in_the_error() -> None:
    with pytest.raises(Invalid) as caught:
        TgtClient(Path("/nothing")).create_account("user", "sentinel,secret", soon())
    assert "sentinel" not in str(caught.value)


def test_secret_is_not_in_the_error_of_a_failed_call(fake_daemon: FakeDaemon) -> None:
    client = TgtClient(fake_daemon.socket)
    for how in ("refuse", "cut"):
        fake_daemon.fake.fail("account-new", how=how)
        with pytest.raises(DriverError) as caught:
            client.create_account("user", "sentinel-secret", soon())
        error: BaseException | None = caught.value
        while error is not None:
            assert "sentinel" not in f"{error!r} {error}"
            error = error.__cause__ or error.__context__


def test_fuzzed_values_never_end_the_real_tgtd(real_daemon: RealDaemon, folder: Path) -> None:
    client, process = TgtClient(real_daemon.socket), real_daemon.process
    client.create_target(1, "iqn.2001-04.com.example:disk", soon())
    text = st.one_of(
        st.text(max_size=60), st.sampled_from([*BAD, "iqn.2001-04.com.example:x", "user", "ALL", "/dev/null"])
    )

    @settings(max_examples=150, deadline=None)
    @given(text, text, st.integers(-2, 1 << 32))
    def fuzz(first: str, second: str, number: int) -> None:
        calls: list[Callable[[], object]] = [
            lambda: client.create_target(number, first, soon()),
            lambda: client.create_account(first, second, soon()),
            lambda: client.bind_account(1, first, outgoing=True, deadline=soon()),
            lambda: client.create_lun(1, 1, Path(first), soon()),
            lambda: client.update_lun(1, 1, {first: second}, soon()),
            lambda: client.bind_initiator(1, first, soon()),
            lambda: client.unbind(1, first, soon()),
            lambda: client.set_target(1, first, second, soon()),
        ]
        for call in calls:
            with contextlib.suppress(Invalid, Refused):
                call()
        assert process.poll() is None
        assert client.show_targets(soon()).startswith("Target 1: iqn.2001-04.com.example:disk\n")

    fuzz()
