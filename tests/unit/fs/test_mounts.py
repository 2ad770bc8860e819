"""Mounts on real devices: landing where they should, layers, read-only, attacks on the path."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import Conflict, DataLoss, InUse, Invalid, NotFound, Timeout, Unavailable
from csi.fs.format import FS_TYPES, Filesystems
from csi.fs.mounts import Mounts
from csi.fs.usage import device_number
from csi.run import Result, SubprocessRunner
from tests.unit.fs.conftest import MakeDisk, make_fs, swapping, tool

pytestmark = pytest.mark.root


@pytest.fixture
def device(make_disk: MakeDisk, filesystems: Filesystems, deadline: Deadline) -> Path:
    made = make_disk(32)
    make_fs(filesystems, made, "ext4", deadline)
    return made


@pytest.fixture
def staging(scratch: Path, mounts: Mounts) -> Path:
    mounts.ensure_directory(scratch / "staging/globalmount")
    return scratch / "staging/globalmount"


@pytest.fixture
def staged(device: Path, staging: Path, mounts: Mounts, deadline: Deadline) -> Path:
    mounts.mount(device, staging, fs_type="ext4", flags=["noatime"], readonly=False, deadline=deadline)
    return staging


def new_target(mounts: Mounts, scratch: Path, name: str = "pods/uid/volume/mount") -> Path:
    mounts.ensure_directory(scratch / name)
    return scratch / name


def number(device: Path) -> str:
    found = device_number(device)
    assert found
    return found


@pytest.mark.parametrize("fs_type", FS_TYPES)
@pytest.mark.parametrize("readonly", [False, True])
def test_mount_lands_with_the_policy_and_repeats(
    fs_type: str,
    readonly: bool,
    make_disk: MakeDisk,
    staging: Path,
    filesystems: Filesystems,
    mounts: Mounts,
    deadline: Deadline,
) -> None:
    device = make_disk(320)
    make_fs(filesystems, device, fs_type, deadline)
    for _ in range(2):
        mounts.mount(device, staging, fs_type=fs_type, flags=["noatime"], readonly=readonly, deadline=deadline)
        (mount,) = mounts.at(staging)
        assert mount.options >= {"nosuid", "nodev", "noatime", "ro" if readonly else "rw"}
        assert (mount.fs_type, mount.source, mount.readonly) == (fs_type, str(device), readonly)
        assert mounts.of(number(device)) == [mount]
    if not readonly:
        (staging / "file").write_text("data")
    with pytest.raises(Conflict, match="unmount it first"):
        mounts.mount(device, staging, fs_type=fs_type, flags=[], readonly=not readonly, deadline=deadline)
    for _ in range(2):
        mounts.unmount_all(staging, deadline)
    assert mounts.at(staging) == [] and mounts.of(number(device)) == []


def test_two_xfs_of_one_uuid_are_mounted_side_by_side(
    make_disk: MakeDisk, scratch: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    origin, clone = make_disk(320), make_disk(320)
    make_fs(filesystems, origin, "xfs", deadline)
    tool("dd", f"if={origin}", f"of={clone}", "bs=1M", "conv=sparse,fsync", "status=none")
    for name, device in (("a", origin), ("b", clone)):
        target = new_target(mounts, scratch, name)
        mounts.mount(device, target, fs_type="xfs", flags=[], readonly=False, deadline=deadline)


def test_the_flag_ro_is_a_readonly_mount(device: Path, staging: Path, mounts: Mounts, deadline: Deadline) -> None:
    for _ in range(2):
        mounts.mount(device, staging, fs_type="ext4", flags=["ro"], readonly=False, deadline=deadline)
    assert mounts.at(staging)[0].readonly


def test_a_refused_flag_mounts_nothing(device: Path, staging: Path, mounts: Mounts, deadline: Deadline) -> None:
    for flag in ("remount", "bind", "suid", "noatime,suid"):
        with pytest.raises(Invalid, match="mount_flags"):
            mounts.mount(device, staging, fs_type="ext4", flags=[flag], readonly=False, deadline=deadline)
    assert mounts.at(staging) == []


def test_every_allowed_flag_is_one_that_the_kernel_or_its_absence_explains(
    device: Path, staging: Path, mounts: Mounts, deadline: Deadline
) -> None:
    flags = ["noexec", "data=ordered", "commit=10", "errors=remount-ro", "discard", "lazytime", "init_itable=5"]
    mounts.mount(device, staging, fs_type="ext4", flags=flags, readonly=False, deadline=deadline)
    mount = mounts.at(staging)[0]
    assert mount.options | mount.super_options >= {"noexec", "commit=10", "errors=remount-ro", "discard", "lazytime"}


def test_a_flag_that_the_kernel_does_not_take_is_named(
    device: Path, staging: Path, mounts: Mounts, deadline: Deadline
) -> None:
    with pytest.raises(Invalid, match=r"jqfmt=vfsv1.*dmesg|data=journal"):
        mounts.mount(
            device,
            staging,
            fs_type="ext4",
            flags=["data=journal", "dioread_nolock", "delalloc", "jqfmt=vfsv1", "journal_async_commit"],
            readonly=False,
            deadline=deadline,
        )


def test_something_else_at_the_target_is_never_covered(
    device: Path, staged: Path, make_disk: MakeDisk, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    other = make_disk(32)
    make_fs(filesystems, other, "ext4", deadline)
    with pytest.raises(InUse, match=f"{device}.*not {other}"):
        mounts.mount(other, staged, fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    assert len(mounts.at(staged)) == 1


def test_a_filesystem_that_went_readonly_is_not_taken_for_a_good_mount(
    device: Path, staged: Path, mounts: Mounts, deadline: Deadline
) -> None:
    tool("mount", "-o", "remount,ro,abort", str(staged), ok=(0, 32))
    tool("mount", "-o", "remount,bind,rw", str(staged), ok=(0, 32))
    assert mounts.at(staged)[0].readonly
    with pytest.raises((Unavailable, Conflict), match="read-only"):
        mounts.mount(device, staged, fs_type="ext4", flags=[], readonly=False, deadline=deadline)


def test_mount_errors_have_their_kind(
    make_disk: MakeDisk, device: Path, staging: Path, filesystems: Filesystems, mounts: Mounts, deadline: Deadline
) -> None:
    blank, xfs = make_disk(32), make_disk(320)
    make_fs(filesystems, xfs, "xfs", deadline)
    with xfs.open("r+b") as file:
        file.seek(512)  # the AGF of the first group
        file.write(b"\xff" * 512)
    cases: list[tuple[Path, str, type[Exception]]] = [
        (blank, "ext4", DataLoss),
        (xfs, "xfs", DataLoss),
        (device, "xfs", DataLoss),
        (Path("/dev/loop-none"), "ext4", Unavailable),
    ]
    for path, fs_type, error in cases:
        with pytest.raises(error):
            mounts.mount(path, staging, fs_type=fs_type, flags=[], readonly=False, deadline=deadline)
    with pytest.raises(NotFound):
        mounts.mount(device, staging / "none", fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    mounts.ensure_file(staging / "file")
    with pytest.raises(Invalid, match="folders"):
        mounts.mount(device, staging / "file", fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    assert mounts.at(staging) == []


def test_a_writable_mount_of_a_readonly_device_does_not_fall_back(
    device: Path, staging: Path, mounts: Mounts, deadline: Deadline
) -> None:
    tool("blockdev", "--setro", str(device))
    with pytest.raises(InUse, match="read-only"):
        mounts.mount(device, staging, fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    assert mounts.at(staging) == []
    mounts.mount(device, staging, fs_type="ext4", flags=[], readonly=True, deadline=deadline)


def test_bind_shows_the_volume_and_keeps_the_policy(
    staged: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    (staged / "file").write_text("data")
    writable, readonly = new_target(mounts, scratch, "pods/w/mount"), new_target(mounts, scratch, "pods/r/mount")
    for _ in range(2):
        mounts.bind(staged, writable, readonly=False, deadline=deadline)
        mounts.bind(staged, readonly, readonly=True, deadline=deadline)
    assert (readonly / "file").read_text() == "data"
    (writable / "file").write_text("more")
    with pytest.raises(OSError, match="Read-only"):
        (readonly / "file").write_text("no")
    for target in (writable, readonly):
        (mount,) = mounts.at(target)
        assert mount.options >= {"nosuid", "nodev", "noatime"}
    with pytest.raises(Conflict):
        mounts.bind(staged, readonly, readonly=False, deadline=deadline)
    mounts.bind(staged, writable, readonly=True, deadline=deadline)
    assert mounts.at(writable)[0].readonly


class StopsBefore(SubprocessRunner):
    """Kills the caller before the first command that has a word in its argv."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word

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
        if any(self._word in word for word in argv):
            raise KeyboardInterrupt
        return super().run(
            argv, deadline=deadline, read_only=read_only, ok=ok, input=input, timeout=timeout, pass_fds=pass_fds
        )


