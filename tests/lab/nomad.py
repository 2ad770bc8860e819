"""A real Nomad in the lab: its server on the host, and clients with a real dockerd in a SNODE and in CNODEs."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tools.build import tool_path

from . import roles
from .channel import Command
from .disk import Disk
from .docker_disk import get_docker_disk
from .docker_host import start_dockerd
from .errors import LabError
from .guest import Guest
from .lab import Lab
from .network import HOST_IP

#: Where Debian's package of Nomad keeps its data.
DATA_DIR = "/opt/nomad/data"
_KEPT = "/var/keep/opt-nomad-data"
_HTTP_PORT = 4646
_SERVER = """
data_dir = "{folder}"
bind_addr = "{ip}"
disable_update_check = true
server {{
  enabled          = true
  bootstrap_expect = 1
  # Claims of a lost client are freed by this alone, and else every 5 minutes only (docs/tutorials/nomad.md).
  csi_volume_claim_gc_interval  = "10s"
  csi_volume_claim_gc_threshold = "5s"
}}
"""
_CLIENT = """
name       = "{name}"
data_dir   = "{data_dir}"
bind_addr  = "{ip}"
log_level  = "DEBUG"
disable_update_check = true
client {{
  enabled           = true
  servers           = ["{server}"]
  network_interface = "vec0"
  # A guest's CPU has no clock speed that could be read.
  cpu_total_compute = 2000
  meta {{
    snode_role = "{role}"
  }}
  # They would ask addresses that nobody has here, for seconds each.
  options = {{
    "fingerprint.denylist" = "env_aws,env_azure,env_digitalocean,env_gce"
  }}
}}
plugin "docker" {{
  config {{
    allow_privileged = true
    volumes {{
      enabled = true
    }}
    # There is no registry to pull an image from again.
    gc {{
      image = false
    }}
  }}
}}
"""
# /proc/cpuinfo of a guest has no clock speed, and Nomad looks for one.
_CLOCK_SPEED = (
    "mountpoint -q /proc/cpuinfo || { "
    r'sed "s/^model name.*/&\ncpu MHz\t\t: 2700.000/" /proc/cpuinfo > /run/cpuinfo && '
    "mount --bind /run/cpuinfo /proc/cpuinfo; }"
)


@dataclass
class Client:
    """A guest that is one of Nomad's clients. `role` is `snode` or `cnode`."""

    guest: Guest
    role: str
    daemon: Command | None = None  # tgtd or iscsid
    agent: Command | None = None

    @property
    def name(self) -> str:
        """What Nomad and the driver call it."""
        return self.guest.name

    def boot_work(self) -> None:
        """What its init would do after power comes: the storage's daemon, dockerd, Nomad's agent."""
        guest = self.guest
        self.daemon = _start_snode(guest) if self.role == "snode" else roles.start_cnode(guest)
        # On a real filesystem, and kept over a reboot, like Nomad's on any machine.
        guest.sh(f"mkdir -p {_KEPT} {DATA_DIR} && mount --bind {_KEPT} {DATA_DIR}; {_CLOCK_SPEED}")
        start_dockerd(guest, guest.disks[-1].device)
        self.start_agent()

    def start_agent(self) -> None:
        """Start Nomad's client agent."""
        config = _CLIENT.format(name=self.name, data_dir=DATA_DIR, ip=self.guest.ip, server=HOST_IP, role=self.role)
        self.guest.write("/etc/nomad.d/nomad.hcl", config)
        argv = [str(tool_path("nomad")), "agent", "-config", "/etc/nomad.d/nomad.hcl"]
        self.agent = self.guest.spawn(argv, name="nomad")

    def boot(self) -> None:
        """Power comes back."""
        self.guest.boot()
        self.boot_work()


def _has_docker(node: dict[str, Any]) -> bool:
    return bool((node["Drivers"] or {}).get("docker", {}).get("Healthy"))


def _start_snode(guest: Guest) -> Command:
    """As roles.start_snode, of whose disks the last one is Docker's here."""
    roles.prepare_snode(guest)
    roles.ensure_vg(guest, "vg0", [guest.disks[1].device])
    roles.ensure_thin_pool(guest, size="1G")
    return roles.start_tgtd(guest)


