"""Disks are taken away only when all is written to them and nobody uses them."""

import grpc
import pytest

from tests.lab.channel import Command
from tests.lab.cluster import STAGING, Cluster, Machine, capability, refused
from tests.lab.guest import Guest

from . import initiator

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Code = grpc.StatusCode
_RAW = capability(block=True)
_KIB = 24 << 10


def random_file(guest: Guest, path: str) -> str:
    """Write 24 MiB into a file or device, and leave them in the page cache; returns their digest."""
    guest.sh(f"dd if=/dev/urandom of={path} bs=64k count={_KIB >> 6} conv=notrunc status=none")
    return digest(guest, path)


def digest(guest: Guest, path: str) -> str:
    return guest.sh(f"head -c {_KIB << 10} {path} | sha256sum").split()[0]


def traces(cnode: Machine) -> dict[str, str]:
    """What is there of any SCSI disk: in the kernel, in /dev, in udev's links."""
    looks = {
        "disks": "ls -d /sys/block/sd*",
        "devices": "ls -d /sys/class/scsi_device/*",
        "nodes": "ls -d /dev/sd*",
        "links": "find /dev/disk -lname '*/sd*'",
        "sessions": "ls -d /sys/class/iscsi_session/*",
    }
    found = {what: cnode.guest.run(f"{look} 2>/dev/null")[1].strip() for what, look in looks.items()}
    return {what: out for what, out in found.items() if out}


def test_what_was_never_synced_is_on_the_other_node(cluster: Cluster) -> None:
    first, second = cluster.cnodes
    volume_id = cluster.create()
    expected = random_file(first.guest, f"{cluster.attach(volume_id, first)}/file")
    cluster.leave(volume_id, first)
    first.guest.sh(["udevadm", "settle"])
    assert traces(first) == {}
    cluster.unpublish(volume_id, first)
    assert digest(second.guest, f"{cluster.attach(volume_id, second)}/file") == expected
    cluster.detach(volume_id, second)
    cluster.delete(volume_id)


@pytest.mark.soak
def test_what_a_container_left_in_the_cache_of_a_raw_disk_is_on_the_other_node(cluster: Cluster) -> None:
    first, second = cluster.cnodes
    volume_id = cluster.create()
    path = cluster.attach(volume_id, first, how=_RAW)
    # A process that outlives its container has the disk open, so the end of the mount does not write anything down.
    straggler = opener(first.guest, path)
    expected = random_file(first.guest, path)
    cluster.leave(volume_id, first)
    cluster.unpublish(volume_id, first)
    assert digest(second.guest, cluster.attach(volume_id, second, how=_RAW)) == expected
    end(straggler)
    assert traces(first) == {}
    cluster.detach(volume_id, second)
    cluster.delete(volume_id)


def opener(guest: Guest, path: str) -> Command:
    """A process in a mount namespace of its own, as containers are, that has a device open."""
    line = f"exec unshare --mount --propagation private sh -c 'exec 3<> {path}; echo ready; exec sleep 600'"
    process = guest.spawn(line, name="straggler")
    process.wait_for("ready")
    return process


def end(process: Command) -> None:
    process.signal(9)
    process.wait(10)


_USES = {
    "a bind mount elsewhere": "mkdir -p /mnt/extra && mount --bind {staged} /mnt/extra && echo ready && exec sleep 600",
    "a mount namespace of its own": "exec unshare --mount --propagation private sh -c 'echo ready; exec sleep 600'",
}


def test_a_disk_in_use_is_not_taken_away(cluster: Cluster) -> None:
    cnode, guest = cluster.cnodes[0], cluster.cnodes[0].guest
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    for use, line in _USES.items():
        cluster.stage(volume_id, cnode, context)
        staged = f"{STAGING}/{volume_id}"
        expected = random_file(guest, f"{staged}/file")
        holder = guest.spawn(line.format(staged=staged), name="holder")
        holder.wait_for("ready")
        error = refused(lambda: cluster.leave(volume_id, cnode))
        assert error is not None, use
        assert error.code() is Code.FAILED_PRECONDITION
        named = "mounted on /mnt/extra" if "bind" in use else "mounted in another mount namespace"
        for word in (volume_id, "/dev/sd", named, "end that and repeat"):
            assert word in str(error.details()), error.details()
        # What uses it goes on as if nothing had been.
        assert initiator.states(guest) == ["LOGGED_IN"]
        inside = guest.sh("pgrep -x sleep | head -1") if "namespace" in use else ""
        place = f"/proc/{inside}/root{staged}" if inside else "/mnt/extra"
        guest.sh(f"echo still here > {place}/other && sync {place}/other")
        assert digest(guest, f"{place}/file") == expected
        end(holder)
        guest.run("umount /mnt/extra 2>/dev/null")
        cluster.leave(volume_id, cnode)
        assert traces(cnode) == {}
    cluster.stage(volume_id, cnode, context)
    assert guest.read(f"{STAGING}/{volume_id}/other") == "still here\n"
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)
