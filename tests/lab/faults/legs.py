"""Disks of the SNODE that obey a test: `leg0` … `leg2` of device-mapper, each on a part of a real disk.

They are made anew over what `roles` made of these disks, so the SNODE of such a cluster must not be booted again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab.guest import Guest

_SECTORS = 192 << 11
_START = 64 << 11
#: Further on the first disk, for a group of its own.
_SMALL_SECTORS = 192 << 11
_SMALL_START = _START + _SECTORS

SMALL_GROUP = "vg2"


def make(snode: Guest) -> None:
    """Volume group vg1 on leg0 to leg2, and `SMALL_GROUP` with a metadata area of 1 MiB, as LVM makes it by itself."""
    disks = [disk.device for disk in snode.disks[2:]]
    snode.sh(f"modprobe dm-delay; vgremove -qy vg1 && pvremove -qy {' '.join(disks)}")
    for number in range(len(disks)):
        snode.sh(f"dmsetup create leg{number} --table '{_linear(snode, number)}'")
    snode.sh(f"dmsetup create small --table '0 {_SMALL_SECTORS} linear {disks[0]} {_SMALL_START}'")
    legs = " ".join(f"/dev/mapper/leg{number}" for number in range(len(disks)))
    snode.sh(f"udevadm settle; pvcreate -qy --metadatasize 16m {legs} && vgcreate -q vg1 {legs}")
    snode.sh(f"pvcreate -qy /dev/mapper/small && vgcreate -q {SMALL_GROUP} /dev/mapper/small")


def leg_of(snode: Guest, volume: str) -> int:
    """The leg on which a linear volume, or a part of a RAID volume, lies alone."""
    devices = snode.sh(f"lvs -a --noheadings -o devices {volume}")
    return int(devices.partition("/dev/mapper/leg")[2].partition("(")[0])


def fail(snode: Guest, number: int) -> None:
    """Every access is an I/O error from now on."""
    _load(snode, number, f"0 {_SECTORS} error")


def heal(snode: Guest, number: int) -> None:
    """As it was, with what is on the disk."""
    _load(snode, number, _linear(snode, number))


def replace(snode: Guest, number: int) -> None:
    """An empty disk in its place, added to vg1."""
    snode.sh(
        f"dd if=/dev/zero of={snode.disks[2 + number].device} bs=1M seek={_START >> 11} count=32 conv=fsync status=none"
    )
    heal(snode, number)
    snode.sh(f"pvcreate -qy --metadatasize 16m /dev/mapper/leg{number} && vgextend -q vg1 /dev/mapper/leg{number}")


@contextmanager
def slow_writes(snode: Guest, number: int, milliseconds: int) -> Iterator[None]:
    """Every write takes so long meanwhile."""
    disk = snode.disks[2 + number].device
    _load(snode, number, f"0 {_SECTORS} delay {disk} {_START} 0 {disk} {_START} {milliseconds}")
    try:
        yield
    finally:
        heal(snode, number)


def _linear(snode: Guest, number: int) -> str:
    return f"0 {_SECTORS} linear {snode.disks[2 + number].device} {_START}"


def _load(snode: Guest, number: int, table: str) -> None:
    leg = f"leg{number}"
    snode.sh(f"dmsetup suspend --noflush {leg} && dmsetup load {leg} --table '{table}'; dmsetup resume {leg}")
