"""One look at an attached device: what stands there, and how large it is."""

from dataclasses import dataclass
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import Unavailable
from csi.residents import helper
from csi.run import Result, Runner

_LOOK = helper(__file__, "look_helper.py")


@dataclass(frozen=True, eq=False)
class Look:
    """What one look at a device has found; Filesystems.look is what makes one.

    signature: "" = surely nothing: the device can be read at its start, middle and end, before and after the search,
    and neither of two searches found a signature or had an error. A filesystem's name as blkid has it. "?" and a
    description for anything else (partition table, LVM, RAID, LUKS, swap, several signatures at once, a damaged
    superblock). An XFS whose mkfs was killed counts as nothing: its superblock says so, no kernel mounts it, so no file
    ever was on it.
    """

    device: Path
    size_bytes: int
    signature: str
    fs_bytes: int = 0  # the filesystem's size by its superblock, which it is not smaller than; 0 = not known
    fs_block_bytes: int = 0
    unfinished: bool = False  # a mkfs.xfs was killed here, and nothing else stands there

    @property
    def fills_device(self) -> bool:
        """True if less than one block of the device is outside of the filesystem, so that it can't grow."""
        return self.fs_block_bytes > 0 and self.size_bytes - self.fs_bytes < self.fs_block_bytes


def look_at(runner: Runner, device: Path, deadline: Deadline) -> Look:
    """Look at a device, by one process. Raises Unavailable when it is missing or can't be read, and in any doubt."""
    result = runner.run([*_LOOK, str(device)], deadline=deadline, read_only=True, ok=None)
    if result.returncode != 0:
        said = " ".join(result.stderr.split())[-400:] or f"the look ended with {result.returncode}"
        begin = "" if str(device) in said else f"{device}: "
        raise Unavailable(f"{begin}{said}; see the connection to the SNODE, then repeat")
    return _parse(device, result)


def _parse(device: Path, result: Result) -> Look:
    facts = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    try:
        unfinished = bool(int(facts["unfinished"]))
        return Look(
            device=device,
            size_bytes=int(facts["size_bytes"]),
            signature="" if unfinished else facts["signature"],
            fs_bytes=int(facts["fs_bytes"]),
            fs_block_bytes=int(facts["fs_block_bytes"]),
            unfinished=unfinished,
        )
    except (KeyError, ValueError) as error:
        raise Unavailable(f"{device}: the look at it gave half an answer ({result.stdout[:200]!r}); repeat") from error
