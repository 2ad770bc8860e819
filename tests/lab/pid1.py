#!/usr/bin/python3 -ISs
"""PID 1 of a guest: builds the guest's root, then answers commands that come as JSON lines over its serial line.

The guest's kernel starts this one file with the system's Python, so it imports nothing of the project. The root is the
host's "/" (hostfs, read-only) under an overlay whose writes stay in the guest's memory; /host is the one shared folder.

From the host comes a request a line: {"id", "op": "run" | "spawn", "argv", "stdin", "timeout"}, {"id", "op":
"signal", "signal"} for the process group that `id` started, {"op": "poweroff"}, or {"file"}: it is in a file of /host.
To the host go: {"id": 0, "out": "ready"} once; {"id", "out"} for each line of a "spawn"; {"id", "rc"} at the end of a
command, with all of its output in "out" for a "run"; {"ack": N} for N bytes of requests taken off the line, since a
line that holds more than 4096 stops for ever.
"""
# pathlib would cost time at each boot.
# ruff: noqa: PTH102, PTH103, PTH108, PTH123, PTH211

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import tty
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYS_PIVOT_ROOT, _SYS_FINIT_MODULE = 155, 313  # x86_64
_MS_RDONLY, _MS_REC_SHARED, _MNT_DETACH = 1, 1 << 20 | 1 << 14, 2
_POWER_OFF = 0x4321FEDC
_SERIAL = "/dev/ttyS0"
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
_MOUNTS = (
    ("proc", "proc", ""),
    ("sysfs", "sys", ""),
    ("devtmpfs", "dev", ""),
    ("tmpfs", "run", "mode=755"),
    ("tmpfs", "tmp", "mode=1777"),
    ("devpts", "dev/pts", "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "dev/shm", "mode=1777"),
    ("cgroup2", "sys/fs/cgroup", ""),
)


def check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(kind: str, target: str, options: str = "", flags: int = 0) -> None:
    result = _LIBC.mount(b"none", target.encode(), kind.encode(), flags, options.encode())
    check(result, f"mount {kind} on {target}")


def build_root(modules: str, share: str, project: str) -> None:
    """Makes an overlay on the host's "/" the root; the arguments are folders of the host."""
    release = os.uname().release
    overlay = os.open(f"{modules}/{release}/kernel/fs/overlayfs/overlay.ko", os.O_RDONLY)  # before /tmp is hidden
    mount("tmpfs", "/tmp", "mode=1777,size=75%")
    check(_LIBC.syscall(_SYS_FINIT_MODULE, overlay, b"", 0), "overlay.ko")
    os.close(overlay)
    for name in ("upper", "work", "root"):
        os.mkdir(f"/tmp/{name}")
    mount("overlay", "/tmp/root", "lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work")
    os.chdir("/tmp/root")
    for kind, target, options in _MOUNTS:
        os.makedirs(target, exist_ok=True)
        mount(kind, target, options)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"dev/{name}")
    os.makedirs(f"usr/lib/modules/{release}", exist_ok=True)  # where modprobe looks
    mount("hostfs", f"usr/lib/modules/{release}", f"{modules}/{release}", _MS_RDONLY)
    os.makedirs("host", exist_ok=True)
    mount("hostfs", "host", share)
    if project.startswith("/tmp/"):  # hidden by the guest's own /tmp
        os.makedirs(project.lstrip("/"))
        mount("hostfs", project.lstrip("/"), project, _MS_RDONLY)
    # Not chroot: a container that enters the mount namespace of PID 1 must land in this root.
    check(_LIBC.syscall(_SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    check(_LIBC.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")
    mount("none", "/", "", _MS_REC_SHARED)  # as under systemd; container engines want it
    os.makedirs("/run/lock/iscsi")


def reap(child: int) -> None:
    """Waits for orphans for ever; a guest whose other process here ended is of no use to anybody and ends too."""
    while True:
        pid, _ = os.wait()
        if pid == child:
            power_off()


def power_off() -> None:
    _LIBC.reboot(_POWER_OFF)


class Commands:
    """Runs the commands that come in, each in a thread of its own."""

    def __init__(self, line: int) -> None:
        self._line, self._lock = line, threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def serve(self) -> None:
        """Answers until the other end is gone: then nobody needs this guest, so that it powers itself off."""
        self.reply(id=0, out="ready\n")
        pending = b""
        while data := self._read():
            self.reply(ack=len(data))
            *requests, pending = (pending + data).split(b"\n")
            for request in requests:
                self._accept(json.loads(request))
        power_off()

    def reply(self, **answer: Any) -> None:
        data = json.dumps(answer).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._line, data) :]

    def _read(self) -> bytes:
        try:
            return os.read(self._line, 1 << 16)
        except OSError:
            return b""

    def _accept(self, request: dict[str, Any]) -> None:
        if name := request.get("file"):
            with open(f"/host/{name}") as file:
                request = json.load(file)
            os.unlink(f"/host/{name}")
        if request["op"] == "poweroff":
            os.sync()
            power_off()
        elif request["op"] == "signal":
            if process := self._running.get(request["id"]):
                kill_group(process, request["signal"])
        else:
            self._start(request)

    def _start(self, request: dict[str, Any]) -> None:
        """Starts the command here, not in its thread, so that a signal which comes right after finds it."""
        number = request["id"]
        try:
            process = start(request["argv"], request.get("stdin") or "")
        except (OSError, ValueError) as error:
            self.reply(id=number, rc=127, out=f"{error}\n")
            return
        self._running[number] = process
        work, more = (self._stream, ()) if request["op"] == "spawn" else (self._answer, (request["timeout"],))
        threading.Thread(target=work, args=(number, process, *more), daemon=True).start()

    def _stream(self, number: int, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                self.reply(id=number, out=line.decode(errors="replace"))
        rc = process.wait()
        del self._running[number]
        self.reply(id=number, rc=rc)

    def _answer(self, number: int, process: "subprocess.Popen[bytes]", timeout: float) -> None:
        assert process.stdout
        with process.stdout:
            rc, out = collect(process, timeout)
            del self._running[number]
            self.reply(id=number, rc=rc, out=out.decode(errors="replace"))
            while os.read(process.stdout.fileno(), 1 << 16):
                pass  # a daemon that the command left behind must not die of a closed pipe


def start(argv: list[str], stdin: str) -> "subprocess.Popen[bytes]":
    """Starts a command with its output in one pipe; its input is a file in memory, so that nobody has to feed it."""
    source = os.memfd_create("stdin")
    try:
        with open(source, "wb", closefd=False) as file:
            file.write(stdin.encode())
        os.lseek(source, 0, os.SEEK_SET)
        return subprocess.Popen(
            argv, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    finally:
        os.close(source)


def collect(process: "subprocess.Popen[bytes]", timeout: float) -> "tuple[int, bytes]":
    """Exit code and output of a command; it ends with the process, not with the daemons it left behind.

    After `timeout` seconds the code is 124 and the process group is killed; one that cannot be killed is left.
    """
    assert process.stdout
    pipe, ended, out = process.stdout.fileno(), os.pidfd_open(process.pid), b""
    os.set_blocking(pipe, False)
    poll, deadline = select.poll(), time.monotonic() + timeout
    poll.register(pipe, select.POLLIN)
    poll.register(ended, select.POLLIN)
    rc = 124
    while (left := deadline - time.monotonic()) > 0:
        ready = {fd for fd, _ in poll.poll(left * 1000)}
        if pipe in ready:
            out += (data := read_now(pipe))
            if not data:
                poll.unregister(pipe)
        if ended in ready:
            out += read_now(pipe)
            rc = process.wait()
            break
    else:
        kill_group(process, signal.SIGKILL)
    os.close(ended)
    os.set_blocking(pipe, True)
    return rc, out


def read_now(pipe: int) -> bytes:
    """All that the pipe holds now."""
    found = b""
    try:
        while data := os.read(pipe, 1 << 20):
            found += data
    except BlockingIOError:
        pass
    return found


def kill_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> None:
    build_root(os.environ.pop("MODULES"), os.environ.pop("SHARE"), os.environ.pop("PROJECT"))
    os.environ.update(_ENVIRONMENT)
    if child := os.fork():
        reap(child)
    line = os.open(_SERIAL, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    Commands(line).serve()


if __name__ == "__main__" and os.getpid() == 1:
    try:
        main()
    finally:
        sys.stdout.flush()
