"""`make lab`: one SNODE and two CNODEs with the driver in them, and a prompt to play with them."""

import cmd
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import grpc

from . import Lab
from .channel import Command
from .cluster import TARGET, Cluster, Machine
from .errors import GuestGone, LabError
from .guest import Guest
from .kernel import PROJECT
from .oracle import Oracle

_TRY = """
Three commands to try:
  write data cnode1      a new volume on cnode1: create, publish, log in, mkfs, mount; then a program writes to it
  lose data cnode2       the power of cnode1 is cut; cnode2 gets the volume, and every acknowledged record is looked for
  snode lvs -o lv_name,lv_size,lv_tags     any command in a machine: snode, cnode1, cnode2
`help` lists the others; `exit` ends the lab and removes all of it.
"""
_RECORDS = "records"
T = TypeVar("T")


class Shell(cmd.Cmd):
    """The prompt. Errors of machines and of the driver are printed, and it goes on."""

    prompt = "lab> "

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster = cluster
        self.machines: dict[str, Machine] = {machine.guest.name: machine for machine in cluster.machines}
        self._ids: dict[str, str] = {}
        self._at: dict[str, Machine] = {}
        self._oracles: dict[str, Oracle] = {}
        self._writers: dict[str, Command] = {}
        self.failures = 0

    # -- the driver's work ---------------------------------------------------------------------------------------

    def do_write(self, line: str) -> None:
        """write VOLUME CNODE: make the volume if it is new, attach it, and start a program that writes to it."""
        name, machine = self._volume_and_cnode(line)
        if name in self._at:
            raise LabError(f"{name} is on {self._at[name].guest.name}: use `lose {name} CNODE` or `delete {name}`")
        self._attach(name, machine)
        self._start_writer(name, machine)

    def do_lose(self, line: str) -> None:
        """lose VOLUME CNODE: cut the power of the CNODE that has the volume; another one takes it over."""
        name, machine = self._volume_and_cnode(line)
        old = self._at.get(name)
        if old is None:
            raise LabError(f"{name} is on no CNODE: use `write {name} {machine.guest.name}` first")
        if old is machine:
            raise LabError(f"{name} is on {machine.guest.name} itself: name the other CNODE")
        oracle = self._oracles[name]
        acknowledged = oracle.acknowledged
        old.guest.kill9()
        print(f"{old.guest.name} has lost its power; {acknowledged} records of it were acknowledged")
        began = time.monotonic()
        self._timed(
            f"fence {old.guest.name} (ControllerUnpublishVolume)",
            lambda: self.cluster.unpublish(self._ids[name], old),
        )
        path = self._attach(name, machine)
        print(f"  served on {machine.guest.name} {time.monotonic() - began:.2f} s after the loss")
        if name in self._writers:
            last = oracle.judge(machine.guest, f"{path}/{_RECORDS}")
            print(f"all {acknowledged} acknowledged records are there (the last one on disk is {last})")
        self._start_writer(name, machine)
        print(f"`boot {old.guest.name}` switches it on again; it finds nothing that it could write to")

    def do_delete(self, line: str) -> None:
        """delete VOLUME: stop its writer, detach it, and delete it."""
        name = line.strip()
        if name not in self._ids:
            raise LabError(f"there is no volume {name!r}: {', '.join(self._ids) or 'none was made yet'}")
        volume_id, machine = self._ids[name], self._at.get(name)
        if machine is not None:
            if machine.guest.alive:
                self._stop_writer(name)
                self._timed("NodeUnpublish, NodeUnstage", lambda: self.cluster.leave(volume_id, machine))
            self._timed("ControllerUnpublishVolume", lambda: self.cluster.unpublish(volume_id, machine))
            del self._at[name]
        self._timed("DeleteVolume", lambda: self.cluster.delete(volume_id))
        for known in (self._ids, self._oracles, self._writers):
            known.pop(name, None)

    def do_volumes(self, line: str) -> None:
        """volumes: what the SNODE's driver holds (`snode volumes list` there)."""
        self._in_machine(self.cluster.snode.guest, "snode volumes list")

    # -- machines ------------------------------------------------------------------------------------------------

    def do_snode(self, line: str) -> None:
        """snode COMMAND: run a line for bash in the SNODE; its output comes when it ends."""
        self._in_machine(self.cluster.snode.guest, line)

    def do_cnode1(self, line: str) -> None:
        """cnode1 COMMAND: run a line for bash in the first CNODE."""
        self._in_machine(self.machines["cnode1"].guest, line)

    def do_cnode2(self, line: str) -> None:
        """cnode2 COMMAND: run a line for bash in the second CNODE."""
        self._in_machine(self.machines["cnode2"].guest, line)

    def do_kill(self, line: str) -> None:
        """kill MACHINE: cut its power."""
        self._machine(line).guest.kill9()

    def do_boot(self, line: str) -> None:
        """boot MACHINE: switch it on, with its daemons and the driver."""
        machine = self._machine(line)
        if machine.guest.alive:
            raise LabError(f"{machine.guest.name} is on")
        self.cluster.boot(machine)
        install(machine.guest)

    def do_cut(self, line: str) -> None:
        """cut MACHINE: cut its network; it lives on."""
        self._machine(line).guest.cut()

    def do_heal(self, line: str) -> None:
        """heal MACHINE: give it its network back."""
        self._machine(line).guest.heal()

    def do_exit(self, line: str) -> bool:
        """exit (or the end of input): end the lab and remove all of it."""
        return True

    do_EOF = do_exit

    # -- the prompt ----------------------------------------------------------------------------------------------

    def onecmd(self, line: str) -> bool:
        """One line; an error is printed. ^C ends the waiting for it; what it began in a machine may go on."""
        try:
            return bool(super().onecmd(line))
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}")
        except (LabError, AssertionError, TimeoutError, OSError) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print(" given up")
        self.failures += 1
        return False

    def emptyline(self) -> bool:
        """Nothing, where cmd.Cmd would repeat the last line."""
        return False

    def default(self, line: str) -> None:
        """An unknown command."""
        raise LabError(f"no command {line.split()[0]!r}; `help` lists them")

    def do_help(self, line: str) -> None:
        """help: this list."""
        names = self.completenames(line.strip())
        if not names:
            self.default(line)
        for name in names:
            print(f"  {getattr(self, f'do_{name.strip()}').__doc__}")

    def precmd(self, line: str) -> str:
        """Show the line if nobody typed it."""
        if not sys.stdin.isatty():
            print("" if line == "EOF" else line, flush=True)
        return line

    def completenames(self, text: str, *_: object) -> list[str]:
        """Commands that begin so."""
        return [f"{name} " for name in super().completenames(text) if name != "EOF"]

    def _attach(self, name: str, machine: Machine) -> str:
        cluster = self.cluster
        if name not in self._ids:
            self._ids[name] = self._timed("CreateVolume", lambda: cluster.create(name))
            self._oracles[name] = Oracle(name)
        volume_id = self._ids[name]
        context = self._timed("ControllerPublishVolume", lambda: cluster.publish(volume_id, machine))
        self._at[name] = machine
        self._timed("NodeStageVolume", lambda: cluster.stage(volume_id, machine, context))
        path = self._timed("NodePublishVolume", lambda: cluster.mount(volume_id, machine))
        print(f"{name} is {volume_id}, mounted at {path} on {machine.guest.name}")
        return path

    def _start_writer(self, name: str, machine: Machine) -> None:
        oracle = self._oracles[name]
        self._writers[name] = oracle.write(machine.guest, f"{TARGET}/{self._ids[name]}/{_RECORDS}")
        oracle.wait_for(20)
        print(f"a program on {machine.guest.name} writes and syncs a record every 10 ms, and tells us each one")

    def _stop_writer(self, name: str) -> None:
        """Not started, or lost with its machine's power, is fine."""
        writer = self._writers.get(name)
        if writer is not None:
            writer.signal(9)
            with suppress(GuestGone):
                writer.wait(10)

    def _volume_and_cnode(self, line: str) -> tuple[str, Machine]:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise LabError(f"{line!r}: {error}") from error
        if len(words) != 2:
            raise LabError("name a volume and a CNODE, such as `data cnode1`")
        machine = self._machine(words[1])
        if machine is self.cluster.snode:
            raise LabError("a volume is used on a CNODE: cnode1 or cnode2")
        if not machine.guest.alive:
            raise LabError(f"{words[1]} has no power: `boot {words[1]}`")
        return words[0], machine

    def _machine(self, line: str) -> Machine:
        found = self.machines.get(line.strip())
        if found is None:
            raise LabError(f"no machine {line.strip()!r}; there are {', '.join(self.machines)}")
        return found

    def _in_machine(self, guest: Guest, line: str) -> None:
        if not guest.alive:
            raise LabError(f"{guest.name} has no power: `boot {guest.name}`")
        if not line:
            raise LabError("name a command to run there; there is no terminal, so one command at a time")
        code, out = guest.run(line, 300)
        print(out, end="" if out.endswith("\n") or not out else "\n")
        if code:
            print(f"exit code {code}")

    def _timed(self, what: str, call: Callable[[], T]) -> T:
        began = time.monotonic()
        result = call()
        print(f"  {what:<48} {time.monotonic() - began:6.2f} s")
        return result


def install(guest: Guest) -> None:
    """Put `snode` on the PATH of a guest."""
    guest.write("/usr/local/bin/snode", f'#!/bin/sh\nexec {PROJECT}/.venv/bin/snode "$@"\n', mode=0o755)


def main() -> int:
    """Boot, read commands until the end of input. The exit code is 1 if a command of a program's input failed."""
    print("booting one SNODE and two CNODEs, each with a kernel of its own", flush=True)
    began = time.monotonic()
    with Lab() as lab:
        shell = Shell(Cluster(lab))
        for machine in shell.machines.values():
            install(machine.guest)
        print(f"ready after {time.monotonic() - began:.1f} s")
        try:
            shell.cmdloop(_TRY)
        except KeyboardInterrupt:
            print()
    print("all of it is gone", flush=True)
    return int(shell.failures > 0 and not sys.stdin.isatty())
