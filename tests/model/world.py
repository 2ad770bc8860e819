"""One SNODE and two CNODEs in one process: real servicers, use cases, backend, export and connectors, over fakes of
tgtd, of the nodes' kernels and of their tools.

Everything that outlives a kill of the driver is here: folders, tgtd, the kernels. `violations` collects what must never
be, also between two steps of one request.
"""

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from unittest import mock

import grpc
import structlog
from google.protobuf.message import Message

from csi import staging
from csi.attached import Attached
from csi.backends.files import FilesBackend
from csi.background import Readiness
from csi.deadline import Deadline
from csi.exports.tgt import TgtExport
from csi.fs.mounts import Mount
from csi.locks import VolumeLocks
from csi.model import TARGET_PREFIX, AccessMode, Device
from csi.publications import Publications
from csi.records import RecordStore
from csi.rpc.method import Calls
from csi.services.controller import Controller
from csi.services.identity import Identity
from csi.volumes import Pool, Volumes
from tests.fakes.runner import FakeRunner
from tests.fakes.tgt import FakeTgtd
from tests.model.cnode import Cnode
from tests.model.ground import Reply
from tests.model.patience import Patience, Steps
from tests.scratch_folder import in_memory, scratch_folder

SECONDS = 20.0


class _Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)
        self.reply = Reply(None, code, details)


