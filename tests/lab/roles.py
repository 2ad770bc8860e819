"""Makes guests into an SNODE (LVM, tgtd) and CNODEs (iscsid), and starts the driver in them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .channel import Command
from .disk import Disk
from .errors import LabError
from .guest import Guest
from .kernel import PROJECT
from .lab import Lab

PORT = 3260
# The folders that a real machine keeps over a reboot and that the guests' overlay would forget.
KEPT = ("/var/lib/snode", "/var/lib/iscsi", "/etc/iscsi", "/etc/lvm", "/var/lib/kubelet")
DM_MODULES = "dm-mod dm-thin-pool dm-snapshot dm-raid raid1 raid456 loop"
# loop: the driver on a node looks for it, whatever its volumes are.
_ISCSI_MODULES = "iscsi_tcp sd_mod crc32c loop"


@dataclass(frozen=True)
class Driver:
    """A driver that runs in a guest: its process and the unix socket it serves."""

    guest: Guest
    process: Command
    socket: str

    def stop(self, timeout: float = 30) -> int:
        """Ends it in the orderly way (SIGTERM); returns its exit code."""
        self.process.signal(15)
        return self.process.wait(timeout)

    def kill9(self) -> None:
        """Ends it and its children at once."""
        self.process.signal(9)
        self.process.wait(10)


def initiator(guest: Guest) -> str:
    """The initiator name that `start_cnode` gives a guest."""
    return f"iqn.2026-11.io.test:{guest.name}"


def portal(snode: Guest) -> str:
    """Address and port where `start_tgtd` makes an SNODE listen."""
    return f"{snode.ip}:{PORT}"


def add_snode(lab: Lab, name: str = "snode", *, pool: str = "4G", legs: int = 0) -> Guest:
    """A guest for `start_snode`: a disk for what it keeps, one for its pool, and `legs` more for RAID."""
    disks = [Disk("512M"), Disk(pool), *(Disk("1G") for _ in range(legs))]
    return lab.guest(name, memory="512M", disks=disks)


def add_cnode(lab: Lab, name: str = "cnode1", *, memory: str = "384M") -> Guest:
    """A guest for `start_cnode`: one disk, for what it keeps and for mounts."""
    return lab.guest(name, memory=memory, disks=[Disk("1G")])


def keep(guest: Guest, device: str, folders: Sequence[str] = KEPT) -> None:
    """Puts folders on a disk, so that they outlive a power cut and lie on a real filesystem.

    Mount targets need that: on the guest's overlay a file's st_dev is not that of its folder, so that a check by
    st_dev takes every plain file for a mount. What the host has in a folder is copied at the first boot.
    """
    lines = [
        "set -e; mkdir -p /var/keep",
        f"blkid {device} >/dev/null || mkfs.ext4 -qF -E lazy_itable_init=1,nodiscard {device}",
        f"mount {device} /var/keep",
    ]
    for folder in folders:
        kept = f"/var/keep/{folder.strip('/').replace('/', '-')}"
        # Renamed last: a power cut in the middle of the first boot must not leave half a copy.
        lines += [
            f"mkdir -p {folder}",
            f"[ -d {kept} ] || {{ rm -rf {kept}.new; cp -a {folder} {kept}.new; sync; mv {kept}.new {kept}; }}",
            f"mount --bind {kept} {folder}",
        ]
    guest.sh("\n".join(lines))


def start_snode(snode: Guest) -> Command:
    """Boot work of an SNODE made by `add_snode`: kept folders, modules, group `vg0` on the pool disk; starts tgtd.

    RAID legs, if any, become volume group `vg1`. A second boot finds the volume groups and activates them.
    """
    prepare_snode(snode)
    ensure_vg(snode, "vg0", [snode.disks[1].device])
    if legs := [disk.device for disk in snode.disks[2:]]:
        ensure_vg(snode, "vg1", legs)
    return start_tgtd(snode)


def prepare_snode(snode: Guest) -> None:
    """The part of an SNODE's boot work that every one has: kept folders on its first disk, and modules."""
    keep(snode, snode.disks[0].device)
    snode.sh(f"modprobe -a {DM_MODULES} && udevadm trigger --subsystem-match=block --settle")


