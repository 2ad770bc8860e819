"""What a CNODE does with loop devices, to be killed at each step; these are real."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from csi.connectors.loop import LoopConnector
from csi.model import MIB, Attachment, volume_id_of
from csi.run import Boundary, Result, SubprocessRunner
from tests.leftovers import all_below, loops_below
from tests.unit.crash_points import Case, Ground, scratch
from tests.unit.snode import soon

VOLUME = volume_id_of("a")
Act = Callable[["LoopGround"], object]


class _WithoutDirectIo(SubprocessRunner):
    """As on a filesystem that refuses it."""

    def run(self, argv: Sequence[str], **options: Any) -> Result:
        return super().run(["false"] if "--direct-io=on" in argv else argv, **options)


class LoopGround:
    """A folder with one volume's file. See Ground."""

    def __init__(self, folder: Path, before: Act, act: Act, *, runner: type[SubprocessRunner]) -> None:
        self.folder = folder
        self.file = folder / f"{VOLUME}.img"
        self.attachment = Attachment(
            volume_id=VOLUME, protocol="loop", generation="", size_bytes=MIB, readonly=False, may_format=True,
            file=self.file,
        )  # fmt: skip
        self._before = before
        self._act = act
        self._runner = runner

    def begin(self) -> None:
        """See Ground."""
        with self.file.open("wb") as file:
            file.truncate(MIB)
        self._before(self)

    def start(self, boundary: Boundary) -> None:
        """See Ground."""
        self.connector = LoopConnector(self._runner(boundary=boundary), roots=[self.folder])

    def act(self) -> None:
        """See Ground."""
        self._act(self)

    def tend(self) -> None:
        """See Ground."""

    def state(self) -> object:
        """See Ground."""
        folders = [Path("/sys/block") / name for name in loops_below(self.folder)]
        return [((folder / "size").read_text(), (folder / "ro").read_text()) for folder in folders]

    def end(self) -> None:
        """See Ground."""
        self.connector.disconnect(VOLUME, soon())
        self.file.unlink()
        assert all_below(self.folder) == []


def nothing(_ground: LoopGround) -> None:
    """Not attached."""


def connect(ground: LoopGround) -> None:
    ground.connector.connect(ground.attachment, soon())


def connect_grown(ground: LoopGround) -> None:
    ground.connector.connect(replace(ground.attachment, size_bytes=2 * MIB), soon())


def rescan(ground: LoopGround) -> None:
    ground.connector.rescan(VOLUME, size_bytes=2 * MIB, deadline=soon())


def disconnect(ground: LoopGround) -> None:
    ground.connector.disconnect(VOLUME, soon())


def attach(ground: LoopGround, *options: str, mib: int = 1) -> None:
    """An earlier life has attached it; the file may have grown since."""
    subprocess.run(["losetup", "--find", "--nooverlap", *options, ground.file], check=True)
    with ground.file.open("r+b") as file:
        file.truncate(mib * MIB)


@contextmanager
def _ground(before: Act, act: Act, runner: type[SubprocessRunner]) -> Iterator[Ground]:
    with scratch(real_waits=True) as folder:
        try:
            yield LoopGround(folder, before, act, runner=runner)
        finally:
            for loop in loops_below(folder):
                subprocess.run(["losetup", "--detach", f"/dev/{loop}"], check=True)


def cases() -> list[Case]:
    """All of them."""

    def case(request: str, name: str, before: Act, act: Act, runner: type[SubprocessRunner] = SubprocessRunner) -> Case:
        return Case(request, f"{name} loop".strip(), partial(_ground, before, act, runner))

    return [
        case("NodeStageVolume", "", nothing, connect),
        case("NodeStageVolume", "without direct I/O", nothing, connect, _WithoutDirectIo),
        case("NodeStageVolume", "attached read-only", lambda ground: attach(ground, "--read-only"), connect),
        case("NodeStageVolume", "grown", partial(attach, mib=2), connect_grown),
        case("NodeExpandVolume", "", partial(attach, mib=2), rescan),
        case("NodeUnstageVolume", "", attach, disconnect),
    ]
