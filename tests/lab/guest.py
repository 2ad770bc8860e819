"""One guest: a machine with a kernel of its own, memory, disks and a network port, that can lose its power."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .channel import Channel, Command, log_to
from .disk import Disk
from .errors import CommandFailed, GuestGone, LabError
from .network import BRIDGE
from .scratch import kill_session
from .tcp_reset import reset_connections

if TYPE_CHECKING:
    from .lab import Lab

_PID1 = Path(__file__).resolve().with_name("pid1.py")
# Enough for any start of a daemon; a boot takes about 1 s.
_BOOT_SECONDS = 60


@dataclass
class Guest:
    """Made by `Lab.guest`; not running until `boot`. Methods may be called from any thread, several at once."""

    lab: "Lab"
    name: str
    number: int
    memory: str = "384M"
    disks: Sequence[Disk] = ()
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False, repr=False)
    _channel: Channel | None = field(default=None, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    @property
    def ip(self) -> str:
        """Its address in the lab's network."""
        return f"10.99.0.{self.number + 1}"

    @property
    def tap(self) -> str:
        """Its port of the lab's bridge, on the host's side."""
        return f"tap{self.number}"

    @property
    def console(self) -> Path:
        """File with its kernel's messages."""
        return self.lab.logs / f"{self.name}.console"

    @property
    def alive(self) -> bool:
        """Whether it has power: it may still boot, hang or be paused."""
        return self._process is not None and self._process.poll() is None

    def boot(self, timeout: float = _BOOT_SECONDS) -> None:
        """Switches it on; returns once it takes commands, with its network up and udevd running."""
        with self._lock:
            if self.alive:
                raise LabError(f"{self.name} runs already")
            self.kill9()  # what a panic may have left
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = self._start(theirs.fileno())
            self._channel = Channel(ours, self.name, self.lab.share)
        try:
            self._channel.wait_ready(timeout)
            self.sh(f"ip link set lo up; ip link set vec0 up; ip addr add {self.ip}/24 dev vec0; "
                    "exec /lib/systemd/systemd-udevd --daemon", timeout)  # fmt: skip
        except (LabError, TimeoutError) as error:
            self.kill9()
            tail = "\n".join(self.console.read_text(errors="replace").splitlines()[-15:])
            raise LabError(f"{self.name} did not boot: {error}\n{tail}") from error

    def run(self, command: str | Sequence[str], timeout: float = 60, *, stdin: str = "") -> tuple[int, str]:
        """Exit code and output (both streams) of a command; a str is a line for bash, a list is not touched by one.

        After `timeout` seconds the command is killed and the code is 124. GuestGone if the guest ends meanwhile.
        """
        started = self._open().start(_argv(command), op="run", stdin=stdin, timeout=timeout)
        try:
            rc = started.wait(timeout + 10)
        except TimeoutError as error:
            raise TimeoutError(f"{self.name} does not answer: {error}") from error
        return rc, started.out

    def sh(self, command: str | Sequence[str], timeout: float = 60, *, stdin: str = "") -> str:
        """Output of a command without white space at its ends; CommandFailed if its code is not 0."""
        rc, out = self.run(command, timeout, stdin=stdin)
        if rc:
            raise CommandFailed(self.name, command if isinstance(command, str) else shlex.join(command), rc, out)
        return out.strip()

    def spawn(
        self, command: str | Sequence[str], *, name: str, stdin: str = "", on_line: Callable[[str], None] | None = None
    ) -> Command:
        """Starts a command that runs on beside others; its lines come to the host as it prints them.

        They go to `on_line`, if given, else to the file `<lab.logs>/<guest>.<name>.log`.
        """
        on_line = on_line or log_to(self.lab.logs / f"{self.name}.{name}.log")
        return self._open().start(_argv(command), op="spawn", name=name, stdin=stdin, on_line=on_line)

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """Writes a file in the guest, with the folders above it."""
        self.sh(["install", "-D", "-m", f"{mode:o}", "/dev/stdin", path], stdin=text)

    def read(self, path: str) -> str:
        """Text of a file in the guest."""
        rc, out = self.run(["cat", path])
        if rc:
            raise CommandFailed(self.name, f"cat {path}", rc, out)
        return out

    def kill9(self) -> list[int]:
        """A power cut, whatever it is doing; returns the ids of the host's processes that it consisted of."""
        with self._lock:
            if self._process is None:
                return []
            killed = kill_session(self.lab.folder, self._process.pid)
            self._process.wait()
            self._drop()
            return killed

    def off(self, timeout: float = 10) -> None:
        """Syncs and switches it off in the orderly way that a kernel alone can; a power cut if it does not listen."""
        with self._lock:
            if self._process is None or self._channel is None:
                return
            self._channel.send(op="poweroff")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
            self.kill9()

    def pause(self) -> None:
        """Stops its time and all it does, as a hanging hypervisor would; its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Goes on after `pause`; its clock jumps ahead."""
        self._signal(signal.SIGCONT)

    def cut(self) -> None:
        """Cuts its network: nothing comes or goes, nothing is refused. Commands still work."""
        self.lab.network.cut(self.tap)

    def heal(self) -> None:
        """Restores its network."""
        self.lab.network.heal(self.tap)

    def delay(self, milliseconds: int = 0, *, loss_percent: float = 0) -> None:
        """Delays and loses what it sends (not what it gets); no arguments: as before."""
        if milliseconds or loss_percent:
            rule = f"netem delay {milliseconds}ms loss {loss_percent}%"
            self.sh(f"modprobe sch_netem && tc qdisc replace dev vec0 root {rule}")
        else:
            self.run("tc qdisc del dev vec0 root")

    def reset(self, port: int, seconds: float = 6) -> int:
        """Resets its TCP connections from or to `port`, as a firewall would; returns how many it saw and reset.

        A connection is seen when a segment passes, so an idle one may need a few `seconds`.
        """
        return self.lab.network.inside(lambda: reset_connections(self.tap, BRIDGE, port, seconds))

    def _start(self, serial: int) -> "subprocess.Popen[bytes]":
        argv = self.lab.kernel_command(
            f"mem={self.memory}", f"init={_PID1}", f"ssl0=fd:{serial}", f"umid={self.name}", f"hostname={self.name}",
            # gro=1 is vital: without it every big frame is dropped (2 Mbit/s, while ping looks fine).
            f"vec0:transport=tap,ifname={self.tap},mac=02:00:00:00:00:{self.number + 1:02x},gro=1",
            *(disk.argument for disk in self.disks),
        )  # fmt: skip
        with self.console.open("ab") as console:
            return self.lab.popen(argv, cpu=self.number, stdout=console, stderr=console, pass_fds=[serial])

    def _open(self) -> Channel:
        if self._channel is None:
            raise GuestGone(f"{self.name} is off")
        return self._channel

    def _drop(self) -> None:
        if self._channel:
            self._channel.close()
        self._process = self._channel = None

    def _signal(self, number: int) -> None:
        if self._process is None:
            raise GuestGone(f"{self.name} is off")
        os.kill(self._process.pid, number)


def _argv(command: str | Sequence[str]) -> list[str]:
    return ["bash", "-c", command] if isinstance(command, str) else list(command)
