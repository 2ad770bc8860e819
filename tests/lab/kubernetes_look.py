"""What is left of volumes on the machines of a Kubernetes in the lab, and in its API."""

from .guest import Guest
from .kubernetes import Kubernetes
from .roles import until

_SNODE = {
    "logical volumes": "lvs --noheadings -o lv_name | grep v-",
    "files": "ls /var/lib/snode/volumes/*.img",
    "targets": "tgtadm --lld iscsi --op show --mode target | grep io.snode",
    "accounts": "tgtadm --lld iscsi --op show --mode account | grep -v 'Account list'",
    "publications": "ls /var/lib/snode/publications",
}
_CNODE = {
    "sessions": "ls /sys/class/iscsi_session",
    "records of open-iscsi": "find /etc/iscsi/nodes /var/lib/iscsi/nodes -type f",
    "mounts": "grep -E 'kubernetes.io.csi' /proc/self/mountinfo",
    "node records": "ls /var/lib/snode/node | grep v-",
}


def leftovers(cluster: Kubernetes) -> dict[str, str]:
    """What is there of any volume; {} when all is gone. Waits for the wipe of deleted volumes."""
    until(cluster.snode, "! lvs --noheadings -o lv_name | grep -q trash", "the wipe of deleted volumes", 4800)
    found = look(cluster.snode, _SNODE)
    for cnode in cluster.cnodes:
        found |= look(cnode, _CNODE)
    objects = {
        "persistent volumes": cluster.core.list_persistent_volume(),
        "attachments": cluster.storage.list_volume_attachment(),
    }
    return found | {what: str(names) for what, some in objects.items() if (names := cluster.names(some))}


def left_on_cnode(cnode: Guest) -> dict[str, str]:
    """What is there of any volume on a CNODE."""
    return look(cnode, _CNODE)


def look(guest: Guest, looks: dict[str, str]) -> dict[str, str]:
    """The outputs of commands that print anything."""
    outputs = {
        f"{guest.name}: {what}": guest.run(f"{command} 2>/dev/null")[1].strip() for what, command in looks.items()
    }
    return {what: out for what, out in outputs.items() if out}
