"""A few pages over plain HTTP, for monitors and probes that speak nothing else.

Whoever reaches the port may ask, so that a client gets little: few at once are served, each for a short time.
"""

import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from csi.errors import Unavailable
from csi.log import get_logger

#: How long a client may take for its whole request and our answer.
_SECONDS = 10.0
#: Who comes while so many are served is sent away.
_MOST_CLIENTS = 8


@dataclass(frozen=True)
class Page:
    """What a page says at one moment."""

    text: str
    status: int = 200
    type: str = "text/plain; charset=utf-8"


class _Server(ThreadingHTTPServer):
    """Serves few at once."""

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.Semaphore(_MOST_CLIENTS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to tell; a defect is."""
        error = sys.exception()
        if not isinstance(error, OSError):
            get_logger("http").error("a page could not be made", exc_info=error)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended in this moment
        connection.shutdown(socket.SHUT_RDWR)


def serve(setting: str, address: tuple[str, int], pages: Mapping[str, Callable[[], Page]]) -> ThreadingHTTPServer:
    """Answer GET of these paths, in threads. setting: whose address it is, for errors.

    Raises Unavailable when the address is not this machine's, or its port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            super().setup()
            # Not a timeout of the socket, which a byte now and then would reset.
            self._end = threading.Timer(_SECONDS, _shut, [self.connection])
            self._end.daemon = True
            self._end.start()

        def finish(self) -> None:
            self._end.cancel()
            super().finish()

        def do_GET(self) -> None:
            read = pages.get(self.path)
            if read is None:
                self.send_error(404, explain=f"there is: {', '.join(pages)}")
                return
            page = read()
            body = page.text.encode()
            self.send_response(page.status)
            self.send_header("Content-Type", page.type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: each look of a monitor would be a line."""

    try:
        server = _Server(address, Handler)
    except OSError as error:
        raise Unavailable(f"{setting} {address[0]}:{address[1]}: can't listen there: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name=setting, daemon=True).start()
    return server
