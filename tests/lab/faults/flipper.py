"""A proxy before tgtd that spoils a bit now and then, as a broken switch does behind TCP's back."""

import socket
import threading
from collections.abc import Callable

from tests.lab import Lab
from tests.lab.network import HOST_IP
from tests.lab.writer import MAGIC, ROUND

#: Of a record (writer.py): where its number stands, and a byte of its hash.
_NUMBER, _HASH = slice(72, 80), 90
#: Records in a page of the page cache.
_PAGE = 8

#: Where in some bytes a bit is to be spoiled; -1 = nowhere.
Choice = Callable[[bytes], int]


def first_record(data: bytes) -> int:
    """In the first record."""
    at = data.find(MAGIC)
    return at + _HASH if 0 <= at < len(data) - _HASH else -1


def last_record_of_a_page(data: bytes) -> int:
    """In a record after which its page is not written again, so that nothing but a checksum mends it."""
    at = data.find(MAGIC)
    while 0 <= at < len(data) - _HASH:
        number = int.from_bytes(data[at + _NUMBER.start : at + _NUMBER.stop], "big")
        if number % ROUND % _PAGE == _PAGE - 1:
            return at + _HASH
        at = data.find(MAGIC, at + 1)
    return -1


class Flipper:
    """Hands on what comes to `portal`; `spoil_to_target` and `spoil_to_node` spoil one bit on its way."""

    def __init__(self, lab: Lab, target: str, port: int) -> None:
        self._lab, self._target, self._port = lab, target, port
        self._listener = lab.network.inside(lambda: socket.create_server((HOST_IP, 0)))
        self.portal = f"{HOST_IP}:{self._listener.getsockname()[1]}"
        self._wanted: dict[str, Choice] = {}
        self._spoiled = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def spoil_to_target(self, choice: Choice) -> None:
        """Spoil the next bit that it chooses of what goes to the target."""
        self._wanted["to target"] = choice

    def spoil_to_node(self, choice: Choice) -> None:
        """The same of what goes to the node."""
        self._wanted["to node"] = choice

    def wait_until_spoiled(self, timeout: float = 30) -> None:
        """Return once nothing more is to be spoiled."""
        with self._spoiled:
            assert self._spoiled.wait_for(lambda: not self._wanted, timeout), "nothing to spoil came along"

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = self._lab.connect(self._target, self._port)
            except OSError:
                return
            far.settimeout(None)
            for way, ends in {"to target": (near, far), "to node": (far, near)}.items():
                threading.Thread(target=self._pump, args=(way, *ends), daemon=True).start()

    def _pump(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(self._changed(way, data))
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def _changed(self, way: str, data: bytes) -> bytes:
        choice = self._wanted.get(way)
        at = choice(data) if choice else -1
        if at < 0:
            return data
        with self._spoiled:
            del self._wanted[way]
            self._spoiled.notify_all()
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
