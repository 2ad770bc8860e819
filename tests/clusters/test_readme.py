"""What README.md tells its readers to type works as it stands there.

Docker is here; Kubernetes and Nomad are beside the tests of their clusters, so that none boots twice.
"""

import pytest

from tests.lab import Disk, Lab, roles
from tests.lab.conftest import Say
from tests.lab.docker_host import IMAGE, start_dockerd
from tests.lab.kernel import PROJECT

from . import readme

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

# No systemd runs in the guests: what the unit starts is started.
_SYSTEMCTL = f"""#!/bin/bash
set -eu
[ "$1 $2" = "enable --now" ]
command=$(sed -n 's/^ExecStart=//p' {PROJECT}/deploy/systemd/$3.service)
setsid $command < /dev/null > /var/log/$3.log 2>&1 &
for i in $(seq 200); do [ -S /run/docker/plugins/snode.sock ] && exit 0; sleep .05; done
cat /var/log/$3.log; exit 1
"""
# dockerd has no bridge here, which containers get if they are not told otherwise.
_DOCKER = """#!/bin/bash
if [ "$1" = run ]; then set -- run --network none "${@:2}"; fi
exec /usr/bin/docker "$@"
"""


def test_docker(lab: Lab, say: Say) -> None:
    guest = lab.guest("host", memory="768M", disks=[Disk("2G"), Disk("2G")])
    guest.boot()
    roles.keep(guest, guest.disks[0].device, ("/var/lib/snode",))
    guest.sh("modprobe loop")
    start_dockerd(guest, guest.disks[1].device)
    guest.sh(f"docker tag {IMAGE} busybox; mkdir -p /etc/snode; : > /etc/snode/snode.toml")
    guest.sh(["ln", "-sfn", str(PROJECT / ".venv"), "/opt/snode"])  # where the unit looks for it
    for name, text in {"systemctl": _SYSTEMCTL, "docker": _DOCKER}.items():
        guest.write(f"/usr/local/bin/{name}", text, mode=0o755)
    out = guest.sh(f"set -e; PATH=/usr/local/bin:$PATH\n{readme.blocks()['docker']}", 120)
    assert "hello" in out.splitlines()
    assert guest.sh("docker volume ls -q") == ""
    assert guest.run("ls /var/lib/snode/volumes/*.img")[0] != 0, "the volume's file is gone too"
