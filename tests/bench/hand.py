"""The way of a volume by hand: the commands of an administrator, each step timed by the guest that it runs in.

The hand is fair: the same lvcreate (to the letter), CHAP in both directions, the store and flags that the driver gives
to tgtd, a static node record instead of a discovery, the driver's options of mkfs, and zeros over a deleted volume
before its extents are free. It does less: it keeps no record, gives the disk no identity, and checks nothing.
"""

import secrets
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi.backends import lvm_tags
from csi.backends.lvm_cli import Lvm
from csi.backends.lvm_report import Report
from csi.backends.lvm_thick import Thick
from csi.deadline import Deadline
from csi.run import Result
from tests.lab import Guest, roles

#: The store that the driver uses: tgtd writes past its page cache, and to the disk when the initiator flushes.
STORE = "--bstype rdwr --bsoflags direct"
_EXTENT_BYTES = 4 << 20
_SCRIPT = r"""
export LC_ALL=C
step() {  # NAME COMMAND...: run a command, print how many microseconds it took
    local name=$1 from to; shift
    from=$EPOCHREALTIME
    "$@" > /tmp/hand.out 2>&1 || { echo "$name: $*: $(cat /tmp/hand.out)"; exit 1; }
    to=$EPOCHREALTIME
    echo "$name $(( ${to/./} - ${from/./} ))"
}
both() { local command; for command; do eval "$command" || return; done; }  # several commands as one step
disk() { local i; for i in {1..1000}; do [ -b "$1" ] && return; sleep 0.01; done; return 1; }  # until udev named it
closed() {  # TID: close every connection of a target, until there is none
    while tgtadm --lld iscsi --op show --mode conn --tid "$1" | awk '/^Session/{s=$2} /Connection:/{print s,$2}' |
        { any=; while read -r sid cid; do any=1; tgtadm --lld iscsi --op delete --mode conn --tid "$1" \
            --sid "$sid" --cid "$cid"; done; [ "$any" ]; }
    do :; done
}
"""
_MKFS = "mkfs.ext4 -q -b 4096 -m 0 -E nodiscard,lazy_itable_init=1,lazy_journal_init=0"


@dataclass
class Export:
    """A volume and its target, as the hand names them."""

    name: str
    tid: int
    size_bytes: int
    flags: str = STORE
    chap: Sequence[str] = field(default_factory=lambda: [secrets.token_hex(8) for _ in range(4)])

    @property
    def target(self) -> str:
        """Its iSCSI name."""
        return f"iqn.2026-11.io.test:{self.name}"


