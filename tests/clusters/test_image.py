"""The container image as a user runs it: a real dockerd in a guest, and nothing of the host's tree."""

import time
from collections.abc import Iterator

import pytest

from tests.lab import Disk, Lab
from tests.lab.conftest import Say, seconds
from tests.lab.docker_disk import get_docker_disk
from tests.lab.docker_host import start_dockerd
from tests.lab.guest import Guest
from tests.lab.product_image import PRODUCT, product_image

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MOST_MIB = 250
_PRIVILEGED = ("--privileged", "--volume=/dev:/dev")  # for loop devices
#: Each is run, so that each is there with its libraries.
_TOOLS = (
    "lvm version",
    "thin_check -V",
    "tgtd --version",
    "tgtadm --version",
    "iscsiadm --version",
    "mkfs.ext4 -V",
    "e2fsck -V",
    "resize2fs 2>&1 | grep -q Usage",
    "mkfs.xfs -V",
    "xfs_growfs -V",
    "mkfs.btrfs -V",
    "mount --version",
    "nsenter --version",
    "blkid -V",
    "losetup --version",
    "modprobe --version",
)


@pytest.fixture(scope="module")
def host() -> Iterator[Guest]:
    """A guest with dockerd and the image."""
    disk = get_docker_disk([product_image()])
    with Lab() as lab:
        guest = lab.guest("docker", memory="768M", disks=[Disk(base=disk)])
        lab.boot_all()
        start_dockerd(guest, "/dev/ubda")
        guest.sh("modprobe -a loop")
        yield guest


def _run(host: Guest, *words: str, timeout: float = 60) -> str:
    return host.sh(["docker", "run", "--rm", "--network=none", *words], timeout)


def test_it_is_small(host: Guest, say: Say) -> None:
    size = int(host.sh(["docker", "image", "inspect", "--format={{.Size}}", PRODUCT])) / 2**20
    say(f"the image has {size:.0f} MiB")
    assert size <= MOST_MIB


def test_every_role_and_command_is_in_it(host: Guest) -> None:
    listed = _run(host, PRODUCT, "--help")
    for command in ("controller", "node", "all", "docker", "doctor", "probe", "volumes", "certs", "demo"):
        assert f"\n  {command} " in listed
    modules = "csi.wire, csi.volumes, csi.staging, csi.docker.plugin, csi.certs, csi.rpc.kubelet, csi.kube"
    assert _run(host, "--entrypoint=python", PRODUCT, "-c", f"import {modules}; print('all')") == "all"


def test_every_tool_runs(host: Guest) -> None:
    script = "\n".join(f"{tool} >/dev/null 2>&1 || echo {tool.split()[0]}" for tool in _TOOLS)
    assert _run(host, "--entrypoint=sh", PRODUCT, "-c", script) == ""


def test_it_has_no_initiator_name_of_its_own(host: Guest) -> None:
    """Two nodes of one name would be one initiator."""
    assert "initiatorname.iscsi" not in _run(host, "--entrypoint=ls", PRODUCT, "-R", "/etc/iscsi")


def test_snode_is_process_1_and_ends_cleanly(host: Guest, say: Say) -> None:
    host.sh(["docker", "run", "-d", "--network=none", *_PRIVILEGED, "--name=driver", PRODUCT, "all"])
    began = time.monotonic()
    ready = "docker exec driver snode probe"
    code, said = host.run(f"for i in $(seq 60); do {ready} >/dev/null 2>&1 && break; sleep .2; done; {ready}", 120)
    assert (code, said) == (0, "ready\n"), host.run("docker logs driver")[1]
    say(f"ready {seconds(began)} after its start")
    assert "snode" in host.sh(["docker", "exec", "driver", "cat", "/proc/1/cmdline"])
    # What an exec leaves behind becomes process 1's, which must not collect the dead.
    host.sh("docker exec driver sh -c 'for i in 1 2 3; do sleep 0.1 & done'; sleep 1")
    states = host.sh(["docker", "exec", "driver", "sh", "-c", "cat /proc/[0-9]*/stat | cut -d' ' -f3"]).split()
    assert "Z" not in states
    began = time.monotonic()
    host.sh(["docker", "stop", "--time=30", "driver"])
    say(f"ended {seconds(began)} after SIGTERM")
    assert host.sh(["docker", "inspect", "--format={{.State.ExitCode}}", "driver"]) == "0"
    assert "stopping" in host.sh("docker logs driver 2>&1")
    assert time.monotonic() - began < 15
    host.sh(["docker", "rm", "driver"])


def test_a_driver_that_is_not_there_fails_the_probe(host: Guest) -> None:
    code, said = host.run(["docker", "run", "--rm", "--network=none", PRODUCT, "probe"])
    assert code == 1
    assert "nothing answers there; is the driver running" in said


def test_a_volume_lives_and_dies_by_the_images_own_tools(host: Guest) -> None:
    said = _run(host, *_PRIVILEGED, PRODUCT, "demo", timeout=200)
    assert "left behind: nothing" in said
    assert host.sh("losetup --list --noheadings") == ""