class _Context:
    """The part of a gRPC context that the driver uses."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time_remaining(self) -> float:
        return self._seconds

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise _Aborted(code, details)


class World:
    """Close it in the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(
            scratch_folder("model")
        )  # not below /dev: volumes are not mounted there
        # Thousands of small files that stand for sysfs and records.
        self._state = self._stack.enter_context(scratch_folder("model", base=in_memory()))
        self.violations: list[str] = []
        self.tracebacks: list[str] = []  # of defects that a request met
        self.tgtd = FakeTgtd(self.folder / "tgtd.0")
        self.portal = _Portal()
        self._stack.callback(self.portal.down)
        self.tgtd.start()
        self._stack.callback(self.tgtd.stop)
        self.tgtd_up = True
        self.steps = Steps()
        self.patience = Patience(self.look)
        self._stack.enter_context(self.patience.use())
        self._stack.enter_context(_quiet(self.tracebacks))
        self.nodes = [
            Cnode(self._state / name, index, root=self.folder / name, tgtd=self.tgtd, portal=self.portal.address)
            for index, name in enumerate(("c0", "c1"))
        ]
        self._stack.enter_context(self._sysfs())
        self.start()
        self.tgtd.after_call = self._between_calls

    def close(self) -> None:
        """Remove everything."""
        self._stack.close()

    # -- services ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the controller anew from what is on disk, as after a kill."""
        state = self._state / "state"
        state.mkdir(exist_ok=True)
        self.publications = Publications(RecordStore(state / "publications", boundary=self.steps))
        self.pool = self.folder / "pool"
        backend = FilesBackend("files", directory=self.pool, state=state / "pools" / "files", boundary=self.steps)
        self.export = TgtExport(
            self.tgtd.path,
            portals=[self.portal.address],
            runner=FakeRunner({"tgtd": lambda _argv, _input: (0, "1.0.85\n", "")}),
            boundary=self.steps,
        )
        self.volumes = Volumes(
            {"files": Pool(backend, self.export)},
            default_pool="files",
            publications=self.publications,
            locks=VolumeLocks(state / "locks"),
        )
        calls = Calls()
        self.controller = Controller(calls=calls, volumes=self.volumes)
        readiness = Readiness([self.volumes.problems], fresh_seconds=0)
        readiness.look(Deadline.after(SECONDS))
        self.identity = Identity(calls=calls, name="csi.test", readiness=readiness)

    def call(self, request: Message, *, node: Cnode | None = None) -> Reply:
        """Run the RPC whose request this is, on the SNODE or on a CNODE."""
        name = type(request).__name__.removesuffix("Request")
        servicers: list[Any] = [self.identity, self.controller] if node is None else [node.service]
        servicer = next(part for part in servicers if name in vars(type(part)))
        self.look()
        try:
            message = getattr(servicer, name)(request, cast(grpc.ServicerContext, _Context(SECONDS)))
        except _Aborted as aborted:
            return aborted.reply
        return Reply(message, grpc.StatusCode.OK, "")

    def tend(self) -> None:
        """One round of the controller's background work."""
        self.volumes.tend(Deadline.after(SECONDS))

    def stop_tgtd(self) -> None:
        """tgtd ends: all sessions are lost, and all it knows."""
        with self.tgtd.guard:
            if self.tgtd_up:
                self.portal.down()
                self.tgtd.stop()
                self.tgtd_up = False
        self.look()

    def start_tgtd(self) -> None:
        """tgtd starts, with nothing."""
        with self.tgtd.guard:
            if not self.tgtd_up:
                self.portal.up()
                self.tgtd.start()
                self.tgtd_up = True

    # -- questions -----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Let every node's kernel see what became of its sessions."""
        with self.tgtd.guard:
            self.portal.drain()
            for node in self.nodes:
                node.initiator.look()

    def images(self) -> dict[str, Path]:
        """The backing file of every volume by its id."""
        return {path.stem: path for path in self.pool.glob("v-*.img")}

    def strays(self) -> list[str]:
        """What is in the pool that belongs to no volume."""
        known = {f"{name}{suffix}" for name in self.images() for suffix in (".img", ".json")} | {"pool.json"}
        return sorted(path.name for path in self.pool.iterdir() if path.name not in known)

    def targets(self) -> set[str]:
        """The names of all targets of ours in tgtd."""
        return {target.name for target in self.tgtd.targets.values()}

    def sessions_of(self, volume_id: str, node: Cnode) -> int:
        """How many sessions of a node tgtd has for a volume, dead or alive."""
        with self.tgtd.guard:
            return sum(
                session.initiator == node.initiator.name
                for target in self.tgtd.targets.values()
                if target.name.startswith(f"{TARGET_PREFIX}:{volume_id}:")
                for session in target.sessions
            )

    def check_writers(self) -> None:
        """Note a violation when two nodes can write a volume that is not published for that."""
        writers: dict[str, set[str]] = {}
        for target in self.tgtd.targets.values():
            lun = target.luns.get(1)
            if lun is not None and lun.path and not lun.readonly:
                names = {session.initiator for session in target.sessions if session.connected or session.in_flight}
                writers.setdefault(Path(lun.path).stem, set()).update(names)
        for volume_id, names in writers.items():
            if len(names) > 1:
                modes = {
                    p.capability.access_mode
                    for p in self.publications.all()
                    if p.volume_id == volume_id and p.node.initiator in names
                }
                if modes != {AccessMode.MULTI_NODE_MULTI_WRITER}:
                    self.violations.append(f"two nodes can write volume {volume_id}: {sorted(names)}")

    def _between_calls(self) -> None:
        for node in self.nodes:
            node.initiator.look()
        self.check_writers()

    @contextmanager
    def _sysfs(self) -> Iterator[None]:
        """The places where the use cases of a node look into the real sysfs."""
        really_alive = Attached.is_alive

        def is_alive(attached: Attached, layer: Mount) -> bool:
            if layer.fs_type == "btrfs" or layer.major_minor.startswith("0:"):
                return really_alive(attached, layer)
            return any(node.is_alive(layer.major_minor) for node in self.nodes)

        def size(device: Path) -> int:
            return next(node for node in self.nodes if node.initiator.dev == device.parent).size_of(device)

        def is_readonly(_attached: Attached, device: Device) -> bool:
            return next(n for n in self.nodes if n.initiator.dev == device.path.parent).is_readonly(device.path)

        with (
            mock.patch.object(Attached, "is_alive", is_alive),
            mock.patch.object(Attached, "is_readonly", is_readonly),
            mock.patch.object(staging, "block_size", size),
        ):
            yield


class _Portal:
    """Where tgtd listens for initiators: connections are taken and forgotten."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0), backlog=100)
        self._place = self._listener.getsockname()
        self._listener.setblocking(False)
        self.address = f"{self._place[0]}:{self._place[1]}"

    def up(self) -> None:
        self._listener = socket.create_server(self._place, backlog=100)
        self._listener.setblocking(False)

    def down(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def drain(self) -> None:
        """Take what has connected, so that the queue never fills."""
        with suppress(BlockingIOError):
            while self._listener is not None:
                self._listener.accept()[0].close()


@contextmanager
def _quiet(tracebacks: list[str]) -> Iterator[None]:
    """No log while the model runs, but for the tracebacks of defects."""

    def keep(_logger: object, _method: str, event: Any) -> Any:
        if "traceback" in event:
            tracebacks.append(event["traceback"])
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[keep],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
