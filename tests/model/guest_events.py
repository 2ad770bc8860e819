"""What happens to the machines of the lab beside the requests, or in the middle of one."""

import time
from collections.abc import Sequence

import grpc

from csi.pb import csi_pb2 as pb
from tests.lab import invariants, roles
from tests.lab.channel import Command
from tests.lab.cluster import Cluster, Machine
from tests.lab.errors import LabError
from tests.model.book import Event, Trouble
from tests.model.guest_node import GuestNode

#: Ends every connection of every session in tgtd.
_BREAK = r"""
set -o pipefail
tgtadm --lld iscsi --op show --mode target | awk '
    /^Target/ {sub(":", "", $2); tid = $2} /I_T nexus: / {sid = $3} /Connection: / {print tid, sid, $2}' |
while read tid sid cid; do tgtadm --lld iscsi --op delete --mode conn --tid $tid --sid $sid --cid $cid; done
"""
#: The process of the driver; the exit code is 3 when there is none, and another one when the search itself failed.
_FIND_DRIVER = r"""
driver=$(pgrep -of '^[^ ]*/python -m csi [a-z]+ --config ') || exit $((2 + $?))
"""
#: The children of the process $driver die, whichever come to be in this moment, and are told. Not those that are no
#: command: a helper process that stays, which waits for work most of the time (csi/residents.py); a child that is
#: not yet what it will be, and still has the driver's own arguments; one that has ended. The exit code is 1 when there
#: was none.
KILL_CHILDREN = r"""
for i in $(seq 40); do
    died=
    for children in /proc/$driver/task/*/children; do
        pids=(); read -ra pids <$children
        for pid in "${pids[@]}"; do
            argv=(); mapfile -d '' -t argv </proc/$pid/cmdline
            case " ${argv[*]} " in *resident_helper.py*|*" -m csi "*|"  ") continue ;; esac
            kill -9 $pid && died=1 && echo "${argv[0]##*/} ${argv[1]}"
        done
    done 2>/dev/null
    [ "$died" ] && exit 0
    sleep .01
done
exit 1"""
_NOTHING_DIED, _NO_DRIVER = 1, 3


