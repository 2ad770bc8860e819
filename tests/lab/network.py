"""The lab's own network: a bridge and a tap for each guest, in a network namespace that no process needs to live in.

A namespace belongs to a thread in Linux. So short-lived threads enter it, to make interfaces, sockets and children
there, and the process which uses the lab stays where it is. The namespace lives as long as the file descriptor here
or a guest holds it, and everything in it goes with it: the host's interfaces are never touched.
"""

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import TypeVar

from .errors import LabError

T = TypeVar("T")
HOST_IP = "10.99.0.254"
BRIDGE = "br0"
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Network:
    """A bridge `br0` with the host's end 10.99.0.254; nothing outside the lab can be reached from it."""

    def __init__(self) -> None:
        self._fd = _in_thread(_new_namespace)
        self._ip("link set lo up", f"link add {BRIDGE} type bridge", f"addr add {HOST_IP}/24 dev {BRIDGE}",
                 f"link set {BRIDGE} up")  # fmt: skip

    def inside(self, function: Callable[[], T]) -> T:
        """Result of `function`, called in a thread inside the network; sockets and children made there stay there."""

        def entered() -> T:
            if _LIBC.setns(self._fd, _CLONE_NEWNET):
                raise LabError(f"setns: {os.strerror(ctypes.get_errno())}")
            return function()

        return _in_thread(entered)

    def connect(self, host: str, port: int, timeout: float = 10) -> socket.socket:
        """A TCP connection to a guest, for any thread to use; OSError as from `socket.create_connection`."""
        return self.inside(lambda: socket.create_connection((host, port), timeout))

    def add_tap(self, name: str) -> None:
        """A port of the bridge for one guest."""
        self._ip(f"tuntap add {name} mode tap", f"link set {name} master {BRIDGE} up")

    def cut(self, name: str) -> None:
        """Takes a port off the bridge. Never `link set down`: the guest's device stays dead after that."""
        self._ip(f"link set {name} nomaster")

    def heal(self, name: str) -> None:
        """Puts a port back on the bridge."""
        self._ip(f"link set {name} master {BRIDGE}")

    def isolate(self, name: str, on: bool = True) -> None:
        """Keeps a port apart from other isolated ones. It still reaches the rest, and the host's end."""
        self._ip(f"link set {name} type bridge_slave isolated {'on' if on else 'off'}")

    def close(self) -> None:
        """Lets go of the network; it vanishes with the last process inside."""
        os.close(self._fd)

    def _ip(self, *lines: str) -> None:
        done = self.inside(
            lambda: subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, capture_output=True)
        )
        if done.returncode:
            raise LabError(f"ip: {done.stderr.strip()}")


def _new_namespace() -> int:
    if _LIBC.unshare(_CLONE_NEWNET):
        raise LabError(f"unshare: {os.strerror(ctypes.get_errno())}")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_thread(function: Callable[[], T]) -> T:
    """Result of `function` in a new thread, or what it raised; whatever it does to its thread ends with it."""
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="lab-network")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return result[0]