def ensure_vg(snode: Guest, name: str, devices: Sequence[str]) -> None:
    """Makes a volume group, or activates the one that is there. LVM finds it with room for many volumes' metadata."""
    if snode.run(["vgs", name])[0] == 0:
        snode.sh(["vgchange", "-q", "-ay", name])
        return
    snode.sh(["pvcreate", "-q", "--metadatasize", "64m", *devices])
    snode.sh(["vgcreate", "-q", name, *devices])


def ensure_thin_pool(snode: Guest, name: str = "thin", *, vg: str = "vg0", size: str = "2G") -> None:
    """A thin pool in a volume group; a second boot finds it."""
    if snode.run(["lvs", f"{vg}/{name}"])[0]:
        snode.sh(f"lvcreate -q -y --type thin-pool -L {size} --poolmetadatasize 64m -n {name} {vg}")


def start_tgtd(snode: Guest) -> Command:
    """Starts tgtd with one portal; returns once it answers."""
    tgtd = snode.spawn(["tgtd", "-f", "--iscsi", f"portal={portal(snode)}"], name="tgtd")
    until(snode, "tgtadm --op show --mode sys >/dev/null 2>&1", "tgtd")
    return tgtd


def start_cnode(cnode: Guest) -> Command:
    """Boot work of a CNODE made by `add_cnode`: kept folders, modules, a name of its own; starts iscsid."""
    keep(cnode, cnode.disks[0].device, KEPT)
    cnode.write("/etc/iscsi/initiatorname.iscsi", f"InitiatorName={initiator(cnode)}\n", mode=0o600)
    cnode.sh(f"modprobe -a {_ISCSI_MODULES}")
    return start_iscsid(cnode)


def start_iscsid(cnode: Guest) -> Command:
    """Starts iscsid; returns once it answers."""
    iscsid = cnode.spawn(["iscsid", "-f"], name="iscsid")
    # 21: it answered, and there are no sessions.
    until(cnode, "iscsiadm -m session >/dev/null 2>&1; [ $? = 0 -o $? = 21 ]", "iscsid")
    return iscsid


def start_driver(
    guest: Guest, role: str, config: str, *, socket: str = "/run/snode/csi.sock", environment: Sequence[str] = (),
    timeout: float = 30,
) -> Driver:  # fmt: skip
    """Starts the project's driver (`controller`, `node` or `all`) with a configuration file; returns once it listens.

    It is the working tree itself that runs: a guest sees the project's folder, changes and all.
    `environment` holds NAME=value.
    """
    path = "/etc/snode/snode.toml"
    guest.write(path, config, mode=0o600)
    python = PROJECT / ".venv/bin/python"
    guest.sh(["rm", "-f", socket])
    driver = guest.spawn(
        ["env", "-C", str(PROJECT), *environment, str(python), "-m", "csi", role, "--config", path],
        name=f"driver-{role}",
    )
    deadline = time.monotonic() + timeout
    while guest.run(["test", "-S", socket])[0]:
        if driver.rc is not None or time.monotonic() > deadline:
            driver.signal(9)
            raise LabError(f"{guest.name}: the driver does not listen on {socket} (code {driver.rc}):\n{driver.out}")
        time.sleep(0.05)
    return Driver(guest, driver, socket)


def serve_tcp(guest: Guest, socket: str, port: int) -> Command:
    """Offers a unix socket of a guest on a port of its address, for clients on the host or in other guests."""
    text = Path(__file__).with_name("relay.py").read_text()
    guest.write("/run/relay.py", text)
    process = guest.spawn(
        ["/usr/bin/python3", "-ISs", "/run/relay.py", f"tcp:{guest.ip}:{port}", f"unix:{socket}"], name=f"relay-{port}"
    )
    process.wait_for("ready")
    return process


def until(guest: Guest, check: str, what: str, tries: int = 100) -> None:
    """Returns once a shell line succeeds in the guest, tried every 50 ms; LabError if it never does."""
    rc, _ = guest.run(f"for i in $(seq {tries}); do {check} && exit 0; sleep .05; done; exit 1")
    if rc:
        raise LabError(f"{guest.name}: {what} did not come up; see {guest.lab.logs}")
