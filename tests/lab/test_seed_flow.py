"""The way of a volume by hand, without the driver: what the driver's own runs are compared with."""

import shlex
import time
from collections.abc import Callable

import pytest

from . import CommandFailed, Guest, Lab, roles
from .conftest import Say, seconds

pytestmark = pytest.mark.lab

IQN = "iqn.2026-11.io.test:vol1"
TGTADM = "tgtadm --lld iscsi --tid 1"


WRITE = "mount {} /mnt && seq 100000 > /mnt/data && sync -f /mnt"
# A number is printed only once it is on the disk.
WRITER = "for i in $(seq 1000000); do echo $i >> /mnt/log && sync /mnt/log && echo $i || exit 1; sleep .02; done"


class Hand:
    """An SNODE, two CNODEs, and the commands that an administrator would type."""

    def __init__(self, lab: Lab) -> None:
        self.snode = roles.add_snode(lab, pool="2G")
        self.one, self.two = roles.add_cnode(lab, "cnode1"), roles.add_cnode(lab, "cnode2")
        self.portal = roles.portal(self.snode)
        self.device = f"/dev/disk/by-path/ip-{self.portal}-iscsi-{IQN}-lun-1"

    def create(self) -> None:
        self.snode.sh("lvcreate -q -y -L 500M -n vol1 vg0")

    def export(self, cnode: Guest) -> None:
        self.snode.sh(
            f"{TGTADM} --op new --mode target -T {IQN} && "
            f"{TGTADM} --op new --mode logicalunit --lun 1 -b /dev/vg0/vol1 && {self._bind(cnode)}"
        )

    def login(self, cnode: Guest) -> None:
        cnode.sh(
            f"iscsiadm -m discovery -t st -p {self.portal} && iscsiadm -m node -T {IQN} -p {self.portal} --login && "
            f"udevadm settle && for i in $(seq 100); do [ -b {self.device} ] && exit 0; sleep .05; done; exit 1"
        )

    def fence(self, cnode: Guest) -> None:
        connections = f"{TGTADM} --op show --mode conn"
        self.snode.sh(
            f"{self._bind(cnode, 'unbind')}; {connections} | awk '/^Session/{{s=$2}} /Connection:/{{print s,$2}}' | "
            f"while read sid cid; do {TGTADM} --op delete --mode conn --sid $sid --cid $cid; done; "
            f"! {connections} | grep -q Session"
        )

    def grant(self, cnode: Guest) -> None:
        self.snode.sh(self._bind(cnode))

    def logout(self, cnode: Guest) -> None:
        cnode.sh(f"umount /mnt && iscsiadm -m node -T {IQN} -p {self.portal} --logout")

    def delete(self) -> None:
        self.snode.sh(f"{TGTADM} --op delete --mode target && lvremove -qy vg0/vol1")

    @staticmethod
    def _bind(cnode: Guest, op: str = "bind") -> str:
        return f"{TGTADM} --op {op} --mode target --initiator-name {shlex.quote(roles.initiator(cnode))}"


class Clock:
    """Prints the time that each step took."""

    def __init__(self, say: Say) -> None:
        self._say, self._began = say, time.monotonic()

    def step(self, what: str, act: Callable[[], object]) -> None:
        began = time.monotonic()
        act()
        self._say(f"{seconds(began):>8}  {what}")

    def total(self) -> None:
        self._say(f"{seconds(self._began):>8}  in all")


@pytest.fixture
def hand(lab: Lab) -> Hand:
    return Hand(lab)


def boot_again(cnode: Guest) -> None:
    cnode.boot()
    roles.start_cnode(cnode)


def start_roles(lab: Lab, hand: Hand) -> None:
    def start(guest: Guest) -> None:
        if guest is hand.snode:
            roles.start_snode(guest)
        else:
            roles.start_cnode(guest)

    lab.each(lab.guests, start)


@pytest.mark.soak
def test_volume_outlives_its_cnode(lab: Lab, hand: Hand, say: Say) -> None:
    one, two, clock = hand.one, hand.two, Clock(say)
    clock.step("boot 3 guests", lab.boot_all)
    clock.step("LVM, tgtd; iscsid twice", lambda: start_roles(lab, hand))
    clock.step("lvcreate", hand.create)
    clock.step("export to CNODE1 only", lambda: hand.export(one))
    with pytest.raises(CommandFailed):
        hand.login(two)
    clock.step("login on CNODE1", lambda: hand.login(one))
    clock.step("mkfs.ext4", lambda: one.sh(f"mkfs.ext4 -q {hand.device}"))
    clock.step("mount, write, fsync", lambda: one.sh(WRITE.format(hand.device)))
    # iscsiadm does not sync: without this its record of the target is an empty file after the power cut.
    one.sh("sync -f /var/lib/iscsi")
    want = one.sh("sha256sum < /mnt/data")
    clock.step("CNODE1 loses its power", one.kill9)
    clock.step("fence CNODE1", lambda: hand.fence(one))
    clock.step("grant CNODE2", lambda: hand.grant(two))
    clock.step("login on CNODE2", lambda: hand.login(two))
    clock.step("mount (journal replay)", lambda: two.sh(f"mount {hand.device} /mnt"))
    assert two.sh("sha256sum < /mnt/data") == want
    clock.step("umount, logout", lambda: hand.logout(two))
    clock.step("target and LV gone", hand.delete)
    clock.step("CNODE1 boots again", lambda: boot_again(one))
    # What a real machine keeps: the record of the target it was logged in to.
    assert IQN in one.sh("iscsiadm -m node")
    clock.total()


@pytest.mark.soak
def test_writer_outlives_cut_reset_and_restart(lab: Lab, hand: Hand, say: Say) -> None:
    """A mounted volume stalls while the network or the SNODE is away, and goes on without an error."""
    one, clock = hand.one, Clock(say)
    lab.boot_all()
    start_roles(lab, hand)
    hand.create()
    hand.export(one)
    hand.login(one)
    one.sh(f"mkfs.ext4 -q {hand.device} && mount {hand.device} /mnt")
    writer = one.spawn(WRITER, name="writer")

    def goes_on() -> None:
        assert writer.rc is None, writer.out
        last = writer.lines[-1] if writer.lines else "0"
        writer.wait_for(f"{int(last) + 3}\n", 60)

    clock.step("writes", goes_on)
    one.cut()
    time.sleep(1)
    acked = writer.lines
    time.sleep(2)
    assert writer.lines == acked
    one.heal()
    clock.step("goes on after its network was cut for 3 s", goes_on)
    assert one.reset(roles.PORT) == 1
    clock.step("goes on after a TCP reset", goes_on)
    assert "detected conn error" in one.sh("dmesg")
    hand.snode.pause()
    time.sleep(2)
    hand.snode.resume()
    clock.step("goes on after the SNODE hung for 2 s", goes_on)
    one.kill9()
    last = int(writer.lines[-1])
    hand.fence(one)
    hand.grant(hand.two)
    hand.login(hand.two)
    hand.two.sh(f"mount {hand.device} /mnt")
    assert int(hand.two.sh("tail -n1 /mnt/log")) >= last
