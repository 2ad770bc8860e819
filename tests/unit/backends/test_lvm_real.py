"""The real LVM, metadata only: it must accept our names, tags, options and filter, and we must read its answers.

No device-mapper is needed (`--driverloaded n`, nothing is activated); the lab runs the rest on a real kernel.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from csi.backends.device_nodes import DeviceNodes, Node
from csi.backends.lvm import LvmBackend
from csi.backends.lvm_space import Space
from csi.backends.lvm_thick import Thick
from csi.deadline import Deadline
from csi.errors import CommandFailed, NoSpace, Unavailable
from csi.model import volume_id_of
from csi.run import Result, SubprocessRunner
from tests.unit.backends.rig import MIB, soon

pytestmark = pytest.mark.root

VG = "snodetest"
_NO_KERNEL = ["--driverloaded", "n"]
_INSTEAD = {
    "--wipesignatures=y": "--wipesignatures=n",
    "--zero=y": "--zero=n",
    "--ignoreactivationskip": "--activate=n",
}


class MetadataOnly(SubprocessRunner):
    """The real commands, kept away from the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        deadline: Deadline,
        read_only: bool = False,
        ok: frozenset[int] | None = frozenset({0}),
        input: str | None = None,
        timeout: float = 60.0,
        pass_fds: Sequence[int] = (),
    ) -> Result:
        words = [_INSTEAD.get(word, word) if argv[0] == "lvcreate" else word for word in argv]
        at = 2 if words[0] == "lvm" else 1
        words = words[:at] + _NO_KERNEL + words[at:]
        self.calls.append(list(argv))
        return super().run(
            words, deadline=deadline, read_only=read_only, ok=ok, input=input, timeout=timeout, pass_fds=pass_fds
        )


class PretendedNodes(DeviceNodes):
    """A file in the place of each device, with the size and uuid that LVM says."""

    def __init__(self, folder: Path, disk: str) -> None:
        super().__init__(dev=folder)
        (folder / VG).mkdir(parents=True, exist_ok=True)
        self._disk = disk

    def look(self, vg: str, name: str) -> Node | None:
        options = "--options=lv_name,lv_uuid,lv_size,vg_uuid"
        out = lvm("lvs", only(self._disk), "--reportformat=json", "--units=b", "--nosuffix", options, vg)
        for row in json.loads(out)["report"][0]["lv"]:
            if row["lv_name"] == name:
                path = self.path(vg, name)
                with path.open("ab") as file:
                    file.truncate(int(row["lv_size"]))
                uuid = f"LVM-{row['vg_uuid']}{row['lv_uuid']}".replace("-", "").replace("LVM", "LVM-", 1)
                return Node(path, int(row["lv_size"]), uuid)
        return None


