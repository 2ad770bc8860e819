import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import Invalid
from csi.fs.flags import FS_TYPES, check_mount_flags, mount_options

LABEL = "system_u:object_r:container_file_t:s0"

REFUSED = [
    *["bind", "rbind", "loop", "loop=/dev/loop0", "remount", "move", "make-shared", "shared", "rshared", "private"],
    *["suid", "dev", "user", "users", "owner", "group", "defaults", "auto", "noauto", "nofail", "_netdev"],
    *["X-mount.mkdir", "X-mount.idmap=b:0:0:1", "x-systemd.automount", "X-mount.subdir=etc", "comment=a", "helper=x"],
    *["journal_path=/dev/sda", "journal_dev=8:1", "logdev=/dev/sda", "rtdev=/dev/sda", "device=/dev/sda", "sb=8193"],
    *["usrjquota=/etc/shadow", "grpjquota=x", "subvol=/", "subvolid=5", "degraded", "offset=4096", "sizelimit=1"],
    *["errors=panic", "fatal_errors=panic", "barrier=0", "nobarrier", "norecovery", "noload", "abort", "debug", "dax"],
    *["-o", "-o x", "--bind", "a,b", "noatime,suid", "noatime,bind", "a b", " noatime", "noatime ", "noatime\n", "\t"],
    *["", ",", "=", "noatime=1", "commit=", "commit=-1", "commit=1e9", "commit=1,dev", "commit", "data", "data=none"],
    *["NOATIME", "nöatime", "noatime\0", "noatime\0suid", "commit=٣", "a" * 5000, "noatime" * 100],
    *["context=", 'context="', "context=a", "context=a:b", f"context={LABEL},suid", f'context="{LABEL}",suid'],
    *[
        f'context="{LABEL}',
        f"context={LABEL}\n",
        f'context="{LABEL}" ',
        "context=a:b:c:s0:c1,c2,bind",
        "context=a:b:$(x)",
    ],
    *[f"fscontext={LABEL}", f"rootcontext={LABEL}", f"defcontext={LABEL}", "seclabel", "context=@parent"],
]


@pytest.mark.parametrize("fs_type", FS_TYPES)
@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_is_not_in_the_list_is_refused(fs_type: str, flag: str) -> None:
    with pytest.raises(Invalid, match="mount_flags") as caught:
        check_mount_flags(fs_type, ["noatime", flag])
    assert repr(flag)[:40].rstrip("'") in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("fs_type", "flag"),
    [
        *[
            (fs_type, flag)
            for fs_type in FS_TYPES
            for flag in ("noatime", "ro", "noexec", "discard", "lazytime", "sync")
        ],
        *[(fs_type, f"context={LABEL}") for fs_type in FS_TYPES],
        *[
            ("ext4", flag)
            for flag in ("data=journal", "commit=30", "errors=remount-ro", "stripe=64", "noauto_da_alloc")
        ],
        *[("xfs", flag) for flag in ("allocsize=64m", "logbsize=256k", "nouuid", "prjquota", "largeio")],
        *[("btrfs", flag) for flag in ("compress=zstd:3", "compress", "space_cache=v2", "discard=async", "nodatacow")],
        ("ext4", 'context="system_u:object_r:container_file_t:s0:c10,c200"'),
        ("ext4", 'context="system_u:object_r:svirt_lxc_net_t:s0-s15:c0.c1023"'),
    ],
)
def test_usual_flags_pass(fs_type: str, flag: str) -> None:
    check_mount_flags(fs_type, [flag])


@pytest.mark.parametrize(("fs_type", "flag"), [("ext4", "nouuid"), ("xfs", "data=journal"), ("btrfs", "delalloc")])
def test_flags_of_another_filesystem_are_refused(fs_type: str, flag: str) -> None:
    with pytest.raises(Invalid, match=f"{flag}.*{fs_type}"):
        check_mount_flags(fs_type, [flag])


@pytest.mark.parametrize("fs_type", ["../mkfs", "ext4 -E x", "EXT4", "ext3", "nfs", "tmpfs", "x" * 1000, "auto"])
def test_other_filesystems_are_refused(fs_type: str) -> None:
    with pytest.raises(Invalid, match=r"fs_type.*ext4, xfs, btrfs"):
        check_mount_flags(fs_type, [])


def test_no_fs_type_means_the_default() -> None:
    check_mount_flags("", ["data=ordered"])
    with pytest.raises(Invalid):
        check_mount_flags("", ["nouuid"])


def test_too_many_flags_and_two_labels_are_refused() -> None:
    with pytest.raises(Invalid, match="at most"):
        check_mount_flags("ext4", ["noatime"] * 100)
    with pytest.raises(Invalid, match="more than once"):
        check_mount_flags("ext4", [f"context={LABEL}", f'context="{LABEL}"'])


def test_options_hold_the_policy_and_one_label_in_quotes() -> None:
    options = mount_options("ext4", ["noatime", "noatime", f"context={LABEL}"], readonly=False)
    assert options == f'rw,nosuid,nodev,noatime,context="{LABEL}"'
    assert mount_options("xfs", ["ro", "nouuid"], readonly=True) == "ro,nosuid,nodev,nouuid"


@given(st.sampled_from(FS_TYPES), st.lists(st.text(max_size=40), max_size=5))
def test_nothing_gets_through_that_mount_would_split(fs_type: str, flags: list[str]) -> None:
    try:
        options = mount_options(fs_type, flags, readonly=False)
    except Invalid:
        return
    assert re.fullmatch(r"rw,nosuid,nodev[a-z0-9_,:=-]*", options)


@given(st.sampled_from(FS_TYPES), st.from_regex(r'(context|commit|compress|allocsize)=["a-z0-9:,._\n -]{0,60}'))
def test_values_stay_in_their_option(fs_type: str, flag: str) -> None:
    try:
        options = mount_options(fs_type, [flag], readonly=False)
    except Invalid:
        return
    unquoted = re.sub(r'"[^"]*"', "", options)
    assert unquoted.count(",") <= 4
    assert not re.search(r"\s", options)
