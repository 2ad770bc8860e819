"""The gRPC server: its socket, its health service, and an end that loses nothing.

One server for one endpoint. gRPC itself lets a second server silently take over a live unix socket (and the first one
then deletes the second's path when it stops), so a lock beside the socket decides who may bind it.
"""

import fcntl
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from csi.errors import Invalid, Unavailable
from csi.log import get_logger
from csi.rpc.endpoint import Endpoint, TlsFiles
from csi.rpc.method import WORKERS, Calls

#: How long running requests may go on after a stop was asked for. Orchestrators kill after 30 s.
GRACE_SECONDS = 25.0
#: How long requests get to notice the stop flag after that.
_LAST_SECONDS = 2.0

#: Adds one servicer to a server; the generated `add_…_to_server` functions with their servicer bound.
Registration = Callable[[grpc.Server], None]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # ships no types
    """The standard health service, as probes use it: Check alone.

    Watch is UNIMPLEMENTED, which the protocol allows. The library's own servicer has it, and can deadlock the whole
    server when a watcher leaves at a bad moment (grpcio-health-checking 1.82: its lock is taken in both orders).
    """

    serving = False

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """SERVING from the start to the beginning of the end."""
        if request.service:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:100]!a}; ask for the whole server")
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.SERVING if self.serving else answer.NOT_SERVING)


class Server:
    """A server on one endpoint, not listening until `start`."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        calls: Calls,
        registrations: Sequence[Registration],
        tls: TlsFiles | None = None,
        workers: int = WORKERS,
    ) -> None:
        """Raises Invalid for a TCP endpoint without TLS: a CSI request is a root operation on this machine."""
        if endpoint.socket is None and tls is None:
            raise Invalid(f"endpoint {endpoint}: TCP is served with mutual TLS only; set tls.ca, tls.cert and tls.key")
        self._endpoint = endpoint
        self._calls = calls
        self._tls = tls
        self._log = get_logger("server")
        self._lock_fd: int | None = None
        pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="rpc")
        # Without so_reuseport=0 a second process could share a TCP port with us.
        self._server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for register in registrations:
            register(self._server)

    def start(self) -> None:
        """Bind and serve. Raises Unavailable when the endpoint can't be had, with the reason."""
        if self._endpoint.socket is not None:
            self._bind_socket(self._endpoint.socket)
        else:
            self._bind_tcp()
        self._server.start()
        self._health.serving = True
        self._log.info("serving", endpoint=str(self._endpoint))

    def stop(self, *, grace_seconds: float = GRACE_SECONDS, end_children: Callable[[], None] = lambda: None) -> bool:
        """End serving: running requests get `grace_seconds`, then the stop flag, then their read-only commands end.

        Returns False when a request is stuck all the same (a process in uninterruptible sleep): the caller then leaves
        with `os._exit`, since the interpreter's normal end would wait for that thread.
        """
        self._health.serving = False
        self._server.stop(grace_seconds).wait()
        self._calls.stop.set()
        # Aborted requests run on in their threads; those that wait for a deadline see the flag now.
        end_children()
        stuck = self._calls.wait_idle(_LAST_SECONDS)
        if stuck:
            self._log.error("requests still at work, leaving without them", requests=stuck)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
        return not stuck

    def _bind_tcp(self) -> None:
        assert self._tls is not None
        try:
            key, cert, ca = (path.read_bytes() for path in (self._tls.key, self._tls.cert, self._tls.ca))
        except OSError as error:
            raise Unavailable(f"tls: can't read {error.filename}: {error.strerror}") from error
        credentials = grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)
        self._bind(lambda: self._server.add_secure_port(self._endpoint.target, credentials))

    def _bind_socket(self, path: Path) -> None:
        _prepare_folder(path.parent)
        self._lock_fd = _own(path)
        _remove_stale(path)
        with _umask(0o177):
            self._bind(lambda: self._server.add_insecure_port(self._endpoint.target))
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode != 0o600:
            raise Unavailable(f"{path}: has mode {mode:04o} although 0600 was asked for; use a local filesystem")

    def _bind(self, add_port: Callable[[], int]) -> None:
        try:
            port = add_port()
        except RuntimeError as error:
            raise Unavailable(f"endpoint {self._endpoint}: can't listen there: {error}") from error
        if port == 0:
            raise Unavailable(f"endpoint {self._endpoint}: can't listen there; is the address this machine's and free?")


def leave(clean: bool) -> None:
    """Leave the process when `clean` is False, past threads that are stuck. Returns otherwise."""
    if not clean:
        sys.stderr.flush()
        os._exit(1)


def _prepare_folder(folder: Path) -> None:
    """Make the socket's folder, for root alone; an existing one is used if nobody else may write there.

    A folder that was there before keeps its mode: it may be a shared one such as /run, or the orchestrator's.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise Unavailable(f"{folder}: can't make the folder of the socket: {error.strerror}") from error
    if status.st_uid not in (0, os.geteuid()):
        raise Unavailable(f"{folder}: belongs to another user, who could replace the socket; choose another folder")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise Unavailable(f"{folder}: others may write there and could replace the socket; chmod 0700 it")


def _own(path: Path) -> int:
    """Lock `<path>.lock` for our lifetime and return its descriptor. Raises Unavailable when another server has it.

    The file stays for ever: whoever removed it could lock a new one while the old is still held.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(f"{lock}: can't open the lock of the socket: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Unavailable(f"{path}: another driver (process {holder}) serves there; stop it first") from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed server left. The caller holds the lock."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise Unavailable(f"{path}: exists and is not a socket; move it away or choose another endpoint")
    if status.st_uid != os.geteuid():
        raise Unavailable(f"{path}: a socket of another user (uid {status.st_uid}); choose another endpoint")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise Unavailable(f"{path}: another program listens there; stop it first")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    """The umask of the whole process for the time of a bind: called before other threads of ours make files."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