def test_a_readonly_bind_killed_between_its_steps_is_completed(
    staged: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    target = new_target(mounts, scratch)
    with pytest.raises(KeyboardInterrupt):
        Mounts(StopsBefore("remount")).bind(staged, target, readonly=True, deadline=deadline)
    assert not mounts.at(target)[0].readonly
    mounts.bind(staged, target, readonly=True, deadline=deadline)
    (mount,) = mounts.at(target)
    assert mount.readonly


def test_nothing_is_bound_from_a_folder_where_nothing_is_mounted(
    staging: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    target = new_target(mounts, scratch)
    with pytest.raises(Unavailable, match="stage the volume"):
        mounts.bind(staging, target, readonly=False, deadline=deadline)
    assert mounts.at(target) == []


def test_bind_never_covers_something_else(
    device: Path, staged: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    target = new_target(mounts, scratch)
    tool("mount", "-t", "tmpfs", "tmpfs", str(target))
    with pytest.raises(InUse, match="unmount it first"):
        mounts.bind(staged, target, readonly=False, deadline=deadline)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_device_node_is_bound_onto_a_file(
    readonly: bool, make_disk: MakeDisk, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    device, other = make_disk(8), make_disk(8)
    target = scratch / "plugins/block/publish/pod"
    mounts.ensure_file(target)
    for _ in range(2):
        mounts.bind(device, target, readonly=readonly, deadline=deadline)
    assert target.is_block_device() and device_number(target) == number(device)
    (mount,) = mounts.of_node(device)
    assert (mount.mount_point, mount.readonly) == (target, readonly)
    assert mounts.of_node(other) == [] and mounts.of(number(device)) == []
    with target.open("rb") as file:
        assert file.read(512) == bytes(512)
    with pytest.raises(InUse):
        mounts.bind(other, target, readonly=readonly, deadline=deadline)
    with pytest.raises(InUse, match="still mounted"):
        mounts.remove_target(target)
    mounts.unmount_all(target, deadline)
    mounts.remove_target(target)
    assert not target.exists() and mounts.of_node(device) == []


def test_a_bind_of_a_node_that_was_made_anew_is_still_found(
    make_disk: MakeDisk, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    """A bind of a deleted node opens whatever device has its number now."""
    device = make_disk(8)
    folder = scratch / "devices"
    folder.mkdir()
    tool("mount", "-t", "tmpfs", "tmpfs", str(folder))
    node, target = folder / "sdx", scratch / "target"
    os.mknod(node, 0o60600, device.stat().st_rdev)
    mounts.ensure_file(target)
    mounts.bind(node, target, readonly=False, deadline=deadline)
    assert [mount.mount_point for mount in mounts.of_node(node)] == [target]
    node.unlink()
    os.mknod(node, 0o60600, device.stat().st_rdev)
    assert [mount.mount_point for mount in mounts.of_node(node)] == [target]
    mounts.unmount_all(target, deadline)


def test_a_folder_and_a_file_are_not_bound_onto_each_other(
    staged: Path, device: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    folder, file = new_target(mounts, scratch), scratch / "file"
    mounts.ensure_file(file)
    for source, target in ((staged, file), (device, folder)):
        with pytest.raises(Invalid, match="both be folders"):
            mounts.bind(source, target, readonly=False, deadline=deadline)


def test_unmount_takes_every_layer(
    device: Path, staged: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    target = new_target(mounts, scratch)
    for _ in range(3):
        tool("mount", "--bind", str(staged), str(target))
    tool("mount", "-t", "tmpfs", "tmpfs", str(target))
    assert [mount.fs_type for mount in mounts.at(target)] == ["ext4", "ext4", "ext4", "tmpfs"]
    assert len(mounts.of(number(device))) == 4
    mounts.unmount_all(target, deadline)
    assert mounts.at(target) == [] and len(mounts.of(number(device))) == 1
    mounts.remove_target(target)


def test_unmount_of_what_is_not_mounted_or_not_there(scratch: Path, mounts: Mounts, deadline: Deadline) -> None:
    mounts.unmount_all(scratch, deadline)
    mounts.unmount_all(scratch / "never/was", deadline)


def test_names_with_blanks_and_backslashes(staged: Path, scratch: Path, mounts: Mounts, deadline: Deadline) -> None:
    for name in ("a b", "tab\there", "back\\slash\\040", "new\nline", "#hash", "ümläut", "//deleted", "-o"):
        target = new_target(mounts, scratch / "odd", name.lstrip("/"))
        mounts.bind(staged, target, readonly=True, deadline=deadline)
        assert mounts.at(target)[0].readonly
        mounts.unmount_all(target, deadline)
        mounts.remove_target(target)


def test_a_busy_filesystem_is_not_unmounted_and_the_message_says_who(
    staged: Path, mounts: Mounts, deadline: Deadline
) -> None:
    with (staged / "file").open("w"), pytest.raises(InUse, match=f"fuser -vm {staged}"):
        mounts.unmount_all(staged, deadline)
    (staged / "inner").mkdir()
    tool("mount", "-t", "tmpfs", "tmpfs", str(staged / "inner"))
    with pytest.raises(InUse, match=f"other mounts in it: {staged}/inner"):
        mounts.unmount_all(staged, deadline)
    mounts.unmount_all(staged / "inner", deadline)
    mounts.unmount_all(staged, deadline)


def test_a_target_with_a_link_is_neither_mounted_nor_unmounted(
    device: Path, staged: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    victim = new_target(mounts, scratch, "victim/mount")
    (scratch / "pods").symlink_to(scratch / "victim")
    with pytest.raises(Invalid, match="symbolic link"):
        mounts.bind(staged, scratch / "pods/mount", readonly=False, deadline=deadline)
    with pytest.raises(Invalid, match="symbolic link"):
        mounts.mount(device, scratch / "pods/mount", fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    with pytest.raises(Unavailable, match="stage the volume"):
        mounts.bind(scratch / "pods", victim, readonly=False, deadline=deadline)
    mounts.bind(staged, victim, readonly=False, deadline=deadline)
    mounts.unmount_all(scratch / "pods/mount", deadline)  # nothing is mounted at this path
    assert len(mounts.at(victim)) == 1


def test_the_last_component_is_not_followed_by_an_unmount(
    staged: Path, scratch: Path, runner: SubprocessRunner, deadline: Deadline
) -> None:
    """Another namespace can rename a mount point away and put a link there; the table then lags behind."""
    (scratch / "link").symlink_to(staged)
    lagging = scratch / "mountinfo"
    lagging.write_text(f"900 1 8:1 / {scratch}/link rw - ext4 /dev/x rw\n")
    with pytest.raises(Unavailable, match="could not be unmounted"):
        Mounts(runner, table=lagging).unmount_all(scratch / "link", deadline)
    assert len(Mounts(runner).at(staged)) == 1


def test_a_racing_swap_never_moves_a_mount_elsewhere(
    staged: Path, scratch: Path, mounts: Mounts, deadline: Deadline
) -> None:
    """A thread exchanges the pod's folder for a link to a victim's; no mount and no unmount may reach the victim."""
    victim, pod = scratch / "victim", scratch / "pods"
    mounts.ensure_directory(victim / "mount")
    mounts.ensure_directory(pod / "mount")
    landed = refused = 0
    with swapping(pod, victim):
        for _ in range(40):
            try:
                mounts.bind(staged, pod / "mount", readonly=True, deadline=deadline)
                landed += 1
                mounts.unmount_all(pod / "mount", deadline)
            except (Invalid, Unavailable):
                refused += 1
            assert not any(victim in mount.mount_point.parents for mount in mounts.all())
    assert landed and refused
    mounts.unmount_all(pod / "mount", deadline)
    mounts.bind(staged, victim / "mount", readonly=False, deadline=deadline)
    with swapping(pod, victim):
        for _ in range(20):
            try:
                mounts.unmount_all(pod / "mount", deadline)
            except (Invalid, Unavailable):
                refused += 1
            assert len(mounts.at(victim / "mount")) == 1


def test_a_mount_that_landed_at_a_renamed_folder_is_taken_back(
    device: Path, scratch: Path, runner: SubprocessRunner, mounts: Mounts, deadline: Deadline
) -> None:
    target = new_target(mounts, scratch, "pods/a/mount")

    class Renames(SubprocessRunner):
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
            if argv[0] == "mount":
                (scratch / "pods/a").rename(scratch / "pods/b")
            return super().run(
                argv, deadline=deadline, read_only=read_only, ok=ok, input=input, timeout=timeout, pass_fds=pass_fds
            )

    with pytest.raises(Unavailable, match="renamed"):
        Mounts(Renames()).mount(device, target, fs_type="ext4", flags=[], readonly=False, deadline=deadline)
    assert mounts.of(number(device)) == []


def test_no_time_means_nothing_is_begun(device: Path, staging: Path, mounts: Mounts) -> None:
    with pytest.raises(Timeout):
        mounts.mount(device, staging, fs_type="ext4", flags=[], readonly=False, deadline=Deadline.after(0))
    assert mounts.at(staging) == []


def test_mounts_work_in_a_namespace_of_their_own(device: Path, scratch: Path) -> None:
    """As in a container: shared mounts made private, nothing seen outside."""
    code = (
        "import sys; from pathlib import Path; from csi.deadline import Deadline; from csi.fs.mounts import Mounts\n"
        "from csi.run import SubprocessRunner\n"
        "m = Mounts(SubprocessRunner()); d = Deadline.after(30); t = Path(sys.argv[2])\n"
        "m.ensure_directory(t); m.mount(Path(sys.argv[1]), t, fs_type='ext4', flags=[], readonly=False, deadline=d)\n"
        "assert m.at(t); m.unmount_all(t, d); assert not m.at(t); m.remove_target(t)\n"
    )
    import sys

    subprocess.run(
        ["unshare", "--mount", "--propagation=private", sys.executable, "-c", code, str(device), str(scratch / "in")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert not (scratch / "in").exists()