class Nomad:
    """The server and its clients; `snode` is the first. Boots all; the driver's jobs are the caller's to run."""

    def __init__(self, lab: Lab, images: Sequence[Path], *, cnodes: int = 2) -> None:
        """images: archives for `docker load`, which every client has from the start."""
        self.lab = lab
        self._binary = str(tool_path("nomad"))
        disk = get_docker_disk(images)
        snode = lab.guest("snode", memory="1200M", disks=[Disk("512M"), Disk("3G"), Disk(base=disk)])
        self.snode = Client(snode, "snode")
        self.cnodes = [
            Client(lab.guest(f"cnode{n + 1}", memory="1200M", disks=[Disk("1G"), Disk(base=disk)]), "cnode")
            for n in range(cnodes)
        ]
        self._start_server()
        lab.boot_all()
        lab.each([client.guest for client in self.clients], lambda guest: self.client(guest.name).boot_work())
        self.wait("clients ready", lambda: len(self._ready()) == len(self.clients), 90)

    @property
    def clients(self) -> list[Client]:
        """All of them, the SNODE first."""
        return [self.snode, *self.cnodes]

    def client(self, name: str) -> Client:
        """A client by its name."""
        return next(client for client in self.clients if client.name == name)

    def other(self, name: str) -> Client:
        """A CNODE that is not this one."""
        return next(client for client in self.cnodes if client.name != name)

    # -- what a user types ---------------------------------------------------------------------------------------

    def run(self, *words: str, stdin: str = "", timeout: float = 120) -> tuple[int, str]:
        """Exit code and output of `nomad …`, run on the host."""
        env = {**os.environ, "NOMAD_ADDR": f"http://{HOST_IP}:{_HTTP_PORT}", "NOMAD_CLI_NO_COLOR": "1"}
        done = self.lab.network.inside(
            lambda: subprocess.run(
                [self._binary, *words],
                input=stdin,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        )
        return done.returncode, done.stdout.strip()

    def __call__(self, *words: str, stdin: str = "", timeout: float = 120) -> str:
        """Output of `nomad …`; LabError with it when the exit code is not 0."""
        code, out = self.run(*words, stdin=stdin, timeout=timeout)
        if code:
            raise LabError(f"nomad {' '.join(words)} ended with {code}:\n{out}")
        return out

    def api(self, path: str) -> Any:
        """What the API answers to a GET."""
        return json.loads(self("operator", "api", "-X", "GET", path))

    # -- what is there -------------------------------------------------------------------------------------------

    def node(self, name: str) -> dict[str, Any]:
        """A client, as the API lists it."""
        return next(dict(node) for node in self.api("/v1/nodes") if node["Name"] == name)

    def plugin(self, plugin_id: str = "snode") -> tuple[int, int]:
        """How many controllers and nodes of a plugin are healthy."""
        found = [plugin for plugin in self.api("/v1/plugins?type=csi") if plugin["ID"] == plugin_id]
        return (found[0]["ControllersHealthy"], found[0]["NodesHealthy"]) if found else (0, 0)

    def plugin_on(self, name: str, plugin_id: str = "snode") -> bool:
        """Whether a client has a healthy node plugin."""
        plugins = self.api(f"/v1/node/{self.node(name)['ID']}")["CSINodePlugins"] or {}
        return bool(plugins.get(plugin_id, {}).get("Healthy"))

    def running(self, job: str) -> dict[str, Any] | None:
        """The allocation of a job whose tasks all run, if there is one."""
        for stub in self.api(f"/v1/job/{job}/allocations"):
            states = stub["TaskStates"] or {}
            up = states and all(state["State"] == "running" for state in states.values())
            if stub["DesiredStatus"] == "run" and stub["ClientStatus"] == "running" and up:
                return dict(stub)
        return None

    def claims(self, volume: str) -> list[str]:
        """The allocations that hold a volume."""
        found = self.api(f"/v1/volume/csi/{volume}")
        return [stub["ID"] for stub in found["Allocations"] or []]

    def is_free(self, volume: str) -> bool:
        """Whether nobody holds a volume, and nobody is being fenced from it."""
        return bool(self.api(f"/v1/volume/csi/{volume}")["AccessMode"] == "")

    def volumes(self) -> list[str]:
        """Ids of all volumes that Nomad knows."""
        return [volume["ID"] for volume in self.api("/v1/volumes?type=csi")]

    def wait(self, what: str, check: Callable[[], Any], seconds: float = 60) -> float:
        """Seconds until `check` is true; LabError, with what Nomad says of everything, when it never is."""
        began = time.monotonic()
        while not check():
            if time.monotonic() - began > seconds:
                raise LabError(f"after {seconds} s still not: {what}\n{self._all_there_is()}")
            time.sleep(0.25)
        return time.monotonic() - began

    def _all_there_is(self) -> str:
        looks = (["node", "status"], ["plugin", "status", "-verbose", "snode"], ["volume", "status"], ["job", "status"])
        parts = [self.run(*look)[1] for look in looks]
        for job in ("app", "snode-node", "snode-controller"):
            code, out = self.run("operator", "api", "-X", "GET", f"/v1/job/{job}/allocations")
            for stub in json.loads(out) if code == 0 and out.startswith("[") else []:
                if stub["DesiredStatus"] == "run":
                    parts.append(self.run("alloc", "status", stub["ID"])[1])
        return "\n\n".join(parts)

    def _ready(self) -> list[str]:
        code, out = self.run("operator", "api", "-X", "GET", "/v1/nodes")
        # The server has no leader in its first seconds, and says so in plain text.
        nodes = json.loads(out) if code == 0 and out.startswith("[") else []
        return [node["Name"] for node in nodes if node["Status"] == "ready" and _has_docker(node)]

    def _start_server(self) -> None:
        folder = self.lab.folder / "nomad-server"
        folder.mkdir()
        config = folder / "server.hcl"
        config.write_text(_SERVER.format(folder=folder / "data", ip=HOST_IP))
        with (self.lab.logs / "host.nomad-server.log").open("wb") as log:
            self.lab.popen([self._binary, "agent", "-config", str(config)], stdout=log, stderr=log)
