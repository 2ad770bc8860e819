"""Makes a guest into a Docker host: a real dockerd with a disk of its own, and an image with sqlite3 in it."""

from dataclasses import dataclass
from pathlib import Path

from csi import certs

from . import roles
from .channel import Command
from .disk import Disk
from .guest import Guest
from .images import make_image
from .lab import Lab

IMAGE = "lab/sqlite:1"
_SQLITE = "/usr/bin/sqlite3"


def start_dockerd(guest: Guest, device: str) -> Command:
    """Start dockerd with its data on `device`, which is formatted at first; returns once it answers and has IMAGE."""
    guest.sh(
        f"blkid {device} >/dev/null || mkfs.ext4 -qF -E lazy_itable_init=1,nodiscard {device}\n"
        f"mkdir -p /var/lib/docker && mountpoint -q /var/lib/docker || mount {device} /var/lib/docker\n"
        "modprobe -a veth bridge overlay; rm -f /var/run/docker.pid"
    )
    dockerd = guest.spawn(["dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none"], name="dockerd")
    roles.until(guest, "docker version >/dev/null 2>&1", "dockerd", 600)
    if guest.run(["docker", "image", "inspect", IMAGE])[0]:
        tar = guest.lab.share / "sqlite.tar"
        if not tar.exists():  # in one step: several guests may be at it
            made = tar.with_name(f"{guest.name}.tar")
            make_image(made, IMAGE, programs=[_SQLITE])
            made.rename(tar)
        guest.sh("docker load -qi /host/sqlite.tar", timeout=120)
    return dockerd


@dataclass
class DockerHost:
    """A guest with dockerd and the driver's plugin."""

    guest: Guest
    config: str
    ca: Path | None = None  # where its certificate is from
    driver: roles.Driver | None = None
    dockerd: Command | None = None

    def boot_work(self) -> None:
        """What its init would do after power comes: iscsid if it is a CNODE, then the plugin, then dockerd."""
        if self.ca:
            copy_certificate(self.ca, self.guest)
            roles.start_cnode(self.guest)
        else:
            roles.keep(self.guest, self.guest.disks[0].device, ("/var/lib/snode",))
            self.guest.sh("modprobe loop")
        self.start_driver()
        self.start_dockerd()

    def start_driver(self) -> None:
        self.driver = roles.start_driver(self.guest, "docker", self.config)

    def start_dockerd(self) -> None:
        self.dockerd = start_dockerd(self.guest, self.guest.disks[1].device)

    def kill_dockerd(self) -> None:
        """Docker and all its containers die in the same moment, as on a crash without live-restore."""
        assert self.dockerd is not None
        for name in ("dockerd", "containerd", "containerd-shim", "sleep", "sh"):
            self.guest.run(["pkill", "-9", "-x", name[:15]])
        self.dockerd.wait(20)

    def docker(self, line: str, timeout: float = 120) -> str:
        return self.guest.sh(f"docker {line}", timeout)

    def mounts(self) -> list[str]:
        return self.guest.run("grep /var/lib/snode/docker/ /proc/self/mountinfo")[1].splitlines()


def add_docker_host(lab: Lab, name: str) -> Guest:
    """A guest for a DockerHost: a disk for what it keeps, one for Docker."""
    return lab.guest(name, memory="768M", disks=[Disk("1G"), Disk("2G")])


def copy_certificate(ca: Path, guest: Guest) -> None:
    """What an operator copies to a machine."""
    files = certs.files_of(ca, guest.name)
    for path in (files.ca, files.cert, files.key):
        guest.write(f"/etc/snode/tls/{path.name}", path.read_text(), mode=0o600)
