"""Docker's volume plugin API, version 1: JSON by POST on a unix socket.

Described at docs.docker.com/engine/extend/plugins_volume. An error is a status of 500 with `{"Err": "the sentence"}`,
which Docker shows to its user.
"""

import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from csi.client import VolumeLine
from csi.docker.options import Options
from csi.docker.plugin import Plugin
from csi.errors import DriverError
from csi.log import get_logger
from csi.rpc.unix_socket import umask

_TYPE = "application/vnd.docker.plugins.v1.2+json"
#: No request of Docker's comes near it.
_LONGEST_BODY = 1 << 20

_log = get_logger("docker")


class Api:
    """Answers Docker's requests with a Plugin."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._calls: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "/Plugin.Activate": self._activate,
            "/VolumeDriver.Create": self._create,
            "/VolumeDriver.Remove": self._remove,
            "/VolumeDriver.Mount": self._mount,
            "/VolumeDriver.Unmount": self._unmount,
            "/VolumeDriver.Path": self._path,
            "/VolumeDriver.Get": self._get,
            "/VolumeDriver.List": self._list,
            "/VolumeDriver.Capabilities": lambda _: {"Capabilities": {"Scope": "global"}},
        }

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a request."""
        call = self._calls.get(path)
        if call is None:
            return 404, {"Err": f"{path}: this plugin does not know it; it serves volumes (VolumeDriver) alone"}
        try:
            request = json.loads(body or b"{}")
            if not isinstance(request, dict):
                raise TypeError("not an object")
            answer = call(request)
        except DriverError as error:
            _log.warning("docker", call=path, volume=_name_in(body), error=str(error))
            return 500, {"Err": str(error)}
        except (ValueError, TypeError, KeyError) as error:
            return 400, {"Err": f"{path}: malformed request: {error!r}"}
        _log.info("docker", call=path, volume=_name_in(body))
        return 200, {**answer, "Err": ""}

    def _activate(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        self._plugin.docker_is_back()  # it asks this once in its life, before anything else
        return {"Implements": ["VolumeDriver"]}

    def _create(self, request: Mapping[str, Any]) -> dict[str, Any]:
        options = {str(key): str(value) for key, value in (request.get("Opts") or {}).items()}
        self._plugin.create(str(request["Name"]), Options.parse(options))
        return {}

    def _remove(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._plugin.remove(str(request["Name"]))
        return {}

    def _mount(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"Mountpoint": str(self._plugin.mount(str(request["Name"]), str(request["ID"])))}

    def _unmount(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._plugin.unmount(str(request["Name"]), str(request["ID"]))
        return {}

    def _path(self, request: Mapping[str, Any]) -> dict[str, Any]:
        path = self._plugin.path(str(request["Name"]))
        return {"Mountpoint": str(path or "")}

    def _get(self, request: Mapping[str, Any]) -> dict[str, Any]:
        line = self._plugin.get(str(request["Name"]))
        return {"Volume": {**self._described(line), "Status": _status(line)}}

    def _list(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        return {"Volumes": [self._described(line) for line in self._plugin.volumes()]}

    def _described(self, line: VolumeLine) -> dict[str, Any]:
        path = self._plugin.path(line.name)
        return {"Name": line.name, "Mountpoint": str(path or "")}


def _status(line: VolumeLine) -> dict[str, Any]:
    return {
        "id": line.volume_id,
        "pool": line.pool,
        "size_bytes": line.size_bytes,
        "fs": line.fs_type or "ext4",
        "used_on": list(line.nodes),
        **({"takeover": line.takeover} if line.takeover else {}),
    }


def _name_in(body: bytes) -> str:
    try:
        return str(json.loads(body).get("Name", ""))[:128]
    except (ValueError, AttributeError):
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "ApiServer"

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > _LONGEST_BODY:
            self.send_error(413)
            return
        status, answer = self.server.api.answer(self.path, self.rfile.read(int(length)))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", _TYPE)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "docker"

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format % args)


class ApiServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves an Api on a unix socket, for root alone. The caller has claimed the path."""

    daemon_threads = True

    def __init__(self, path: Path, api: Api) -> None:
        self.api = api
        with umask(0o177):
            super().__init__(os.fspath(path), _Handler)

    def get_request(self) -> tuple[socket.socket, str]:
        """A connection, with the word that stands for its address."""
        connection, _ = super().get_request()
        return connection, "docker"

    def start(self) -> None:
        """Serve in a thread until `shutdown`."""
        threading.Thread(target=self.serve_forever, name="docker-api", daemon=True).start()
