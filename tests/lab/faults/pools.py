"""What the tests of LVM and of durability ask of an SNODE and its pools."""

import json
from pathlib import Path

from csi.model import VOLUME_ID
from csi.pb import csi_pb2 as pb
from tests.lab.cluster import Cluster
from tests.lab.guest import Guest
from tests.lab.kernel import PROJECT

_FOLDER = Path(__file__).parent


def program(guest: Guest, name: str, *arguments: object) -> list[str]:
    """The command line of a program of this folder, put into a guest."""
    path = f"/run/{name}"
    guest.write(path, (_FOLDER / name).read_text())
    return ["/usr/bin/python3", path, *map(str, arguments)]


def restart_driver(cluster: Cluster) -> None:
    """The SNODE's driver knows nothing any more but what it reads."""
    assert cluster.snode.driver is not None
    cluster.snode.driver.kill9()
    cluster.start_driver(cluster.snode)


def doctor(cluster: Cluster, subject: str) -> list[str]:
    """What `snode doctor` finds wrong with something. Asked again if it had no time: the host may be busy."""
    argv = [str(PROJECT / ".venv/bin/python"), "-m", "csi", "doctor", "--role=controller", "--json"]
    line = f"cd {PROJECT} && {' '.join(argv)} --config=/etc/snode/snode.toml 2>/run/doctor.err; true"
    for _ in range(5):
        text = cluster.snode.guest.sh(line, 120)
        if "no time left" not in text:
            break
    assert text, f"snode doctor says nothing but {cluster.snode.guest.read('/run/doctor.err')}"
    return [
        f"{finding['text']} -> {finding['repair']}"
        for finding in json.loads(text)
        # The lab's groups are made without that setting.
        if finding["subject"] == subject and finding["level"] != "ok" and "activated at boot" not in finding["text"]
    ]


def capacity(cluster: Cluster, pool: str) -> int:
    """GetCapacity, in bytes."""
    request = pb.GetCapacityRequest(parameters={"pool": pool})
    return int(cluster.snode.stubs["controller"].GetCapacity(request, timeout=60).available_capacity)


def volumes_of(snode: Guest, group: str) -> dict[str, tuple[float, str]]:
    """Size in MiB and tags of each volume of a group."""
    rows = snode.sh(f"lvs --noheadings -o lv_name,lv_size,lv_tags --units m --nosuffix {group}").splitlines()
    fields = [row.split() for row in rows]
    return {row[0]: (float(row[1]), row[2]) for row in fields if VOLUME_ID.fullmatch(row[0])}