class Hand:
    """An SNODE and a CNODE, and the steps between them; each returns the seconds of its parts by name."""

    def __init__(self, snode: Guest) -> None:
        self.snode = snode
        self.portal = roles.portal(snode)

    # -- on the SNODE --------------------------------------------------------------------------------------------

    def create(self, export: Export) -> dict[str, float]:
        """lvcreate."""
        return timed(self.snode, [("create", shlex.join(lvcreate(self.snode, export.name, export.size_bytes)))])

    def publish(self, export: Export, cnode: Guest) -> dict[str, float]:
        """A target with accounts, a LUN and a rule."""
        tid, (user, secret, mutual, mutual_secret) = export.tid, export.chap
        commands = [
            f"--op new --mode target --tid {tid} --targetname {export.target}",
            f"--op new --mode account --user {user} --password {secret}",
            f"--op new --mode account --user {mutual} --password {mutual_secret}",
            f"--op bind --mode account --tid {tid} --user {user}",
            f"--op bind --mode account --tid {tid} --user {mutual} --outgoing",
            f"--op new --mode logicalunit --tid {tid} --lun 1 --backing-store /dev/vg0/{export.name} {export.flags}",
            f"--op bind --mode target --tid {tid} --initiator-name {roles.initiator(cnode)}",
        ]
        return timed(self.snode, [("publish", both(f"tgtadm --lld iscsi {command}" for command in commands))])

    def fence(self, export: Export, cnode: Guest) -> dict[str, float]:
        """No rule and no connection any more."""
        unbind = f"--op unbind --mode target --tid {export.tid} --initiator-name {roles.initiator(cnode)}"
        return timed(self.snode, [("fence", both([f"tgtadm --lld iscsi {unbind}", f"closed {export.tid}"]))])

    def unpublish(self, export: Export) -> dict[str, float]:
        """No target and no accounts."""
        commands = [f"--op delete --mode target --force --tid {export.tid}"]
        commands += [f"--op delete --mode account --user {user}" for user in export.chap[::2]]
        return timed(self.snode, [("unpublish", both(f"tgtadm --lld iscsi {command}" for command in commands))])

    def delete(self, export: Export) -> dict[str, float]:
        """Zero the volume and remove it."""
        steps = [
            ("zero", f"blkdiscard --zeroout /dev/vg0/{export.name}"),
            ("lvremove", f"lvremove -qq -y vg0/{export.name}"),
        ]
        return timed(self.snode, steps)

    # -- on the CNODE --------------------------------------------------------------------------------------------

    def attach(self, export: Export, cnode: Guest, *, mkfs: bool = True) -> dict[str, float]:
        """Record, login, mkfs if it is new, mount, bind."""
        node = f"iscsiadm -m node -T {export.target} -p {self.portal}"
        auth = dict(zip(("username", "password", "username_in", "password_in"), export.chap, strict=True))
        settings = {"authmethod": "CHAP", **auth}
        update = " ".join(f"-n node.session.auth.{name} -v {value}" for name, value in settings.items())
        device = self.device(export)
        steps = [
            ("record", both([f"{node} -o new", f"{node} -o update {update}"])),
            ("login", f"{node} --login"),
            ("disk", f"disk {device}"),
            *([("mkfs", f"{_MKFS} {device}")] if mkfs else []),
            ("mount", both([f"mkdir -p {self._staging(export)}", f"mount {device} {self._staging(export)}"])),
            (
                "bind",
                both([f"mkdir -p {self.path(export)}", f"mount --bind {self._staging(export)} {self.path(export)}"]),
            ),
        ]
        return timed(cnode, steps)

    def leave(self, export: Export, cnode: Guest) -> dict[str, float]:
        """Unmount twice, log out, drop the record."""
        node = f"iscsiadm -m node -T {export.target} -p {self.portal}"
        steps = [
            ("unbind", both([f"umount {self.path(export)}", f"rmdir {self.path(export)}"])),
            ("umount", f"umount {self._staging(export)}"),
            ("logout", both([f"{node} --logout", f"{node} -o delete"])),
        ]
        return timed(cnode, steps)

    def device(self, export: Export) -> str:
        """Where udev shows the disk."""
        return f"/dev/disk/by-path/ip-{self.portal}-iscsi-{export.target}-lun-1"

    @staticmethod
    def path(export: Export) -> str:
        """Where the container would see the volume."""
        return f"/var/lib/kubelet/hand/{export.name}"

    @staticmethod
    def _staging(export: Export) -> str:
        return f"/var/lib/kubelet/hand/staging-{export.name}"


def both(commands: Iterable[str]) -> str:
    """Several commands as one step."""
    return shlex.join(["both", *commands])


def timed(guest: Guest, steps: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Run steps in one shell of a guest; returns the seconds of each by name. CommandFailed when one fails."""
    script = _SCRIPT + "\n".join(f"step {name} {command}" for name, command in steps)
    lines = [line.split(" ") for line in guest.sh(["bash", "-c", script], 120).splitlines()]
    return {name: int(microseconds) / 1e6 for name, microseconds in lines}


def lvcreate(snode: Guest, name: str, size_bytes: int) -> list[str]:
    """The very command that the driver would run for a volume, but for its name."""
    recorder = _Recorder()
    lvm = Lvm("vg0", runner=recorder, state=None, devices=[Path(snode.disks[1].device)], udev=Path("/"))
    report = Report("vg0", "", extent_bytes=_EXTENT_BYTES, mda_size_bytes=0, mda_free_bytes=0, missing_pvs=0)
    tags = lvm_tags.encode(pool="thick", name=name, parameters={}, nonce=secrets.token_hex(8))
    lvm.create(name, tags=tags, shape=Thick().shape(report, size_bytes), deadline=Deadline.after(1))
    return recorder.argv


class _Recorder:
    """A Runner that runs nothing."""

    argv: list[str]

    def run(self, argv: Sequence[str], **_: object) -> Result:
        self.argv = list(argv)
        return Result(tuple(argv), 0, "", "")

    def has(self, program: str) -> bool:
        return True
