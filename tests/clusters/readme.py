"""The commands of README.md, one block for each way of use, run as a reader would copy them."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab import Lab
from tests.lab.docker_host import IMAGE
from tests.lab.errors import LabError
from tests.lab.kernel import PROJECT
from tests.lab.network import HOST_IP
from tests.tools.build import tool_path

if TYPE_CHECKING:
    from tests.lab.kubernetes import Kubernetes
    from tests.lab.nomad import Nomad

#: What stands behind `bash` at the beginning of a block.
WAYS = ("kubernetes", "nomad", "docker")
_BLOCK = re.compile(r"^```bash (?P<way>\w+)\n(?P<commands>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> dict[str, str]:
    """The commands of each way of use."""
    found = [(match["way"], match["commands"]) for match in _BLOCK.finditer((PROJECT / "README.md").read_text())]
    assert sorted(way for way, _ in found) == sorted(WAYS), "README.md has one block for each way of use"
    return dict(found)


def run_on_host(
    lab: Lab, way: str, *, folder: Path, programs: Mapping[str, Path], environment: Mapping[str, str], timeout: float
) -> str:
    """Output of a block's commands, run in `folder` inside the lab's network. Raises LabError when one of them fails.

    programs: what its commands are here. environment: what the reader has set.
    """
    with tempfile.TemporaryDirectory() as found:
        for name, path in programs.items():
            (Path(found) / name).symlink_to(path)
        done = lab.network.inside(
            lambda: subprocess.run(
                ["bash", "-euo", "pipefail", "-c", blocks()[way]],
                cwd=folder,
                env={"PATH": f"{found}:{os.environ['PATH']}", "HOME": found, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        )
    if done.returncode:
        raise LabError(f"a command of README.md ({way}) ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def run_for_kubernetes(cluster: "Kubernetes", folder: Path) -> str:
    """The commands for Kubernetes, on a cluster that the driver may be deployed to already. folder: an empty one."""
    deploy = folder / "deploy/kubernetes"
    shutil.copytree(PROJECT / "deploy", folder / "deploy")
    shutil.copytree(deploy / "example", deploy / "my-snode")
    # What README.md says to set there: the image, and the SNODE's address and pools.
    made = cluster.lab.folder / "deploy"
    overlay = json.loads((made / "kustomization.yaml").read_text()) | {"resources": ["../base"]}
    (deploy / "my-snode/kustomization.yaml").write_text(json.dumps(overlay))
    shutil.copy(made / "snode.toml", deploy / "my-snode")
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(json.dumps(cluster.control.kubeconfig("admin")))
    for cnode in cluster.cnodes:
        cnode.sh("ctr -n k8s.io images tag --force localhost/busybox:1 docker.io/library/busybox:1.37")
    return run_on_host(
        cluster.lab,
        "kubernetes",
        folder=folder,
        programs={"kubectl": tool_path("kubectl")},
        environment={"KUBECONFIG": str(kubeconfig), "SNODE": cluster.snode.name},
        timeout=240,
    )


def run_for_nomad(nomad: "Nomad", image: str, folder: Path) -> str:
    """The commands for Nomad, on clients that have the driver's image. folder: an empty one."""
    shutil.copytree(PROJECT / "deploy", folder / "deploy")
    for client in nomad.cnodes:
        client.guest.sh(f"docker tag {IMAGE} busybox:1.37")
    return run_on_host(
        nomad.lab,
        "nomad",
        folder=folder,
        programs={"nomad": tool_path("nomad")},
        environment={"NOMAD_ADDR": f"http://{HOST_IP}:4646", "IMAGE": image, "ADDRESS": nomad.snode.guest.ip},
        timeout=240,
    )
