"""Which mount flags a caller may ask for.

A flag is one token that ends up in `mount --options=`, so nothing passes that is not in the lists here: an unknown
word, a comma or a blank could turn the mount into another one (`bind`, `loop`, `remount`, `X-mount.…`), bring in a
second device (`journal_path=`, `logdev=`, `device=`), weaken the node (`suid`, `dev`, `errors=panic`), or lose written
data (`nobarrier`, `norecovery`).
"""

import re
from collections.abc import Mapping, Sequence

from csi.errors import Invalid

#: Filesystems that the driver makes and mounts.
FS_TYPES = ("ext4", "xfs", "btrfs")
DEFAULT_FS = "ext4"

#: Both on every mount, asked for or not. The bytes of a volume are whatever its writers put there, through a raw block
#: publish of the same volume too, so a device node or a set-uid root program on it is never to be trusted by the node.
#: The cost is that set-uid programs kept on a volume run without their bit.
ALWAYS = ("nosuid", "nodev")

_MOST_FLAGS = 32
_LONGEST_FLAG = 512

_NUMBER = r"\d{1,10}"
_SIZE = r"\d{1,10}[kKmMgG]?"


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_COMMON = _words(
    "ro rw nosuid nodev exec noexec sync async dirsync atime noatime diratime nodiratime relatime norelatime",
    "strictatime nostrictatime lazytime nolazytime nosymfollow iversion noiversion",
)
_WORDS: Mapping[str, frozenset[str]] = {
    "ext4": _words(
        "acl noacl user_xattr nouser_xattr discard nodiscard delalloc nodelalloc auto_da_alloc noauto_da_alloc",
        "journal_checksum journal_async_commit dioread_lock dioread_nolock block_validity noblock_validity",
        "noinit_itable quota noquota usrquota grpquota prjquota grpid nogrpid bsdgroups sysvgroups i_version barrier",
    ),
    "xfs": _words(
        "discard nodiscard nouuid ikeep noikeep inode32 inode64 largeio nolargeio swalloc noalign wsync filestreams",
        "attr2 noattr2 grpid nogrpid bsdgroups sysvgroups quota noquota uquota usrquota gquota grpquota pquota",
        "prjquota uqnoenforce gqnoenforce pqnoenforce",
    ),
    "btrfs": _words(
        "acl noacl autodefrag noautodefrag compress compress-force datacow nodatacow datasum nodatasum discard",
        "nodiscard flushoncommit noflushoncommit ssd nossd ssd_spread nossd_spread skip_balance treelog notreelog",
        "user_subvol_rm_allowed barrier",
    ),
}
_VALUES: Mapping[str, Mapping[str, str]] = {
    "ext4": {
        "errors": "remount-ro|continue",
        "data": "journal|ordered|writeback",
        "barrier": "1",
        "commit": _NUMBER,
        "stripe": _NUMBER,
        "inode_readahead_blks": _NUMBER,
        "min_batch_time": _NUMBER,
        "max_batch_time": _NUMBER,
        "init_itable": _NUMBER,
        "max_dir_size_kb": _NUMBER,
        "journal_ioprio": "[0-7]",
        "jqfmt": "vfsold|vfsv0|vfsv1",
        "auto_da_alloc": "[01]",
    },
    "xfs": {
        "allocsize": _SIZE,
        "logbsize": _SIZE,
        "logbufs": "[2-8]",
        "sunit": _NUMBER,
        "swidth": _NUMBER,
    },
    "btrfs": {
        "compress": r"(zlib|lzo|zstd|no|none)(:\d{1,2})?",
        "compress-force": r"(zlib|lzo|zstd|no|none)(:\d{1,2})?",
        "commit": _NUMBER,
        "discard": "async|sync",
        "max_inline": _SIZE,
        "metadata_ratio": _NUMBER,
        "space_cache": "v2",
        "thread_pool": _NUMBER,
    },
}
# A label holds commas (categories), so it is the one value that may be quoted: kubelet writes context="…" for volumes
# whose CSIDriver object says seLinuxMount.
_SENSITIVITY = r"s\d{1,2}(:c\d{1,4}([.,]c\d{1,4})*)?"
_LABEL = rf"[A-Za-z0-9_.]{{1,64}}(:[A-Za-z0-9_.]{{1,64}}){{2}}(:{_SENSITIVITY}(-{_SENSITIVITY})?)?"
_CONTEXT = re.compile(rf'context=("{_LABEL}"|{_LABEL})')


def check_fs_type(fs_type: str) -> None:
    """Raise Invalid unless `fs_type` is one of FS_TYPES."""
    if fs_type not in FS_TYPES:
        raise Invalid(f"fs_type {fs_type[:64]!r}: not supported; use one of {', '.join(FS_TYPES)}")


def check_mount_flags(fs_type: str, flags: Sequence[str]) -> None:
    """Raise Invalid, naming the flag, unless every flag is allowed for this filesystem ("" = the default one)."""
    fs_type = fs_type or DEFAULT_FS
    check_fs_type(fs_type)
    if len(flags) > _MOST_FLAGS:
        raise Invalid(f"mount_flags: {len(flags)} of them; at most {_MOST_FLAGS} are accepted")
    for flag in flags:
        if not _allowed(fs_type, flag):
            shown = flag if len(flag) <= 80 else f"{flag[:80]}…"
            raise Invalid(f"mount_flags: {shown!r} is not allowed on {fs_type}; take it out of the mount options")
    if sum(flag.startswith("context=") for flag in flags) > 1:
        raise Invalid("mount_flags: context= is given more than once; give one label")


def mount_options(fs_type: str, flags: Sequence[str], *, readonly: bool) -> str:
    """The checked value of `mount --options=`. Raises Invalid as check_mount_flags does."""
    check_mount_flags(fs_type, flags)
    options = ["ro" if readonly else "rw", *ALWAYS]
    if fs_type == "xfs":
        # A clone or snapshot carries the UUID of its origin, and XFS refuses to mount both on one node.
        options.append("nouuid")
    options += [_quoted(flag) for flag in flags if flag not in ("ro", "rw")]
    return ",".join(dict.fromkeys(options))


def _allowed(fs_type: str, flag: str) -> bool:
    if len(flag) > _LONGEST_FLAG or not flag.isascii():
        return False
    if flag in _COMMON or flag in _WORDS[fs_type]:
        return True
    name, equals, value = flag.partition("=")
    if name == "context":
        return _CONTEXT.fullmatch(flag) is not None
    pattern = _VALUES[fs_type].get(name)
    return bool(equals) and pattern is not None and re.fullmatch(pattern, value) is not None


def _quoted(flag: str) -> str:
    name, _, value = flag.partition("=")
    return f'context="{value.strip(chr(34))}"' if name == "context" else flag