class GuestEvents:
    """`tgtd_runs`: unless it was stopped. `hangs`: whether the disk of a volume does not answer."""

    def __init__(self, cluster: Cluster, nodes: Sequence[GuestNode]) -> None:
        self._cluster = cluster
        self._nodes = nodes
        self.tgtd_runs = True
        self._suspended: set[str] = set()

    @property
    def hangs(self) -> bool:
        """Whether the disk of a volume does not answer."""
        return bool(self._suspended)

    def happen(self, event: Event, volume_id: str) -> bool:
        """See Ground."""
        cluster, node = self._cluster, self._nodes[event.node]
        snode, machine = cluster.snode, node.machine
        if event.kind == "restart controller":
            self._restart(snode)
        elif event.kind == "restart node":
            if node.up:
                self._restart(machine)
        elif event.kind in ("tgtd stops", "tgtd starts", "tgtd restarts"):
            self._turn_tgtd(event.kind)
        elif event.kind == "iscsid restarts":
            if node.up:
                self._stop_daemon(machine)
                machine.daemon = roles.start_iscsid(machine.guest)
        elif event.kind in ("reboot", "power off", "power on"):
            self._power(event.kind, machine)
        elif event.kind == "snode reboots":
            snode.guest.kill9()
            self._suspended.clear()
            cluster.boot(snode)
            self.tgtd_runs = True
            await_driver(snode)
        elif event.kind in ("cut off", "back again"):
            self.reach(node, event.kind == "back again")
        elif event.kind == "connections break":
            _try(snode, _BREAK)
        elif event.kind in ("slow disk", "disk answers"):
            self._slow(volume_id if event.kind == "slow disk" else "")
        elif event.kind == "damage":
            return self._damage(volume_id)
        return True

    def heal(self) -> None:
        """End all faults."""
        self._slow("")
        for node in self._nodes:
            if not node.reaches_snode:
                self.reach(node, True)
        machines = self._cluster.machines
        if not all(m.guest.alive and _runs(m.daemon) and m.driver and _runs(m.driver.process) for m in machines):
            self._cluster.restore()
        self.tgtd_runs = True
        for machine in machines:
            await_driver(machine)

    # -- in the middle of a request ------------------------------------------------------------------------------

    def strike(self, trouble: Trouble, machine: Machine) -> str:
        """What a trouble does, at its moment; tells what came of it, where that is not certain."""
        if trouble.kind == "kill":
            if machine.driver is not None and machine.guest.alive:
                machine.driver.kill9()
        elif trouble.kind == "command":
            return self._kill_commands(machine) if machine.guest.alive else "no power, no command died"
        elif trouble.how == "cut":
            _try(self._cluster.snode, _BREAK)
        elif trouble.how == "refuse":
            self._hang_tgtd()
        elif self.tgtd_runs:
            self._stop_daemon(self._cluster.snode)
        return ""

    def recover(self, trouble: Trouble, machine: Machine) -> None:
        """What ended by a trouble runs again."""
        snode = self._cluster.snode
        if self.tgtd_runs and not _runs(snode.daemon):
            snode.daemon = roles.start_tgtd(snode.guest)
        if machine.guest.alive and not (machine.driver and _runs(machine.driver.process)):
            self._cluster.start_driver(machine)
            await_driver(machine)

    def reach(self, node: GuestNode, on: bool) -> None:
        """Join a CNODE and the SNODE, or part them. Requests to both still arrive."""
        node.reaches_snode = on
        network, apart = self._cluster.lab.network, any(not node.reaches_snode for node in self._nodes)
        network.isolate(node.machine.guest.tap, not on)
        network.isolate(self._cluster.snode.guest.tap, apart)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _restart(self, machine: Machine) -> None:
        if machine.driver is not None:
            machine.driver.kill9()
        self._cluster.start_driver(machine)
        await_driver(machine)

    def _stop_daemon(self, machine: Machine) -> None:
        if machine.daemon is not None and _runs(machine.daemon):
            machine.daemon.signal(9)
            machine.daemon.wait(60)

    def _kill_commands(self, machine: Machine) -> str:
        code, out = _try(machine, _FIND_DRIVER + KILL_CHILDREN)
        if code == 0:
            return f"died: {', '.join(out.splitlines())}"
        runs = machine.driver is not None and _runs(machine.driver.process)
        if code == _NOTHING_DIED or (code == _NO_DRIVER and not runs):
            return "no command died"
        raise LabError(f"{machine.guest.name}: killing commands ended with {code}: {out}")

    def _hang_tgtd(self) -> None:
        daemon = self._cluster.snode.daemon
        if daemon is not None and _runs(daemon):
            daemon.signal(19)
            time.sleep(1)
            daemon.signal(18)

    def _turn_tgtd(self, kind: str) -> None:
        snode = self._cluster.snode
        if kind != "tgtd starts":
            self._stop_daemon(snode)
            self.tgtd_runs = False
        if kind != "tgtd stops" and not self.tgtd_runs:
            snode.daemon = roles.start_tgtd(snode.guest)
            self.tgtd_runs = True

    def _power(self, kind: str, machine: Machine) -> None:
        if kind != "power on":
            machine.guest.kill9()
        if kind != "power off" and not machine.guest.alive:
            self._cluster.boot(machine)
            await_driver(machine)

    def _slow(self, volume_id: str) -> None:
        """The disk of a volume answers nothing any more; "" = all answer again."""
        snode = self._cluster.snode
        if volume_id:
            if _try(snode, f"dmsetup suspend --noflush --nolockfs {_dm(volume_id)}")[0] == 0:
                self._suspended.add(volume_id)
            return
        for name in self._suspended:
            _try(snode, f"dmsetup resume {_dm(name)}")
        self._suspended.clear()

    def _damage(self, volume_id: str) -> bool:
        """The first 128 KiB of a volume become zeros, if no node is attached and the SNODE has seen its data."""
        if self.hangs:
            return False
        seen = invariants.look_at_snode(self._cluster.snode)
        attached = any(target.volume_id == volume_id and target.initiators for target in seen.targets.values())
        if volume_id not in seen.volumes or attached or "snode.blank" in seen.tags[volume_id]:
            return False
        zeros = (
            f"dd if=/dev/zero of=$(ls /dev/vg?/{volume_id}) bs=64k count=2 oflag=direct conv=notrunc,fsync status=none"
        )
        return _try(self._cluster.snode, zeros)[0] == 0


def await_driver(machine: Machine, seconds: float = 60.0) -> None:
    """Return once a driver answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            machine.stubs["identity"].GetPluginInfo(pb.GetPluginInfoRequest(), timeout=5)
            return
        except grpc.RpcError as error:
            if time.monotonic() > end:
                raise LabError(f"{machine.guest.name}: the driver does not answer: {error}") from error
            time.sleep(0.05)


def _try(machine: Machine, line: str) -> tuple[int, str]:
    """Exit code and output of a line that may well fail, but not for want of a program."""
    code, out = machine.guest.run(line)
    if code in (126, 127, _NO_DRIVER + 126):
        raise LabError(f"{machine.guest.name}: a program is missing: {out}")
    return code, out


def _dm(volume_id: str) -> str:
    return f"/dev/vg?/{volume_id}"


def _runs(command: Command | None) -> bool:
    return command is not None and command.rc is None
