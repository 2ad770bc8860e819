"""A tgtd that speaks the management protocol on a real unix socket and keeps its state in memory.

Its `show` texts are those of tgtd 1.0.85, letter by letter. Sessions are made with `login`; a session may have a
command in flight, and then outlives its connection until `drain`. A request that the real daemon would not stand, or
that the fake does not know, is noted in `unexpected`.
"""

import io
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from csi.errors import Unavailable
from csi.exports.tgt_wire import REPLY, REQUEST, Code, Mode, Op, Wire


class LoginRefused(Exception):
    """The target did not let the initiator in."""


class _Cut(Exception):
    """Close the connection instead of an answer."""


@dataclass
class FakeLun:
    """A logical unit."""

    number: int
    type: str
    scsi_id: str
    scsi_sn: str
    store: str
    flags: str = ""
    path: str = ""
    size_bytes: int = 0
    block_size: int = 512
    online: bool = True
    readonly: bool = False
    thin: bool = False
    vendor: str = ""
    active: bool = False  # commands in flight: it can't be deleted

    def open(self, path: str) -> bool:
        """Open the backing file; False when it can't be."""
        self.path, self.size_bytes, self.online = "", 0, False
        try:
            self.size_bytes = os.path.getsize(path)  # noqa: PTH202
        except OSError:
            return False
        self.path, self.online = path, True
        return True


@dataclass
class FakeSession:
    """A session of an initiator; its nexus stays while a command is in flight."""

    sid: int
    initiator: str
    alias: str = "none"
    connected: bool = True
    in_flight: bool = False


@dataclass
class FakeTarget:
    """A target."""

    tid: int
    name: str
    state: str = "ready"
    nop: dict[str, int] = field(default_factory=lambda: {"nop_interval": 0, "nop_count": 0})
    login_keys: dict[str, str] = field(default_factory=dict)
    luns: dict[int, FakeLun] = field(default_factory=dict)
    sessions: list[FakeSession] = field(default_factory=list)
    incoming: list[str] = field(default_factory=list)
    outgoing: str = ""
    addresses: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass
class _Fault:
    name: str
    nth: int
    after: bool
    how: str
    code: int


@dataclass(frozen=True)
class _Request:
    mode: Mode
    op: Op
    tid: int
    sid: int
    lun: int
    cid: int
    direction: int
    force: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.mode.name.lower()}-{self.op.name.lower()}"

    def pairs(self) -> list[tuple[str, str]]:
        """The parameters as tgtd splits them: at each comma."""
        return [(key, value) for key, _, value in (part.partition("=") for part in self.text.split(","))]


