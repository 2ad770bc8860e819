"""What a CNODE's initiator holds, as the kernel and the node database show it; asked without the driver."""

import json
from collections.abc import Mapping

from tests.lab import roles
from tests.lab.guest import Guest

DATABASES = "/etc/iscsi/nodes /var/lib/iscsi/nodes"


def target_of(context: Mapping[str, str]) -> str:
    """The target's name in a publish_context."""
    return str(json.loads(context["paths"])[0]["target"])


def sessions(cnode: Guest) -> list[str]:
    """The target of every session, oldest first."""
    return cnode.run("cat /sys/class/iscsi_session/*/targetname 2>/dev/null")[1].split()


def states(cnode: Guest) -> list[str]:
    """The state of every session: LOGGED_IN, FAILED (iscsid tries to get it back), FREE (given up)."""
    return cnode.run("cat /sys/class/iscsi_session/*/state 2>/dev/null")[1].split()


def disks(cnode: Guest) -> list[str]:
    """The kernel's names of all SCSI disks."""
    return cnode.run("cd /sys/block && ls -d sd* 2>/dev/null")[1].split()


def disk_of(cnode: Guest, target: str) -> str:
    """The kernel's name of the disk of a session."""
    look = (
        f"for s in /sys/class/iscsi_session/*; do grep -qx {target} $s/targetname && ls $s/device/target*/*/block; done"
    )
    return cnode.sh(look)


def records(cnode: Guest) -> list[str]:
    """The files of the node database."""
    return cnode.run(f"find {DATABASES} -type f 2>/dev/null")[1].split()


def until_nothing_is_left(cnode: Guest, tries: int = 100) -> None:
    """Returns once there is neither a session nor a record."""
    look = (
        f'! ls /sys/class/iscsi_session/* 2>/dev/null | grep -q . && [ -z "$(find {DATABASES} -type f 2>/dev/null)" ]'
    )
    roles.until(cnode, look, "the end of every session and record", tries)