def lvm(program: str, *arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
    done = subprocess.run(
        [program, *_NO_KERNEL, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def only(*disks: str) -> str:
    accept = ",".join(f'"a|^{disk}$|"' for disk in disks)
    return f'--config=devices{{filter=[{accept},"r|.*|"] use_devicesfile=0 hints="none"}} backup{{backup=0 archive=0}}'


@contextlib.contextmanager
def loop(file: Path, size_bytes: int) -> Iterator[str]:
    with file.open("wb") as image:
        image.truncate(size_bytes)
    done = subprocess.run(["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=True)
    disk = done.stdout.strip()
    try:
        yield disk
    finally:
        subprocess.run(["losetup", "--detach", disk], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    with loop(tmp_path / "pv", 256 * MIB) as disk:
        lvm("pvcreate", only(disk), "--yes", "--metadatasize=4k", disk)
        lvm("vgcreate", only(disk), "--physicalextentsize=1m", VG, disk)
        yield disk


def backend(
    tmp_path: Path, disk: str, runner: MetadataOnly, *, space: Space | None = None, given: bool = True
) -> LvmBackend:
    return LvmBackend(
        "fast",
        vg=VG,
        space=space or Thick(),
        state=tmp_path / "state",
        runner=runner,
        devices=[Path(disk)] if given else [],
        nodes=PretendedNodes(tmp_path / "dev", disk),
    )


def test_life_of_a_volume(tmp_path: Path, disk: str) -> None:
    runner = MetadataOnly()
    pool = backend(tmp_path, disk, runner)
    assert pool.problems(soon()) == []
    assert pool.capacity(soon()).available_bytes == 255 * MIB
    name = "ü/\U0001f600-=&#:!, @" + "x" * 100
    parameters = {"pool": "fast", "note": "y" * 600, "ß": "ü"}
    volume_id = volume_id_of(name)
    before = len(runner.calls)
    volume = pool.create(volume_id, name=name, size_bytes=10 * MIB, parameters=parameters, deadline=soon())
    assert [call[0] for call in runner.calls[before:]] == ["lvcreate"]
    assert (volume.name, volume.parameters, volume.size_bytes, volume.blank) == (name, parameters, 10 * MIB, True)
    assert backend(tmp_path, disk, runner).find(volume_id, soon()) == volume

    assert pool.grow(volume, size_bytes=20 * MIB, deadline=soon()).size_bytes == 20 * MIB
    pool.mark_used(volume)
    pool.tend(soon())
    assert "snode.blank" not in lvm("lvs", only(disk), "--options=lv_tags", f"{VG}/{volume_id}")
    assert [(v.name, v.blank, v.size_bytes) for v in pool.list_volumes(soon())] == [(name, False, 20 * MIB)]

    pool.delete(volume, soon())
    assert pool.list_volumes(soon()) == []
    assert "trash-" in lvm("lvs", only(disk), VG)
    for _ in range(3):
        pool.tend(soon())
    assert lvm("lvs", only(disk), VG) == ""


def test_its_words_for_no_space(tmp_path: Path, disk: str) -> None:
    pool = backend(tmp_path, disk, MetadataOnly())
    for size, words in ((256, "Insufficient free space|insufficient free space"), (10**6, "nsufficient free space")):
        with pytest.raises(NoSpace, match=words):
            pool._group.lvm._devices = (disk,)
            pool._group.lvm.create(
                "x", tags=["a"], shape=["--type=linear", "--zero=n", f"--extents={size}"], deadline=soon()
            )
    with pytest.raises(NoSpace, match="physical volumes"):
        shape = ["--type=striped", "--zero=n", "--stripes=2", "--extents=4"]
        pool._group.lvm.create("x", tags=["a"], shape=shape, deadline=soon())
    pool.create(volume_id_of("a"), name="a", size_bytes=200 * MIB, parameters={}, deadline=soon())
    with pytest.raises(NoSpace, match="nsufficient free space"):
        pool._group.lvm.extend(volume_id_of("a"), extents=300, deadline=soon())
    with pytest.raises(NoSpace, match=r"free on 1 disks"):
        pool.create(volume_id_of("b"), name="b", size_bytes=100 * MIB, parameters={}, deadline=soon())
    assert pool.create(volume_id_of("b"), name="b", size_bytes=55 * MIB, parameters={}, deadline=soon())


def test_its_words_for_the_rest(tmp_path: Path, disk: str) -> None:
    pool = backend(tmp_path, disk, MetadataOnly())
    tools = pool._group.lvm
    pool.create(volume_id_of("a"), name="a", size_bytes=4 * MIB, parameters={}, deadline=soon())
    shape = ["--type=linear", "--zero=n", "--extents=1"]
    with pytest.raises(CommandFailed, match="already exists"):
        tools.create(volume_id_of("a"), tags=["a"], shape=shape, deadline=soon())
    missing = r"not found|Failed to find"
    with pytest.raises(CommandFailed, match=missing):
        tools.rename("nosuch", "other", soon())
    with pytest.raises(CommandFailed, match=missing):
        tools.remove("nosuch", soon())
    with pytest.raises(CommandFailed, match=missing):
        tools.remove_tag("nosuch", "x", soon())
    with pytest.raises(CommandFailed, match="matches existing size"):
        tools.extend(volume_id_of("a"), extents=4, deadline=soon())


def test_full_metadata_area_is_refused_before_it_is_full(tmp_path: Path, disk: str) -> None:
    pool = backend(tmp_path, disk, MetadataOnly())
    for number, kilobytes in enumerate((100, 100, 100, 100, 30)):
        tags = [f"--addtag={'x' * 1000}{n}" for n in range(kilobytes)]
        shape = ["--activate=n", "--zero=n", "--wipesignatures=n", "--extents=1", f"--name=f{number}"]
        lvm("lvcreate", only(disk), *shape, *tags, VG)
    with pytest.raises(NoSpace, match="metadata area"):
        pool.create(volume_id_of("a"), name="a", size_bytes=MIB, parameters={}, deadline=soon())
    assert "metadata area" in pool.warnings(soon())[0]
    with pytest.raises(NoSpace, match="exceeds maximum metadata size"):
        tags = [f"{'y' * 1000}{n}" for n in range(100)]
        pool._group.lvm.create("full", tags=tags, shape=["--type=linear", "--zero=n", "--extents=1"], deadline=soon())


def test_the_search_and_groups_of_one_name(tmp_path: Path, disk: str) -> None:
    pool = backend(tmp_path, disk, MetadataOnly(), given=False)
    volume = pool.create(volume_id_of("a"), name="a", size_bytes=MIB, parameters={}, deadline=soon())
    with loop(tmp_path / "guest", 64 * MIB) as guest:
        lvm("vgcreate", only(guest), VG, guest)
        again = backend(tmp_path, disk, MetadataOnly(), given=False)
        assert again.list_volumes(soon()) == [volume], "the group that we know is chosen by its uuid"
        stranger = LvmBackend(
            "new", vg=VG, space=Thick(), state=tmp_path / "new", runner=MetadataOnly(), nodes=pool._nodes
        )
        assert "2 groups have this name" in stranger.problems(soon())[0]
    with pytest.raises(Unavailable, match="not found on this machine"):
        LvmBackend(
            "x", vg="nosuchvg", space=Thick(), state=tmp_path / "x", runner=MetadataOnly(), nodes=pool._nodes
        ).list_volumes(soon())


def test_a_group_inside_a_volume_of_ours_is_never_the_pool(tmp_path: Path) -> None:
    """No record of the group yet, and the real one is not there: the guest's must not be taken for it."""
    with loop(tmp_path / f"{volume_id_of('guest')}.img", 64 * MIB) as guest:
        lvm("vgcreate", only(guest), VG, guest)
        pool = backend(tmp_path, guest, MetadataOnly(), given=False)
        assert "not found on this machine" in pool.problems(soon())[0]
        assert not (tmp_path / "state" / "vg.json").exists()
    with loop(tmp_path / "a disk", 64 * MIB) as disk:
        lvm("vgcreate", only(disk), VG, disk)
        assert backend(tmp_path, disk, MetadataOnly(), given=False).problems(soon()) == []


def test_a_disk_that_joins_and_one_that_goes(tmp_path: Path, disk: str) -> None:
    pool = backend(tmp_path, disk, MetadataOnly(), given=False)
    pool.create(volume_id_of("a"), name="a", size_bytes=MIB, parameters={}, deadline=soon())
    with loop(tmp_path / "second", 64 * MIB) as second:
        lvm("pvcreate", only(second), "--yes", "--metadatasize=1m", second)
        lvm("vgextend", only(disk, second), VG, second)
        striped = backend(tmp_path, disk, MetadataOnly(), space=Thick("striped"), given=False)
        # The first thing that is asked for afterwards is a change, when only the old disks are known.
        pool.create(volume_id_of("c"), name="c", size_bytes=MIB, parameters={}, deadline=soon())
        assert pool.list_volumes(soon()) != []
        assert pool.capacity(soon()).available_bytes == (253 + 62) * MIB
        assert striped.capacity(soon()).available_bytes == 2 * 62 * MIB
    assert {volume.name for volume in pool.list_volumes(soon())} == {"a", "c"}
    assert "1 of its disks are missing" in pool.warnings(soon())[0]
    with pytest.raises(Unavailable, match=f"vgreduce --removemissing {VG}"):
        pool.create(volume_id_of("b"), name="b", size_bytes=MIB, parameters={}, deadline=soon())


def test_a_killed_lvcreate_leaves_all_or_nothing(tmp_path: Path, disk: str) -> None:
    """LVM writes its metadata in one step: however early or late it is killed, the volume is whole or absent."""
    runner = MetadataOnly()
    for number in range(20):
        pool = backend(tmp_path, disk, runner)
        name = f"k{number}"
        volume_id = volume_id_of(name)
        argv = [
            "lvcreate",
            *_NO_KERNEL,
            only(disk),
            "--yes",
            "--activate=n",
            "--zero=n",
            "--wipesignatures=n",
            "--extents=1",
        ]
        tags = [f"--addtag={tag}" for tag in ("snode.format=1", "snode.pool=fast", "snode.name=eA==", "snode.blank")]
        process = subprocess.Popen(
            [*argv, *tags, f"--name={volume_id}", VG], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        Deadline.after(0.002 * number).sleep(0.002 * number)
        process.kill()
        process.wait()
        found = pool.find(volume_id, soon())
        assert found is None or (found.name, found.size_bytes, found.blank) == ("x", MIB, True)
        if found is None:
            pool.create(volume_id, name="x", size_bytes=MIB, parameters={}, deadline=soon())
    assert len(backend(tmp_path, disk, runner).list_volumes(soon())) == 20
