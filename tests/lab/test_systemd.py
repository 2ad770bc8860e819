"""The units of deploy/systemd under a real systemd: limits, restarts, and volumes that are there after each."""

import time
from collections.abc import Iterator

import pytest

from . import Lab, roles
from .conftest import Say
from .guest import Guest
from .kernel import PROJECT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

#: Starts a systemd that is the first process of its own namespaces and knows our units, and next to no others.
_INIT = """
set -e
units=/run/units
mkdir -p $units /sys/fs/cgroup/machine /opt/snode/bin
cp {project}/deploy/systemd/* $units
for name in sysinit basic shutdown multi-user; do
    printf '[Unit]\\nDefaultDependencies=no\\n' > $units/$name.target
done
printf '[Unit]\\nWants=snode-tgtd.service snode-controller.service\\n' >> $units/multi-user.target
ln -sf {project}/.venv/bin/snode /opt/snode/bin/snode
for controller in pids memory; do echo +$controller > /sys/fs/cgroup/cgroup.subtree_control; done
# The process that waits stays outside: a group with processes in it can't give its controllers to those below.
exec unshare --mount --pid --fork --propagation private sh -c '
    set -e
    echo 0 > /sys/fs/cgroup/machine/cgroup.procs
    exec unshare --cgroup sh -c "
        mount -t proc proc /proc && umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup
        mkdir -p /run/systemd
        exec env container=lab SYSTEMD_UNIT_PATH=/run/units /lib/systemd/systemd --system --show-status=no \\
            --unit=multi-user.target --log-target=console"
'
"""
_CONFIG = """
[controller]
portals = ["{portal}"]
[pools.thick]
type = "lvm"
vg = "vg0"
"""
#: Makes a volume and publishes it to a node.
_PUBLISH = """
import sys
from pathlib import Path
from csi.client import Client, VolumeUse
from csi.model import NodeId
from csi.records import RecordStore
from csi.rpc.endpoint import Endpoint
from csi.sealing import NodeKey

key = NodeKey.load(RecordStore(Path("/run/key")))
node = NodeId("node", public_key=key.public, initiator="iqn.2026-11.io.test:node")
with Client(Endpoint(socket=Path("/run/snode/csi.sock"))) as client:
    for number in range(3):
        line = client.create(f"volume{number}", size_bytes=8 << 20, parameters={}, use=VolumeUse())
        client.publish(line.volume_id, node_id=str(node), use=VolumeUse())
"""


@pytest.fixture(scope="module")
def snode() -> Iterator[Guest]:
    with Lab() as lab:
        made = roles.add_snode(lab)
        lab.boot_all()
        roles.start_snode(made).signal(9)  # all of it but tgtd
        made.write("/etc/snode/snode.toml", _CONFIG.format(portal=roles.portal(made)), mode=0o600)
        made.write("/run/init.sh", _INIT.format(project=PROJECT))
        made.spawn(["sh", "/run/init.sh"], name="systemd")
        _wait_for(made, "test -S /run/snode/csi.sock")
        yield made


def _wait_for(guest: Guest, check: str, *, seconds: float = 100) -> None:
    """Wait until a line of shell succeeds; what systemd says of the units is the reason if it never does."""
    end = time.monotonic() + seconds
    while guest.run(check)[0]:
        assert time.monotonic() < end, guest.run(_inside("systemctl", "status", "snode-tgtd", "snode-controller"))[1]
        time.sleep(0.2)


def _inside(*words: str) -> str:
    """A command among the processes and mounts of systemd."""
    return f"nsenter --target=$(pgrep -xo systemd) --mount --pid --cgroup -- {' '.join(words)} 2>&1"


def _ready(guest: Guest, targets: int, timeout: float = 20) -> float:
    """Seconds until tgtd serves all its targets."""
    began = time.monotonic()
    look = "tgtadm --op show --mode sys | grep -q 'State: ready' && tgtadm --lld iscsi --op show --mode target"
    while guest.run(f"{look} | grep -c '^Target .*io.snode'")[1].strip() != str(targets):
        assert time.monotonic() - began < timeout, guest.run(_inside("systemctl", "status", "snode-tgtd"))[1]
        time.sleep(0.1)
    return time.monotonic() - began


def test_limits_and_restarts(snode: Guest, say: Say) -> None:
    snode.sh([str(PROJECT / ".venv/bin/python"), "-c", _PUBLISH])
    _ready(snode, 3)
    tgtd = "/proc/$(pgrep -xo tgtd)"
    assert snode.sh(f"cat {tgtd}/oom_score_adj") == "-1000"
    assert "1048576" in snode.sh(f"grep 'open files' {tgtd}/limits")
    group = "/sys/fs/cgroup/machine/snode.slice"
    assert snode.sh(f"cat {group}/snode-tgtd.service/pids.max") == "max"
    assert snode.sh(f"cat {group}/memory.min {group}/snode-tgtd.service/memory.min") == "134217728\n134217728"
    assert int(snode.sh(f"grep Threads {tgtd}/status | cut -f2")) < 3 * 8 + 10
    # Killed more often than systemd usually stands, tgtd comes back each time, with all its targets.
    waits = []
    for _ in range(8):
        snode.sh("pkill -9 -x tgtd")
        waits.append(_ready(snode, 3))
    say(f"tgtd killed 8 times: all targets are back after {max(waits):.1f} s at most")


def test_the_controller_comes_back_and_a_stop_is_clean(snode: Guest) -> None:
    before = snode.sh("pgrep -xo snode")
    snode.sh("kill -9 $(pgrep -xo snode)")
    _wait_for(snode, f"pgrep -xo snode | grep -qv '^{before}$'")
    _wait_for(snode, f"{PROJECT}/.venv/bin/snode volumes list | grep volume2")
    assert snode.sh(_inside("systemctl", "stop", "snode-controller", "&&", "echo", "stopped")) == "stopped"
    assert "Result=success" in snode.sh(_inside("systemctl", "show", "-p", "Result", "snode-controller"))
    assert snode.run("ls -d /run/snode")[0] == 0
    # The daemon that serves goes on without it.
    _ready(snode, 3)
