"""The host's tools and mounts from a container: here a process with mounts of its own in a guest."""

import shlex
from collections.abc import Iterator

import pytest

from . import Disk, Lab
from .guest import Guest
from .kernel import PROJECT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

#: Runs where / is a tree of its own that gets the host's mounts and gives none back.
_CONTAINER = """
import sys
from pathlib import Path
from csi.deadline import Deadline
from csi.fs.mounts import Mounts
from csi.run import HOST_ROOT, SubprocessRunner

device, target, again, word = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
mounts, deadline = Mounts(SubprocessRunner(host_tools=True), root=HOST_ROOT), Deadline.after(60)
if word == "mount":
    mounts.ensure_directory(target)
    mounts.ensure_directory(again)
    for _ in range(2):
        mounts.mount(device, target, fs_type="ext4", flags=(), readonly=False, deadline=deadline)
        mounts.bind(target, again, readonly=True, deadline=deadline)
else:
    for path in (again, target):
        mounts.unmount_all(path, deadline)
        mounts.remove_target(path)
"""


#: Makes a root of its own, as containers have one: a tmpfs with the folders of the host in it, but for /run and /mnt.
_BOX = """
set -e
folder=$PWD; box=/run/box
mkdir -p $box && mount -t tmpfs none $box
for path in /*; do
    if [ -L $path ]; then cp -a $path $box$path
    elif [ -d $path ] && [ $path != /run ] && [ $path != /mnt ]; then mkdir $box$path && mount --rbind $path $box$path
    fi
done
mkdir $box/old $box/run && touch $box/run/container
cd $box && pivot_root . old && umount -l old
cd "$folder" && exec "$@"
"""

#: What a helper process sees that is not started anew for each piece of work.
_LOOK = """
import os
print(os.getpid(), os.readlink("/proc/self/ns/mnt"), os.path.exists("/run/container"), os.stat("/").st_dev, os.getcwd())
"""

_STAYS = """
import sys
from pathlib import Path
from csi import log; log.set_up(level="error")
from csi.deadline import Deadline
from csi.errors import InUse
from csi.fs.mounts import Mounts
from csi.run import HOST_ROOT, SubprocessRunner

runner, deadline = SubprocessRunner(host_tools=True), Deadline.after(60)
mounts, target = Mounts(runner, root=HOST_ROOT), Path(sys.argv[2])
Path("/run/look.py").write_text(sys.argv[3])

def look():
    print(runner.run([sys.executable, "-I", "-S", "/run/look.py"], deadline=deadline, read_only=True).stdout.strip())

look()
mounts.ensure_directory(target)
mounts.mount(Path(sys.argv[1]), target, fs_type="ext4", flags=(), readonly=False, deadline=deadline)
with open(HOST_ROOT / target.relative_to("/") / "busy", "w"):
    try:
        mounts.unmount_all(target, deadline)
    except InUse:
        look()
mounts.unmount_all(target, deadline)
mounts.remove_target(target)
look()
"""

TARGET, AGAIN = "/mnt/staging/one", "/mnt/target/one"


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Lab() as lab:
        made = lab.guest("host", memory="256M", disks=[Disk("64M")])
        lab.boot_all()
        made.sh("mkfs.ext4 -qF /dev/ubda && mount -t tmpfs none /mnt && mount --make-rshared /")
        made.write("/run/box.sh", _BOX)
        yield made


def _python(guest: Guest, code: str, *argv: str, wrapper: str) -> str:
    words = ["env", "-C", str(PROJECT), *shlex.split(wrapper), str(PROJECT / ".venv/bin/python"), "-c", code, *argv]
    return guest.sh(words)


_UNSHARED = "unshare --mount --propagation slave"
_BOXED = f"{_UNSHARED} sh /run/box.sh"


def _in_container(guest: Guest, code: str, *argv: str) -> str:
    return _python(guest, code, *argv, wrapper=_UNSHARED)


@pytest.mark.parametrize("wrapper", [_UNSHARED, _BOXED], ids=["mounts", "root"])
def test_mounts_of_a_container_are_the_hosts(guest: Guest, wrapper: str) -> None:
    _python(guest, _CONTAINER, "/dev/ubda", TARGET, AGAIN, "mount", wrapper=wrapper)
    table = guest.sh("cat /proc/1/mountinfo").splitlines()
    (staged,) = [line for line in table if f" {TARGET} " in line]
    (shown,) = [line for line in table if f" {AGAIN} " in line]
    assert " ext4 /dev/ubda rw" in staged
    assert f" {AGAIN} ro," in shown
    _python(guest, _CONTAINER, "/dev/ubda", TARGET, AGAIN, "unmount", wrapper=wrapper)
    assert "one" not in guest.sh("cat /proc/1/mountinfo; ls /mnt/staging /mnt/target").split()


def test_a_helper_that_stays_returns_to_its_container(guest: Guest) -> None:
    """An unmount is done among the host's mounts, by a process that does other work afterwards."""
    first, busy, last = _python(guest, _STAYS, "/dev/ubda", TARGET, _LOOK, wrapper=_BOXED).splitlines()
    assert first == busy == last
    _pid, namespace, in_container, _device, folder = first.split()
    assert namespace != guest.sh("readlink /proc/1/ns/mnt")
    assert (in_container, folder) == ("True", "/")
    assert TARGET not in guest.sh("cat /proc/1/mountinfo")


def test_tools_run_among_the_hosts_mounts(guest: Guest) -> None:
    code = (
        "from csi import log; log.set_up(level='error')\n"
        "from csi.run import SubprocessRunner; from csi.deadline import Deadline\n"
        "runner = SubprocessRunner(host_tools=True)\n"
        "print(runner.run(['readlink', '/proc/self/ns/mnt'], deadline=Deadline.after(10)).stdout.strip())\n"
        "print(runner.has('mount'), runner.has('no-such-tool'))\n"
        "try: runner.run(['no-such-tool'], deadline=Deadline.after(10))\n"
        "except Exception as error: print(error)\n"
    )
    namespace, has, error = _in_container(guest, code).splitlines()
    assert namespace == guest.sh("readlink /proc/1/ns/mnt")
    assert has == "True False"
    assert error.startswith("no-such-tool: program not found on the host; install the package")


def test_a_container_without_the_hosts_processes_is_told(guest: Guest) -> None:
    code = "from csi.run import host_problem; print(host_problem())"
    assert _in_container(guest, code) == ""
    assert "-> hostPID: true" in _python(guest, code, wrapper="unshare --pid --fork --mount-proc")
