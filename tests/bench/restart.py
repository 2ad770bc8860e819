"""How long the exports of a SNODE are away after a restart of tgtd: on this machine itself, not in a guest.

.venv/bin/python -m tests.bench.restart [EXPORTS [REPETITIONS]]
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from csi.deadline import Deadline
from csi.errors import DriverError
from csi.exports import tgt_show, tgt_wire
from csi.exports.tgt import TgtExport
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_wire import Mode, Op, Wire
from csi.model import AccessMode, Capability, Chap, NodeId, Publication, volume_id_of
from csi.publications import Publications
from csi.records import RecordStore
from csi.run import SubprocessRunner
from tests.bench.hand import STORE
from tests.bench.page import Section, Table, Target
from tests.driver import Driver
from tests.scratch_folder import ON_DISK, scratch_folder

PORTAL = "127.0.0.1:33260"
LIMIT_SECONDS = 1.0
_SIZE_BYTES = 64 << 20
_INITIATOR = "iqn.2026-11.io.test:cnode1"
_CONFIG = """
[controller]
portals = ["{portal}"]
tgt_socket = "{folder}/tgt.0"

[pools.files]
type = "files"
directory = "{folder}/pool"
export = "tgt"
"""

TEXT = """
On this machine itself, with tgtd of the package and files as devices: tgtd is killed and started again; the figure is
the time from its first answer until every target is there, with accounts, LUN and rule, and tgtd takes logins. *By
hand*: one shell script of the tgtadm commands that restore the same targets, begun at once. Medians of {repetitions}.
"""
WHERE = """tgtd itself is at work for {cpu:.1f} s of it, on one thread; nothing can be faster. Its largest part \
is `account new`: tgtd looks for a free number by trying all from 1, and goes through the list of all accounts \
for each, so the time grows with the third power of their number (two for each export: CHAP in both directions). Then \
comes `lun new`, which starts 16 threads for each LUN (tgtd's default); with `--nr_iothreads=1` the whole took \
{one_thread:.2f} s. The second table has every kind of request. {few} exports are back after {few_seconds:.2f} s."""


@dataclass
class Run:
    """One restart."""

    noticed: float  # seconds from tgtd's first answer until the driver shut it for the time of the work
    back: float  # seconds from tgtd's first answer until all was there
    tgtd_cpu: float


class Snode:
    """tgtd and records of publications in a folder."""

    def __init__(self, exports: int) -> None:
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(scratch_folder("bench", base=ON_DISK))
        self.client = TgtClient(self.folder / "tgt.0")
        self._tgtd: subprocess.Popen[bytes] | None = None
        (self.folder / "state").mkdir()
        store = Publications(RecordStore(self.folder / "state" / "publications"))
        self.publications = [publication(self.folder, number) for number in range(exports)]
        for each in self.publications:
            store.write(each)

    def restart(self, *arguments: str) -> float:
        """Kill tgtd and start it; returns the moment of its first answer."""
        self.kill()
        self._tgtd = subprocess.Popen(
            ["tgtd", "-f", "--iscsi", f"portal={PORTAL}", *arguments],
            env={"PATH": os.environ["PATH"], "TGT_IPC_SOCKET": str(self.folder / "tgt")},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with suppress(DriverError):
                self.client.show_system(Deadline.after(5))
                return time.monotonic()
            time.sleep(0.001)
        raise RuntimeError("tgtd does not answer")

    def cpu(self) -> float:
        """Seconds of processor that this tgtd took."""
        assert self._tgtd
        fields = Path(f"/proc/{self._tgtd.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def await_state(self, state: str) -> float:
        """The moment when tgtd says so."""
        end = time.monotonic() + 120
        while tgt_show.parse_system_state(self.client.show_system(Deadline.after(60))) != state:
            if time.monotonic() > end:
                raise RuntimeError(f"tgtd does not become {state}")
            time.sleep(0.005)
        return time.monotonic()

    def check(self) -> None:
        """All targets are there, with a LUN and a rule."""
        shown = tgt_show.parse_targets(self.client.show_targets(Deadline.after(60)))
        whole = [target for target in shown.values() if len(target.luns) == 2 and target.acl]
        assert len(whole) == len(self.publications), f"{len(whole)} of {len(self.publications)} targets are whole"

    def kill(self) -> None:
        """End tgtd."""
        if self._tgtd:
            self._tgtd.kill()
            self._tgtd.wait()

    def close(self) -> None:
        """End tgtd and remove all."""
        self.kill()
        self._stack.close()


def publication(folder: Path, number: int) -> Publication:
    """A publication with its device."""
    device = folder / f"device{number}"
    with device.open("wb") as file:
        file.truncate(_SIZE_BYTES)
    users, words = (secrets.token_hex(8), secrets.token_hex(8)), (secrets.token_hex(16), secrets.token_hex(16))
    return Publication(
        volume_id=volume_id_of(f"volume {number}"), pool="files", protocol="iscsi", device=device, readonly=False,
        node_id=str(NodeId("cnode1", "k" * 43, _INITIATOR)), nonce=secrets.token_hex(8), tid=(1 << 30) + number,
        size_bytes=_SIZE_BYTES, capability=Capability(AccessMode.SINGLE_NODE_WRITER),
        chap=Chap(f"n{users[0]}", words[0], f"t{users[1]}", words[1]),
    )  # fmt: skip


def by_driver(exports: int, repetitions: int, *arguments: str) -> list[Run]:
    """Restart tgtd under the running driver."""
    runs = []
    with ExitStack() as stack:
        snode = Snode(exports)
        stack.callback(snode.close)
        snode.restart(*arguments)
        config = _CONFIG.format(portal=PORTAL, folder=snode.folder)
        stack.enter_context(Driver(snode.folder, config, role="controller"))
        for _ in range(repetitions + 1):
            time.sleep(1.5)
            began = snode.restart(*arguments)
            noticed = snode.await_state("offline")
            back = snode.await_state("ready")
            runs.append(Run(noticed - began, back - began, snode.cpu()))
            snode.check()
    return runs[1:]


def by_hand(exports: int) -> float:
    """Seconds that one shell script of tgtadm takes for the same targets."""
    snode = Snode(exports)
    try:
        lines = [
            'tgtadm() { command tgtadm --lld iscsi "$@" || exit; }',
            "tgtadm --op update --mode sys -n State -v offline",
        ]
        lines += [line for each in snode.publications for line in commands(each)]
        script = snode.folder / "restore.sh"
        script.write_text("\n".join([*lines, "tgtadm --op update --mode sys -n State -v ready", ""]))
        snode.restart()
        began = time.monotonic()
        environment = {"PATH": os.environ["PATH"], "TGT_IPC_SOCKET": str(snode.folder / "tgt")}
        subprocess.run(["bash", str(script)], env=environment, check=True, capture_output=True)
        seconds = time.monotonic() - began
        snode.check()
        return seconds
    finally:
        snode.close()


def commands(each: Publication) -> list[str]:
    """The commands for one target."""
    tid, chap = each.tid, each.chap
    return [
        f"tgtadm --op new --mode target --tid {tid} --targetname {each.target}",
        f"tgtadm --op new --mode account --user {chap.user} --password {chap.secret}",
        f"tgtadm --op new --mode account --user {chap.mutual_user} --password {chap.mutual_secret}",
        f"tgtadm --op bind --mode account --tid {tid} --user {chap.user}",
        f"tgtadm --op bind --mode account --tid {tid} --user {chap.mutual_user} --outgoing",
        f"tgtadm --op new --mode logicalunit --tid {tid} --lun 1 --backing-store {each.device} {STORE}",
        f"tgtadm --op bind --mode target --tid {tid} --initiator-name {each.node.initiator}",
    ]


def requests(exports: int) -> Mapping[str, Sequence[float]]:
    """Seconds of every request of one restoration, by kind, sent one after another."""
    found: dict[str, list[float]] = {}
    ask = Wire.ask

    def timed(wire: Wire, mode: Mode, op: Op, *arguments: object, **named: object) -> str:
        began = time.monotonic()
        try:
            return ask(wire, mode, op, *arguments, **named)  # type: ignore[arg-type]
        finally:
            name = "lun" if mode is Mode.DEVICE else mode.name.lower()
            found.setdefault(f"{name} {op.name.lower()}", []).append(time.monotonic() - began)

    snode = Snode(exports)
    tgt_wire.Wire.ask = timed  # type: ignore[method-assign, assignment]
    try:
        snode.restart()
        found.clear()
        export = TgtExport(snode.folder / "tgt.0", portals=[PORTAL], runner=SubprocessRunner())
        for start in range(0, exports, 10):  # so few at once are made one after another
            for each in snode.publications[start : start + 10]:
                export._targets.build(each, Deadline.after(60))
                export._targets.open(each, Deadline.after(60))
        return found
    finally:
        tgt_wire.Wire.ask = ask  # type: ignore[method-assign]
        snode.close()


def section(exports: int = 500, repetitions: int = 3) -> Section:
    """Run it all."""
    counts = [exports // 5, exports // 2, exports]
    runs = {count: by_driver(count, repetitions) for count in counts}
    hand = {count: by_hand(count) for count in counts}
    one_thread = median(run.back for run in by_driver(exports, 1, "--nr_iothreads", "1"))
    rows = [
        (
            str(count),
            f"{median(run.back for run in runs[count]):.2f}",
            f"{median(run.noticed for run in runs[count]):.2f}",
            f"{median(run.tgtd_cpu for run in runs[count]):.2f}",
            f"{hand[count]:.2f}",
        )
        for count in counts
    ]
    kinds = sorted(requests(exports).items(), key=lambda pair: -sum(pair[1]))
    kind_rows = [(name, str(len(times)), f"{sum(times):.2f}", f"{median(times) * 1e6:.0f}") for name, times in kinds]
    return Section(
        "Exports after a restart of tgtd",
        f".venv/bin/python -m tests.bench.restart {exports} {repetitions}",
        TEXT.format(repetitions=repetitions),
        [
            Table(("exports", "back, s", "of it until noticed, s", "tgtd at work, s", "by hand, s"), rows),
            Table((f"request ({exports} exports)", "how many", "in all, s", "each, median µs"), kind_rows),
        ],
        [
            Target(
                f"{exports} exports back after a restart of tgtd",
                median(run.back for run in runs[exports]),
                LIMIT_SECONDS,
                "s",
                where=WHERE.format(
                    cpu=median(run.tgtd_cpu for run in runs[exports]),
                    one_thread=one_thread,
                    few=counts[0],
                    few_seconds=median(run.back for run in runs[counts[0]]),
                ),
            )
        ],
    )


if __name__ == "__main__":
    result = section(*map(int, sys.argv[1:]))
    print(result, *(target.row() for target in result.targets), sep="\n")
