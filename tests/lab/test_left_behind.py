"""The lab leaves nothing behind, whatever its owner or its guests do, and the host stays as it was."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import Disk, Lab, scratch
from .conftest import Say, seconds
from .kernel import PROJECT

pytestmark = pytest.mark.lab


VICTIM = """
import time
from tests.lab import Lab, Disk
lab = Lab()
one, two = lab.guest("one", disks=[Disk("1G")]), lab.guest("two")
lab.boot_all()
one.spawn("while :; do :; done", name="busy")
lab.popen(["setsid", "sleep", "1000"])
two.pause()
print(lab.folder, lab._scratch._keeper.pid, flush=True)
time.sleep(1000)
"""


def start_victim(base: Path) -> tuple["subprocess.Popen[bytes]", Path, int]:
    """A process that controls a lab of its own: itself, the lab's folder, its keeper."""
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = os.environ | {"SNODE_LAB_DIR": str(base), "PYTHONPATH": str(PROJECT)}
    victim = subprocess.Popen([sys.executable, "-c", VICTIM], stdout=subprocess.PIPE, cwd=PROJECT, env=environment)
    assert victim.stdout
    folder, keeper = victim.stdout.readline().split()
    victim.stdout.close()
    return victim, Path(os.fsdecode(folder)), int(keeper)


def test_all_is_gone_after_kill_9_of_the_controller(tmp_path: Path, say: Say) -> None:
    victim, folder, _ = start_victim(tmp_path / "labs")
    running = scratch.processes(folder)
    assert len(running) > 5 and folder.exists()
    began = time.monotonic()
    victim.kill()
    victim.wait()
    while (scratch.processes(folder) or folder.exists()) and time.monotonic() < began + 20:
        time.sleep(0.02)
    say(f"{len(running)} processes and the folder gone {seconds(began)} after kill -9 of their controller")
    assert not scratch.processes(folder) and not folder.exists()
    assert not [pid for pid in running if scratch.session_of(pid) is not None]


def test_next_lab_sweeps_what_dead_controller_and_keeper_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    victim, folder, keeper = start_victim(tmp_path / "labs")
    os.kill(keeper, signal.SIGKILL)
    victim.kill()
    victim.wait()
    time.sleep(1)
    left = scratch.processes(folder)
    assert left, "the paused guest cannot switch itself off"
    assert folder.exists()
    monkeypatch.setenv("SNODE_LAB_DIR", str(tmp_path / "labs"))
    began = time.monotonic()
    with Lab() as lab:
        say(f"swept {len(left)} processes of a dead lab in {seconds(began)}")
        assert not scratch.processes(folder) and not folder.exists()
        assert lab.folder.exists()
    assert not list((tmp_path / "labs").glob("lab-*"))


def test_sweep_leaves_a_living_lab_alone(lab: Lab) -> None:
    guest = lab.guest("one")
    guest.boot()
    assert lab.folder not in scratch.sweep_all(lab.folder.parent)
    assert guest.sh("echo alive") == "alive"


WATCHED = ("/etc", "/usr/sbin", "/usr/bin", "/usr/lib/modules", "/usr/lib/udev", "/var/lib/iscsi", "/var/lib/lvm",
           "/var/lib/tgt", "/var/lib/snode", "/boot", "/mnt", "/srv", "/opt")  # fmt: skip


VANDALISM = (
    "modprobe dm-mod; pvcreate -q /dev/ubda; vgcreate -q vg0 /dev/ubda; lvcreate -qy -L 100M -n v vg0; tgtd",
    "rm -rf /etc/iscsi /etc/lvm /etc/apt /boot/* /opt/* /srv/*; mkdir /new /opt/new; cp /bin/true /usr/sbin/new",
    "touch /usr/bin/*; chmod 0 /etc/passwd; mount -t tmpfs none /mnt; ip link add br9 type bridge || :",
)


def host_state() -> dict[str, str]:
    """Names, sizes, times and modes of files that guests use or attack; mounts, interfaces and entries of "/"."""
    state = {}
    for top in WATCHED:
        digest = hashlib.sha256()
        for folder, names, files in sorted(os.walk(top)):
            for name in sorted(names + files):
                found = Path(folder, name).lstat()
                facts = (folder, name, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid)
                digest.update(f"{facts}\n".encode())
        state[top] = digest.hexdigest()
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if not of_another_test(line)]
    state["mounts"] = "\n".join(mounts)
    state["interfaces"] = str(sorted(Path("/sys/class/net").iterdir()))
    state["namespace"] = str(Path("/proc/self/ns/net").readlink())
    state["root"] = str(sorted(Path("/").iterdir()))
    return state


def of_another_test(mount: str) -> bool:
    """Whether a line of mountinfo is of a place where other tests, that may run now, mount things."""
    return mount.split()[4].startswith(("/tmp/", "/run/", "/var/tmp/")) and "snode-lab" not in mount


def changes(before: dict[str, str]) -> list[str]:
    """What is no longer as it was."""
    now = host_state()
    return [f"{what}: {text} was {before[what]}" for what, text in now.items() if text != before[what]]


def test_host_stays_clean(say: Say) -> None:
    before = host_state()
    with Lab() as lab:
        folder = lab.folder
        guest = lab.guest("vandal", memory="512M", disks=[Disk("1G")])
        guest.boot()
        for line in VANDALISM:
            guest.sh(line)
        assert not changes(before)
    assert not changes(before)
    assert not folder.exists() and not scratch.processes(folder)
    say(f"host unchanged in {', '.join(WATCHED)}, mounts and interfaces")
