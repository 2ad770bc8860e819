"""The lab: guests that boot side by side on one machine, in a network of their own, and leave nothing behind."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

from .disk import Disk
from .errors import LabError
from .guest import Guest
from .kernel import PROJECT, Kernel, get_kernel
from .network import Network
from .packages import check_host
from .scratch import Scratch

T = TypeVar("T")
# ubda to ubdh
_MOST_DISKS = 8
_RELAY = Path(__file__).resolve().with_name("relay.py")


class Lab:
    """Use it as `with Lab() as lab`; at its end, and at the end of this process of whatever kind, all of it is gone."""

    def __init__(self) -> None:
        check_host()
        self.kernel: Kernel = get_kernel()
        self._scratch = Scratch()
        self.network = Network()
        self.guests: list[Guest] = []
        self._programs: list[subprocess.Popen[bytes]] = []
        cpus = sorted(os.sched_getaffinity(0))
        first = os.getpid() % len(cpus)  # else the first guests of labs side by side all share one
        self._cpus = cpus[first:] + cpus[:first]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """Where the lab's files are; gone with it."""
        return self._scratch.folder

    @property
    def share(self) -> Path:
        """The one folder that guests share with the host and each other; they see it as /host."""
        return self.folder / "share"

    @property
    def logs(self) -> Path:
        """Consoles of the guests and output of what they spawned; kept in $SNODE_LAB_LOGS if that is set."""
        return self.folder / "logs"

    def guest(self, name: str, *, memory: str = "384M", disks: Sequence[Disk] = ()) -> Guest:
        """Adds a guest, with its port of the network and its disks (/dev/ubda, ubdb …); it does not run yet."""
        if len(disks) > _MOST_DISKS or any(guest.name == name for guest in self.guests):
            raise LabError(f"guest {name}: at most {_MOST_DISKS} disks, and a name of its own")
        guest = Guest(self, name, len(self.guests), memory, list(disks))
        for number, disk in enumerate(disks):
            disk.create(self.folder / f"{name}.ubd{number}", number)
        self.network.add_tap(guest.tap)
        self.guests.append(guest)
        return guest

    def boot_all(self) -> None:
        """Boots, side by side, the guests that do not run."""
        self.each([guest for guest in self.guests if not guest.alive], Guest.boot)

    @staticmethod
    def each(guests: Sequence[Guest], act: Callable[[Guest], T]) -> list[T]:
        """Results of `act` for each guest, called side by side; the first error is raised after all have ended."""
        with ThreadPoolExecutor(max(1, len(guests))) as pool:
            return [job.result() for job in [pool.submit(act, guest) for guest in guests]]

    def popen(
        self, argv: Sequence[str], *, cpu: int | None = None, stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None, stderr: int | IO[bytes] | None = None,
        pass_fds: Sequence[int] = (), cwd: Path | None = None,
    ) -> "subprocess.Popen[bytes]":  # fmt: skip
        """Starts a program of the host inside the lab's network, as a session of its own, and ends it with the lab.

        `cpu` pins it and its children: guests run up to twice as fast on one CPU each, in turn.
        """

        def start() -> "subprocess.Popen[bytes]":
            if cpu is not None:
                os.sched_setaffinity(0, {self._cpus[cpu % len(self._cpus)]})  # of this short-lived thread
            return subprocess.Popen(
                list(argv), stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds, cwd=cwd,
                env=self._scratch.environment(), start_new_session=True,
            )  # fmt: skip

        program = self.network.inside(start)
        self._programs = [other for other in self._programs if other.poll() is None] + [program]
        return program

    def connect(self, host: str, port: int, timeout: float = 10) -> socket.socket:
        """A TCP connection from this process to a guest."""
        return self.network.connect(host, port, timeout)

    def forward(self, host: str, port: int) -> Path:
        """A unix socket on the host that leads to a guest's port, for clients that make their own sockets (gRPC)."""
        path = self.folder / f"{host}-{port}.sock"
        relay = self.popen(
            ["/usr/bin/python3", "-ISs", os.fspath(_RELAY), f"unix:{path}", f"tcp:{host}:{port}"],
            stdout=subprocess.PIPE,
        )
        assert relay.stdout
        with relay.stdout as out:
            if not out.readline():
                raise LabError(f"no relay to {host}:{port}")
        return path

    def kernel_command(self, *arguments: str) -> list[str]:
        """Command line of a guest's kernel; `arguments` are what is the guest's own."""
        common = [
            "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "con=null", "con0=null,fd:1",
            f"uml_dir={self.folder}/", f"MODULES={self.kernel.modules}", f"SHARE={self.share}", f"PROJECT={PROJECT}",
        ]  # fmt: skip
        if self.kernel.seccomp:
            common.append("seccomp=on")
        return [os.fspath(self.kernel.binary), *common, *arguments]

    def close(self) -> None:
        """Cuts the power of every guest, ends every program, removes every file of the lab."""
        for guest in self.guests:
            guest.kill9()
        if keep := os.environ.get("SNODE_LAB_LOGS"):
            shutil.copytree(self.logs, Path(keep) / self.folder.name, dirs_exist_ok=True)
        self.network.close()
        self._scratch.close()
        for program in self._programs:
            program.wait(10)