class FakeTgtd:
    """Start it with `start`, end it with `stop`. `path` is the socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.targets: dict[int, FakeTarget] = {}
        self.accounts: dict[str, str] = {}
        self.state = "ready"
        self.calls: list[str] = []
        self.unexpected: list[str] = []
        self.guard = threading.RLock()
        #: Called under the guard after each request, so that initiators may act between any two of them.
        self.after_call: Callable[[], None] = lambda: None
        self._sids = itertools.count(1)
        self._faults: list[_Fault] = []
        self._listener: socket.socket | None = None

    # -- what tests do -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen."""
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen(32)
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """End like kill -9: all state is lost, the socket file stays."""
        if self._listener is not None:
            # shutdown wakes the thread in accept(); close alone would leave it there
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self._forget()

    def restart(self) -> None:
        """End and start anew, with nothing."""
        self.stop()
        self.start()

    def fail(self, name: str, *, nth: int = 1, after: bool = False, how: str = "refuse", code: int = 1) -> None:
        """Make the nth request of this name from now fail, before or after it took effect.

        name: "target-new", "device-update", "account-bind", …, or "*". how: "refuse" answers `code`, "cut" closes the
        connection without an answer, "half" closes it in the middle of the answer, "die" loses all state as well,
        "hang" never answers.
        """
        self._faults.append(_Fault(name, nth, after, how, code))

    def forgive(self) -> None:
        """Drop the faults that did not come to pass."""
        self._faults.clear()

    def count(self, name: str = "") -> int:
        """How many requests came so far, of this name or all."""
        return sum(call == name or not name for call in self.calls)

    def by_name(self, name: str) -> FakeTarget | None:
        """The target of this name."""
        return next((target for target in self.targets.values() if target.name == name), None)

    def login(self, name: str, initiator: str, *, user: str = "", secret: str = "", alias: str = "none") -> FakeSession:
        """Log in as an initiator would, by tgtd's rules. Raises LoginRefused."""
        with self.guard:
            target = self.by_name(name)
            if self.state != "ready" or not self.targets:
                raise LoginRefused("connection closed")
            if target is None or not (initiator in target.names or target.addresses):
                raise LoginRefused("target not found")
            if target.state != "ready":
                raise LoginRefused("target error")
            if target.incoming and not (user in target.incoming and self.accounts[user] == secret):
                raise LoginRefused("authentication failure")
            return self.add_session(name, initiator, alias=alias)

    def add_session(self, name: str, initiator: str, *, alias: str = "none", in_flight: bool = False) -> FakeSession:
        """A session that nobody asked for permission."""
        with self.guard:
            target = self.by_name(name)
            assert target is not None
            session = FakeSession(next(self._sids), initiator, alias=alias, in_flight=in_flight)
            target.sessions.append(session)
            return session

    def drain(self, name: str) -> None:
        """The commands in flight end."""
        with self.guard:
            target = self.by_name(name)
            if target is None:
                return
            for lun in target.luns.values():
                lun.active = False
            for session in target.sessions:
                session.in_flight = False
            target.sessions = [session for session in target.sessions if session.connected]

    # -- the wire ------------------------------------------------------------------------------------------------

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            header = stream.read(REQUEST.size)
            if len(header) < REQUEST.size:
                return
            try:
                data = self._reply(header, stream.read(REQUEST.unpack(header)[3] - REQUEST.size))
            except _Cut as cut:
                if cut.args == ("hang",):
                    connection.settimeout(60)
                    stream.read(1)  # until the client gives up
                elif cut.args == ("half",):
                    connection.sendall(REPLY.pack(0, 400)[:6])
                return
            with suppress(ConnectionError):  # a client that was killed meanwhile
                connection.sendall(data)

    @contextmanager
    def in_process(self) -> Iterator[None]:
        """Until the end of the block every request of this process comes here directly: ten times as fast."""
        with mock.patch.object(Wire, "_connect", lambda _wire, _limit: _Direct(self)):
            yield

    def _reply(self, header: bytes, text: bytes) -> bytes:
        """What a request is answered with. Raises _Cut for an answer that does not come."""
        mode, op, driver, _, tid, sid, lun, cid, _, _, direction, _, force = REQUEST.unpack(header)
        if driver.rstrip(b"\0") != b"iscsi" or (text and not text.endswith(b"\0")):
            self.unexpected.append(f"driver {driver!r}, text {text!r}")
            raise _Cut("cut")
        request = _Request(Mode(mode), Op(op), tid, sid, lun, cid, direction, force, text.rstrip(b"\0").decode())
        try:
            code, reply = self._take(request)
        except _Cut:
            raise
        except Exception as error:
            self.unexpected.append(f"{request}: {error!r}")
            raise _Cut("cut") from error
        data = reply.encode() + b"\0" if reply else b""
        return REPLY.pack(code, REPLY.size + len(data)) + data

    def _take(self, request: _Request) -> tuple[int, str]:
        with self.guard:
            self.calls.append(request.name)
            fault = self._due(request.name)
            if fault and not fault.after:
                return self._break(fault)
            try:
                reply = self._do(request)
                code = int(Code.SUCCESS)
            except _Refusal as refusal:
                code, reply = int(refusal.code), ""
            self.after_call()
            if fault:
                return self._break(fault)
            return code, reply

    def _due(self, name: str) -> _Fault | None:
        for fault in self._faults:
            if fault.name in (name, "*"):
                fault.nth -= 1
                if fault.nth == 0:
                    self._faults.remove(fault)
                    return fault
        return None

    def _break(self, fault: _Fault) -> tuple[int, str]:
        if fault.how == "refuse":
            return fault.code, ""
        if fault.how == "die":
            self._forget()
        raise _Cut(fault.how)

    def _forget(self) -> None:
        self.targets, self.accounts, self.state = {}, {}, "ready"

    # -- the daemon ----------------------------------------------------------------------------------------------

    def _do(self, request: _Request) -> str:
        known: dict[tuple[Mode, Op], Callable[[_Request], str]] = {
            (Mode.TARGET, Op.SHOW): self._show_targets,
            (Mode.DRIVER, Op.SHOW): self._show_drivers,
            (Mode.CONNECTION, Op.SHOW): self._show_connections,
            (Mode.ACCOUNT, Op.SHOW): self._show_accounts,
            (Mode.SYSTEM, Op.SHOW): self._show_system,
            (Mode.SYSTEM, Op.UPDATE): self._update_system,
            (Mode.TARGET, Op.NEW): self._new_target,
            (Mode.TARGET, Op.DELETE): self._delete_target,
            (Mode.TARGET, Op.UPDATE): self._update_target,
            (Mode.TARGET, Op.BIND): self._bind_rule,
            (Mode.TARGET, Op.UNBIND): self._unbind_rule,
            (Mode.DEVICE, Op.NEW): self._new_lun,
            (Mode.DEVICE, Op.UPDATE): self._update_lun,
            (Mode.DEVICE, Op.DELETE): self._delete_lun,
            (Mode.ACCOUNT, Op.NEW): self._new_account,
            (Mode.ACCOUNT, Op.DELETE): self._delete_account,
            (Mode.ACCOUNT, Op.BIND): self._bind_account,
            (Mode.CONNECTION, Op.DELETE): self._delete_connection,
        }
        return known[request.mode, request.op](request)

    def _target(self, request: _Request) -> FakeTarget:
        if request.tid not in self.targets:
            raise _Refusal(Code.NO_TARGET)
        return self.targets[request.tid]

    def _new_target(self, request: _Request) -> str:
        [(key, name)] = request.pairs()
        assert key == "targetname" and name, "this request ends a real tgtd"
        if request.tid in self.targets or self.by_name(name):
            raise _Refusal(Code.TARGET_EXISTS)
        target = FakeTarget(request.tid, name)
        identity = f"IET     {request.tid:04x}0000", f"beaf{request.tid}0"
        target.luns[0] = FakeLun(0, "controller", *identity, store="null", block_size=1)
        self.targets[request.tid] = target
        return ""

    def _delete_target(self, request: _Request) -> str:
        target = self._target(request)
        assert not request.force
        if target.sessions:
            raise _Refusal(Code.TARGET_ACTIVE)
        if any(lun.active for lun in target.luns.values()):
            raise _Refusal(Code.LUN_ACTIVE)
        del self.targets[request.tid]
        return ""

    def _update_target(self, request: _Request) -> str:
        target = self._target(request)
        [(key, value)] = request.pairs()
        if key == "state" and value in ("ready", "offline"):
            target.state = value
        elif key in target.nop:
            target.nop[key] = int(value)
        elif key in ("HeaderDigest", "DataDigest") and value in ("None", "CRC32C"):
            target.login_keys[key] = value
        else:
            raise _Refusal(Code.INVALID_REQUEST)
        return ""

    def _bind_rule(self, request: _Request) -> str:
        target = self._target(request)
        [(key, value)] = request.pairs()
        rules = {"initiator-name": target.names, "initiator-address": target.addresses}[key]
        if value in rules:
            raise _Refusal(Code.ACL_EXISTS)
        rules.append(value)
        return ""

    def _unbind_rule(self, request: _Request) -> str:
        target = self._target(request)
        [(key, value)] = request.pairs()
        rules = {"initiator-name": target.names, "initiator-address": target.addresses}[key]
        if value not in rules:
            raise _Refusal(Code.NO_ACL)
        rules.remove(value)
        return ""

    def _new_lun(self, request: _Request) -> str:
        target = self._target(request)
        if request.lun in target.luns:
            raise _Refusal(Code.LUN_EXISTS)
        fields = dict(request.pairs())
        assert fields.keys() <= {"path", "bstype", "bsoflags"}
        identity = f"IET     {target.tid:04x}{request.lun:04x}", f"beaf{target.tid}{request.lun}"
        lun = FakeLun(request.lun, "disk", *identity, store=fields["bstype"], flags=fields.get("bsoflags", ""))
        if not lun.open(fields["path"]):
            raise _Refusal(Code.INVALID_REQUEST)
        target.luns[request.lun] = lun
        return ""

    def _update_lun(self, request: _Request) -> str:
        lun = self._target(request).luns.get(request.lun)
        if lun is None:
            raise _Refusal(Code.NO_LUN)
        for key, value in request.pairs():
            if key == "path":
                if lun.online or not lun.open(value):
                    raise _Refusal(Code.INVALID_REQUEST)
            elif key in ("scsi_id", "scsi_sn"):
                setattr(lun, key, value[:36])
            elif key == "vendor_id":
                lun.vendor = value
            elif key in ("product_id", "product_rev"):
                pass  # no text shows them
            elif key in ("readonly", "online"):
                setattr(lun, key, value == "1")
            elif key == "thin_provisioning":
                lun.thin = value == "1"
            else:
                raise _Refusal(Code.INVALID_REQUEST)
        return ""

    def _delete_lun(self, request: _Request) -> str:
        target = self._target(request)
        lun = target.luns.get(request.lun)
        if lun is None:
            raise _Refusal(Code.NO_LUN)
        if lun.active or any(session.in_flight for session in target.sessions):
            raise _Refusal(Code.LUN_ACTIVE)
        del target.luns[request.lun]
        return ""

    def _new_account(self, request: _Request) -> str:
        [(_, user), (key, secret)] = request.pairs()
        assert key == "password"
        if user in self.accounts:
            raise _Refusal(Code.USER_EXISTS)
        self.accounts = {user: secret, **self.accounts}
        return ""

    def _delete_account(self, request: _Request) -> str:
        [(_, user)] = request.pairs()
        if user not in self.accounts:
            raise _Refusal(Code.NO_USER)
        for target in self.targets.values():
            assert user not in target.incoming, "the account of a target that stands was deleted"
            if target.outgoing == user:
                target.outgoing = ""
        del self.accounts[user]
        return ""

    def _bind_account(self, request: _Request) -> str:
        target = self._target(request)
        [(_, user)] = request.pairs()
        if user not in self.accounts:
            raise _Refusal(Code.NO_USER)
        if request.direction == 1:
            if target.outgoing:
                raise _Refusal(Code.OUTGOING_EXISTS)
            target.outgoing = user
        else:
            if user in target.incoming:
                raise _Refusal(Code.USER_EXISTS)
            assert not target.incoming, "a second account on one target"
            target.incoming.append(user)
        return ""

    def _delete_connection(self, request: _Request) -> str:
        target = self._target(request)
        for session in target.sessions:
            if session.sid == request.sid:
                if not session.connected or request.cid != 0:
                    raise _Refusal(Code.NO_CONNECTION)
                session.connected = False
                if not session.in_flight:
                    target.sessions.remove(session)
                return ""
        raise _Refusal(Code.NO_SESSION)

    def _update_system(self, request: _Request) -> str:
        [(key, value)] = request.pairs()
        if key != "State" or value not in ("ready", "offline"):
            raise _Refusal(Code.INVALID_REQUEST)
        self.state = value
        return ""

    # -- its texts -----------------------------------------------------------------------------------------------

    def _show_targets(self, request: _Request) -> str:
        assert request.tid == -1
        return "".join(_target_text(self.targets[tid]) for tid in sorted(self.targets))

    def _show_drivers(self, request: _Request) -> str:
        del request
        names = "".join(f"        Target {tid}: {self.targets[tid].name}\n" for tid in sorted(self.targets))
        return f"LLDs:\n    iscsi: ready\n{names}    iser: error\n"

    def _show_connections(self, request: _Request) -> str:
        return "".join(
            f"Session: {session.sid}\n    Connection: 0\n        Initiator: {session.initiator}\n"
            "        IP Address: 127.0.0.1\n"
            for session in reversed(self._target(request).sessions)
            if session.connected
        )

    def _show_accounts(self, request: _Request) -> str:
        del request
        return "Account list:\n" + "".join(f"    {user}\n" for user in self.accounts) if self.accounts else ""

    def _show_system(self, request: _Request) -> str:
        del request
        return f"System:\n    State: {self.state}\n    debug: off\nLLDs:\n    iscsi: ready\n    iser: error\n"


