"""The host's end of a guest's serial line: many commands at once over one socket (see pid1.py for the format)."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import GuestGone, LabError

# The line in the guest holds 4096 bytes and stops for ever when it is full: no more than this is under way at once,
# and a longer request goes through the shared folder.
_WINDOW, _LONG = 3000, 1000
# A lone "ready" message has this number; commands count from 1.
_READY = 0


class Command:
    """One command that runs, or ran, in a guest. Its output comes in whole lines while it runs if it was spawned."""

    def __init__(
        self, channel: "Channel", number: int, name: str, on_line: Callable[[str], None] | None = None
    ) -> None:
        self.name = name
        self._channel, self._number, self._on_line = channel, number, on_line
        self._changed = threading.Condition()
        self._out: list[str] = []
        self._rc: int | None = None
        self._gone = False

    @property
    def rc(self) -> int | None:
        """Exit code, None while it runs (or when the guest went before it ended)."""
        return self._rc

    @property
    def out(self) -> str:
        """All output so far."""
        return "".join(self._out)

    @property
    def lines(self) -> list[str]:
        """All output so far, a line each; every line here reached the host, whatever became of the guest."""
        return self.out.splitlines()

    def wait(self, timeout: float) -> int:
        """Exit code once it ended; GuestGone if its guest ended first, TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._rc is not None or self._gone, timeout):
                raise TimeoutError(f"{self.name} still runs after {timeout} s")
            if self._rc is None:
                raise GuestGone(f"{self.name}: the guest is gone")
            return self._rc

    def wait_for(self, text: str, timeout: float = 30) -> str:
        """The first line that contains `text`; LabError if the command ends without one."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                if found := next((line for line in self._out if text in line), None):
                    return found.rstrip("\n")
                if self._rc is not None or self._gone:
                    raise LabError(f"{self.name} ended without a line with {text!r}:\n{self.out}")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{self.name}: no line with {text!r} in {timeout} s:\n{self.out}")

    def signal(self, number: int) -> None:
        """Sends a signal to the process group of the command; does nothing if it ended or the guest is gone."""
        if self._rc is None and not self._gone:
            self._channel.send(id=self._number, op="signal", signal=int(number))

    def take(self, answer: dict[str, Any]) -> None:
        """Called by the channel alone, in its thread: output, or the end."""
        out = answer.get("out", "")
        with self._changed:
            if out:
                self._out.append(out)
            self._rc = answer.get("rc")
            self._changed.notify_all()
        if out and self._on_line:
            self._on_line(out)

    def lose(self) -> None:
        """Called by the channel alone: the guest is gone."""
        with self._changed:
            self._gone = True
            self._changed.notify_all()


class Channel:
    """Sends commands and hands out answers, in a thread that ends with the guest."""

    def __init__(self, sock: socket.socket, name: str, share: Path) -> None:
        self._socket, self.name, self._share = sock, name, share
        self._lock = threading.Lock()
        self._under_way, self._acked = 0, threading.Condition()
        self._closed, self._last = False, _READY
        self._ready = Command(self, _READY, f"{name}: boot")
        self._waiting = {_READY: self._ready}
        self._reader = threading.Thread(target=self._read, name=f"lab-{name}", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout: float) -> None:
        """Returns once the guest answers; GuestGone or TimeoutError if it does not."""
        self._ready.wait_for("ready", timeout)

    def start(
        self, argv: list[str], *, op: str, name: str = "", stdin: str = "", timeout: float = 0,
        on_line: Callable[[str], None] | None = None,
    ) -> Command:  # fmt: skip
        """Starts a command; `op` is "run" (output at its end) or "spawn" (output as it comes)."""
        with self._lock:
            self._last += 1
            command = Command(self, self._last, f"{self.name}: {name or argv[-1]}", on_line)
            if self._closed:
                command.lose()
                return command
            self._waiting[self._last] = command
            number = self._last
        self.send(id=number, op=op, argv=argv, stdin=stdin, timeout=timeout)
        return command

    def send(self, **request: Any) -> None:
        """Sends one request; when the guest is gone this does nothing, as its commands tell so themselves.

        TimeoutError if the guest took nothing for a minute.
        """
        data = json.dumps(request).encode() + b"\n"
        if len(data) > _LONG:
            name = f".request-{self.name}-{request['id']}"
            (self._share / name).write_bytes(data)
            data = json.dumps({"file": name}).encode() + b"\n"
        with self._acked:
            if not self._acked.wait_for(lambda: self._closed or self._under_way + len(data) <= _WINDOW, 60):
                raise TimeoutError(f"{self.name} takes no requests")
            self._under_way += len(data)
            with contextlib.suppress(OSError):
                self._socket.sendall(data)

    def close(self) -> None:
        """Call when the guest has ended: every command that still waits is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(10)

    def _read(self) -> None:
        try:
            with self._socket, self._socket.makefile("rb") as file:
                for line in file:
                    self._hand_out(json.loads(line))
        except (OSError, ValueError):
            pass  # a line cut in two by a power cut
        finally:
            self._lose_all()

    def _lose_all(self) -> None:
        with self._acked:
            self._closed = True
            self._acked.notify_all()
        with self._lock:
            lost, self._waiting = list(self._waiting.values()), {}
        for command in lost:
            command.lose()

    def _hand_out(self, answer: dict[str, Any]) -> None:
        if taken := answer.get("ack"):
            with self._acked:
                self._under_way -= taken
                self._acked.notify_all()
            return
        number = answer["id"]
        with self._lock:
            command = self._waiting.get(number)
            if "rc" in answer:
                self._waiting.pop(number, None)
        if command:
            command.take(answer)


def log_to(path: Path) -> Callable[[str], None]:
    """Appends each line to a file of the host, which the guest's end does not touch."""

    def write(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    return write
