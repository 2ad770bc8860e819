"""The gRPC server: its socket, its health service, and an end that loses nothing.

One server for one endpoint. gRPC itself lets a second server silently take over a live unix socket (and the first one
then deletes the second's path when it stops), so a lock beside the socket decides who may bind it.
"""

import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from csi.errors import Invalid, Unavailable
from csi.log import get_logger
from csi.rpc import unix_socket
from csi.rpc.endpoint import Endpoint, TlsFiles
from csi.rpc.method import WORKERS, Calls
from csi.rpc.tls import Reloaded

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
    """A server on one endpoint, and on a second one over TCP if that is asked for; not listening until `start`."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        calls: Calls,
        registrations: Sequence[Registration],
        tls: TlsFiles | None = None,
        listen: Endpoint | None = None,
        workers: int = WORKERS,
    ) -> None:
        """Raises Invalid for a TCP endpoint without TLS: a CSI request is a root operation on this machine."""
        self._endpoints = [endpoint, *([listen] if listen else [])]
        for one in self._endpoints:
            if one.socket is None and tls is None:
                raise Invalid(f"endpoint {one}: TCP is served with mutual TLS only; set tls.ca, tls.cert and tls.key")
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
        for endpoint in self._endpoints:
            if endpoint.socket is not None:
                self._bind_socket(endpoint, endpoint.socket)
            else:
                self._bind_tcp(endpoint)
        self._server.start()
        self._health.serving = True
        self._log.info("serving", endpoint=", ".join(map(str, self._endpoints)))

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

    def _bind_tcp(self, endpoint: Endpoint) -> None:
        assert self._tls is not None
        credentials = Reloaded(self._tls).credentials()
        self._bind(lambda: self._server.add_secure_port(endpoint.target, credentials), endpoint)

    def _bind_socket(self, endpoint: Endpoint, path: Path) -> None:
        self._lock_fd = unix_socket.claim(path)
        with unix_socket.umask(0o177):
            self._bind(lambda: self._server.add_insecure_port(endpoint.target), endpoint)
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode != 0o600:
            raise Unavailable(f"{path}: has mode {mode:04o} although 0600 was asked for; use a local filesystem")

    def _bind(self, add_port: Callable[[], int], endpoint: Endpoint) -> None:
        try:
            port = add_port()
        except RuntimeError as error:
            raise Unavailable(f"endpoint {endpoint}: can't listen there: {error}") from error
        if port == 0:
            raise Unavailable(f"endpoint {endpoint}: can't listen there; is the address this machine's and free?")


def leave(clean: bool) -> None:
    """Leave the process when `clean` is False, past threads that are stuck. Returns otherwise."""
    if not clean:
        sys.stderr.flush()
        os._exit(1)
