"""The Debian packages that the lab stands on: guests use the host's own tools, so the host must have them."""

import os
import platform
import shutil
from pathlib import Path

from .errors import LabError

_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# One program stands for each package; a path where the program is not on anybody's PATH.
NEEDED = {
    "btrfs-progs": "mkfs.btrfs",
    "e2fsprogs": "mkfs.ext4",
    "fio": "fio",
    "iproute2": "tc",
    "iputils-ping": "ping",
    "kmod": "modprobe",
    "lvm2": "lvm",
    "open-iscsi": "iscsid",
    "patchelf": "patchelf",
    "procps": "pkill",
    "python3": "/usr/bin/python3",
    "sg3-utils": "sg_inq",
    "systemd": "/lib/systemd/systemd",
    "tgt": "tgtd",
    "thin-provisioning-tools": "thin_check",
    "udev": "/lib/systemd/systemd-udevd",
    "util-linux": "wipefs",
    "xfsprogs": "mkfs.xfs",
}


def find_missing() -> list[str]:
    """Names of the Debian packages that are not installed, in order."""
    return sorted(name for name, program in NEEDED.items() if shutil.which(program, path=_SEARCH) is None)


def check_host() -> None:
    """Raises LabError that says, all at once, what this machine lacks for the lab."""
    wrong: list[str] = []
    if os.geteuid() != 0:
        wrong.append("the lab must run as root")
    if platform.machine() != "x86_64":
        wrong.append(f"the lab needs an x86_64 machine, this is {platform.machine()}")
    if not Path("/dev/net/tun").exists():
        wrong.append("/dev/net/tun is missing (modprobe tun)")
    if missing := find_missing():
        wrong.append("missing Debian packages: apt-get install " + " ".join(missing))
    if wrong:
        raise LabError("; ".join(wrong))
