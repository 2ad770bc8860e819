"""Certificates of both ends, read again when their files change: a renewed one serves the next connection."""

from typing import Any, NamedTuple

import grpc

from csi.errors import Unavailable
from csi.log import get_logger
from csi.rpc.endpoint import TlsFiles

#: What is another for each version of the files.
State = tuple[tuple[int, int, int], ...]
#: A SNODE that was away is found again within seconds; gRPC's own limit is two minutes.
_SOON = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000))


class Pem(NamedTuple):
    """The contents of the three files."""

    ca: bytes
    key: bytes
    cert: bytes


def look(tls: TlsFiles) -> State:
    """The state of the files. Raises Unavailable when one is not there."""
    try:
        states = [path.stat() for path in (tls.ca, tls.cert, tls.key)]
    except OSError as error:
        raise _unreadable(error) from error
    return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)


def load(tls: TlsFiles) -> Pem:
    """The files, which belong together. Raises Unavailable when they can't be read, or do not yet.

    A renewal replaces two files; between them they are no pair, and gRPC would serve nobody with them.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        pem = Pem(ca=tls.ca.read_bytes(), key=tls.key.read_bytes(), cert=tls.cert.read_bytes())
    except OSError as error:
        raise _unreadable(error) from error
    try:
        ours = serialization.load_pem_private_key(pem.key, password=None).public_key()
        theirs = x509.load_pem_x509_certificate(pem.cert).public_key()
        x509.load_pem_x509_certificates(pem.ca)
    except (ValueError, TypeError) as error:
        raise Unavailable(f"tls: {tls.ca}, {tls.cert} and {tls.key} are not all in PEM form: {error}") from error
    if ours != theirs:
        raise Unavailable(f"tls: {tls.key} is not the key of {tls.cert}")
    return pem


def _unreadable(error: OSError) -> Unavailable:
    return Unavailable(f"tls: can't read {error.filename}: {error.strerror}")


class Reloaded:
    """What gRPC asks for a server's certificate at each handshake."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._log = get_logger("tls")
        self._seen: State = ()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that demand the client's certificate. Raises Unavailable when a file can't be read."""
        self._seen = look(self._tls)
        first = self._configuration()
        return grpc.dynamic_ssl_server_credentials(first, self._fetch, require_client_authentication=True)

    def _fetch(self) -> Any:
        """The new configuration if a file changed, else None. What can't be read leaves the old one in service."""
        try:
            seen = look(self._tls)
            if seen == self._seen:
                return None
            fresh = self._configuration()
        except Unavailable as error:
            self._log.error("the changed certificate can't be used, the old one stays", error=str(error))
            return None
        self._seen = seen
        self._log.info("certificate read again", cert=str(self._tls.cert))
        return fresh

    def _configuration(self) -> Any:
        pem = load(self._tls)
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)


class Renewed:
    """A client's channel, made anew when its certificate's files change. May be used from several threads."""

    def __init__(self, target: str, tls: TlsFiles) -> None:
        self._target = target
        self._tls = tls
        self._log = get_logger("tls")
        self._seen: State = ()
        self._channel: grpc.Channel | None = None

    def channel(self) -> grpc.Channel:
        """The channel for the next call. Raises Unavailable when there is none yet and a file can't be read.

        An earlier channel is let go of and not closed: a call of another thread may be under way on it.
        """
        try:
            seen = look(self._tls)
            if self._channel is None or seen != self._seen:
                pem = load(self._tls)
                credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
                self._channel, self._seen = grpc.secure_channel(self._target, credentials, options=_SOON), seen
        except Unavailable as error:
            if self._channel is None:
                raise
            self._log.error("the changed certificate can't be used, the old one stays", error=str(error))
        return self._channel

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()
