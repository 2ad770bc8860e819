"""A few pages over plain HTTP, for monitors and probes that speak nothing else."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from csi.errors import Unavailable

#: A client that says nothing for this long is left.
_IDLE_SECONDS = 10.0


@dataclass(frozen=True)
class Page:
    """What a page says at one moment."""

    text: str
    status: int = 200
    type: str = "text/plain; charset=utf-8"


def serve(setting: str, address: tuple[str, int], pages: Mapping[str, Callable[[], Page]]) -> ThreadingHTTPServer:
    """Answer GET of these paths, in threads. setting: whose address it is, for errors.

    Raises Unavailable when the address is not this machine's, or its port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _IDLE_SECONDS

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
        server = ThreadingHTTPServer(address, Handler)
    except OSError as error:
        raise Unavailable(f"{setting} {address[0]}:{address[1]}: can't listen there: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name=setting, daemon=True).start()
    return server
