"""A CNODE of the lab, as the model sees it: what is mounted where, and what applications write and read there.

A record on a filesystem is a line of the file `records`; on a raw device it is a block of 512 bytes behind the region
that a running writer (tests/lab/writer.py) uses. A raw device that holds a filesystem is left alone.
"""

import re
import time
from pathlib import Path

from tests.lab import invariants
from tests.lab import oracle as oracle_module
from tests.lab.channel import Command
from tests.lab.cluster import Machine
from tests.lab.errors import LabError
from tests.lab.oracle import Oracle

#: In blocks of 512 bytes. The smallest volume of the lab has 4 MiB.
_FIRST_BLOCK, _MOST_BLOCKS = 6144, 512
_SECONDS = 40.0
_RECORD = re.compile(r"^[a-z]+\.[0-9]+\.[0-9]+(?= *$)", re.MULTILINE)


class GuestNode:
    """See Node. `machine` may lose its power at any moment, also in the middle of a question."""

    root = invariants.ROOT

    def __init__(self, machine: Machine, oracles: dict[str, Oracle]) -> None:
        """oracles: by volume, shared by all nodes."""
        self.machine = machine
        self.name = machine.guest.name
        self.node_id = machine.node_id
        self.reaches_snode = True
        self._oracles = oracles
        self._writers: dict[Path, Command] = {}

    @property
    def up(self) -> bool:
        """Whether it has power."""
        return self.machine.guest.alive

    def volume_at(self, path: Path) -> str:
        """The volume that is mounted at a path, dead or alive; "" for none."""
        seen = invariants.look_at_cnode(self.machine)
        layers = [mount for mount in seen.mounts if mount.mount_point == path]
        if not layers:
            return ""
        top = layers[-1]
        name = top.root.strip("/") if top.fs_type == "devtmpfs" else Path(top.source).name
        found = [session.volume_id for session in seen.sessions if name in session.disks]
        return found[0] if found else ""

    def is_mounted(self, path: Path) -> bool:
        """Whether anything is mounted at a path."""
        return self._answers(f"grep -qF ' {path} ' /proc/self/mountinfo")

    def is_block(self, path: Path) -> bool:
        """Whether a device node is published at a path."""
        return self._answers(f"[ -b {path} ]")

    def exists(self, path: Path) -> bool:
        """Whether there is anything at a path."""
        return self._answers(f"[ -e {path} -o -L {path} ]")

    def volumes(self) -> set[str]:
        """The volumes that the kernel has a session for, or open-iscsi a record."""
        seen = invariants.look_at_cnode(self.machine)
        targets = {session.target for session in seen.sessions} | seen.database
        return {invariants.volume_of(target) for target in targets}

    def write(self, path: Path, record: str) -> bool:
        """Write a record and wait for the disk. False when it can't be written, or the place is not for records."""
        number = int(record.rsplit(".", 1)[1])
        if number >= _MOST_BLOCKS:
            return False
        block = f"bs=512 seek={_FIRST_BLOCK + number} oflag=direct conv=notrunc,fsync"
        return self._answers(
            f"""
            if [ -b {path} ]; then
                blkid -p {path} >/dev/null && exit 1
                printf '%-511s\\n' {record} | dd of={path} {block} status=none
            else
                grep -qF ' {path} ' /proc/self/mountinfo || exit 1
                echo {record} | dd of={path}/records oflag=append conv=notrunc,fsync status=none && sync {path}
            fi"""
        )

    def read(self, path: Path) -> list[str] | None:
        """The records; None when they can't be read. What a running writer wrote is judged too."""
        try:
            code, out = self.machine.guest.run(
                f"""
                if [ -b {path} ]; then
                    blkid -p {path} >/dev/null && exit 1
                    dd if={path} bs=512 skip={_FIRST_BLOCK} count={_MOST_BLOCKS} iflag=direct status=none | tr -d '\\0'
                else
                    grep -qF ' {path} ' /proc/self/mountinfo || exit 1
                    [ -e {path}/records ] || exit 0
                    dd if={path}/records bs=64k iflag=direct status=none
                fi""",
                _SECONDS,
            )
        except (LabError, TimeoutError):
            return None
        if code:
            return None
        oracle = self._oracles.get(self.volume_at(path))
        if oracle is not None:
            oracle.judge(self.machine.guest, self._stream(path))
        return _RECORD.findall(out)

    # -- writers that go on --------------------------------------------------------------------------------------

    def is_blank(self, path: Path) -> bool:
        """Whether there is nothing yet where an application would write on and on."""
        writer = Path(oracle_module.__file__).with_name("writer.py")
        return self._answers(
            f'[ ! -e {self._stream(path)} ] || [ -z "$(python3 {writer} check {self._stream(path)})" ]'
        )

    def begin_writing(self, path: Path, oracle: Oracle) -> None:
        """Let an application write on and on, until `end_writing`, or its volume or machine goes."""
        try:
            before = oracle.acknowledged
            writer = self._writers[path] = oracle.write(self.machine.guest, self._stream(path), pause=0.02)
            end = time.monotonic() + 5
            while writer.rc is None and oracle.acknowledged in (0, before) and time.monotonic() < end:
                time.sleep(0.02)
        except LabError:
            self._writers.pop(path, None)

    def is_writing(self, path: Path) -> bool:
        """Whether an application writes at a path."""
        return self.up and path in self._writers and self._writers[path].rc is None

    def end_writing(self, path: Path | None = None) -> None:
        """kill -9 the application that writes at a path, or all of them."""
        for place in [path] if path is not None else list(self._writers):
            writer = self._writers.pop(place, None)
            if writer is None or not self.up:
                continue
            try:
                writer.signal(9)
                writer.wait(_SECONDS)  # its disk may hang
            except (LabError, TimeoutError):
                continue

    def _stream(self, path: Path) -> str:
        return str(path) if self.is_block(path) else f"{path}/stream"

    def _answers(self, line: str) -> bool:
        """Whether a shell line succeeds; False when the machine does not answer."""
        try:
            return self.machine.guest.run(line, _SECONDS)[0] == 0
        except (LabError, TimeoutError):
            return False