class _Direct:
    """The client's end of a connection that needs no socket."""

    def __init__(self, tgtd: FakeTgtd) -> None:
        if tgtd._listener is None:
            raise Unavailable("tgtd does not answer")
        self._tgtd = tgtd
        self._answer = io.BytesIO()

    def __enter__(self) -> "_Direct":
        return self

    def __exit__(self, *_error: object) -> None: ...

    def settimeout(self, seconds: float) -> None: ...

    def getsockopt(self, *_what: int) -> bytes:
        return struct.pack("3i", os.getpid(), os.geteuid(), os.getegid())

    def sendall(self, data: bytes) -> None:
        with suppress(_Cut):
            self._answer = io.BytesIO(self._tgtd._reply(data[: REQUEST.size], data[REQUEST.size :]))

    def recv(self, size: int) -> bytes:
        return self._answer.read(size)


class _Refusal(Exception):
    def __init__(self, code: Code) -> None:
        super().__init__(code)
        self.code = code


def _target_text(target: FakeTarget) -> str:
    lines = [f"Target {target.tid}: {target.name}", "    System information:", "        Driver: iscsi"]
    lines.append(f"        State: {target.state}")
    if target.nop["nop_interval"]:
        lines.append(f"        Nop interval: {target.nop['nop_interval']}")
        lines.append(f"        Nop count: {target.nop['nop_count']}")
    lines.append("    I_T nexus information:")
    for session in target.sessions:
        lines.append(f"        I_T nexus: {session.sid}")
        lines.append(f"            Initiator: {session.initiator} alias: {session.alias}")
        lines += ["            Connection: 0", "                IP Address: 127.0.0.1"]
    lines.append("    LUN information:")
    for number in sorted(target.luns):
        lines += _lun_lines(target.luns[number])
    lines.append("    Account information:")
    lines += [f"        {user}" for user in target.incoming]
    if target.outgoing:
        lines.append(f"        {target.outgoing} (outgoing)")
    lines.append("    ACL information:")
    lines += [f"        {rule}" for rule in (*target.addresses, *target.names)]
    return "\n".join(lines) + "\n"


def _lun_lines(lun: FakeLun) -> list[str]:
    sectors = lun.size_bytes // 512
    megabytes = (sectors - (sectors // 625 - 974)) // 1950 if sectors else 0
    return [
        f"        LUN: {lun.number}",
        f"            Type: {lun.type}",
        f"            SCSI ID: {lun.scsi_id}",
        f"            SCSI SN: {lun.scsi_sn}",
        f"            Size: {megabytes} MB, Block size: {lun.block_size}",
        f"            Online: {_yes(lun.online)}",
        "            Removable media: No",
        "            Prevent removal: No",
        f"            Readonly: {_yes(lun.readonly)}",
        "            SWP: No",
        f"            Thin-provisioning: {_yes(lun.thin)}",
        f"            Backing store type: {lun.store}",
        f"            Backing store path: {lun.path or 'None'}",
        f"            Backing store flags: {lun.flags}",
    ]


def _yes(value: bool) -> str:
    return "Yes" if value else "No"
