"""What is left of volumes on Nomad's clients."""

from . import roles
from .errors import LabError
from .guest import Guest
from .nomad import DATA_DIR, Nomad

_SNODE = {
    "logical volumes": "lvs --noheadings -o lv_name vg0 | grep v-",
    "targets": "tgtadm --lld iscsi --op show --mode target | grep io.snode",
    "accounts": "tgtadm --lld iscsi --op show --mode account | grep -v 'Account list'",
    "publications": "ls /var/lib/snode/publications",
}
_CNODE = {
    "sessions": "ls /sys/class/iscsi_session",
    "initiator's records": "find /etc/iscsi/nodes /var/lib/iscsi/nodes -type f",
    "mounts": f"grep ' {DATA_DIR}/client/csi/node/.*/' /proc/self/mountinfo",
    "node's records": "ls /var/lib/snode/node | grep v-",
}


def leftovers(nomad: Nomad) -> dict[str, str]:
    """What is still there of any volume; {} when all is gone. Waits for the wipe of deleted volumes."""
    snode = nomad.snode.guest
    roles.until(snode, "! lvs --noheadings -o lv_name vg0 | grep -q trash", "the wipe of deleted volumes", 1200)
    found = _look(snode, _SNODE)
    for client in nomad.cnodes:
        found |= on_cnode(client.guest)
    if volumes := nomad.volumes():
        found["nomad: volumes"] = ", ".join(volumes)
    return found


def on_cnode(guest: Guest) -> dict[str, str]:
    """What a CNODE has of any volume."""
    return _look(guest, _CNODE)


def _look(guest: Guest, looks: dict[str, str]) -> dict[str, str]:
    if not guest.alive:
        raise LabError(f"{guest.name} has no power, so nobody can say what is left on it")
    found = {}
    for what, look in looks.items():
        if out := guest.run(f"{look} 2>/dev/null")[1].strip():
            found[f"{guest.name}: {what}"] = out
    return found
