"""csi-sanity across two real machines: the controller on a SNODE with LVM and tgtd, the node on a CNODE with iscsid."""

import shutil
from collections.abc import Sequence

import pytest

from tests.sanity.report import check, read_report
from tests.tools.build import tool_path

from . import Lab, roles
from .conftest import Say
from .keeper import POOLS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

CONTROLLER = """
[controller]
portals = ["{portal}"]
default_pool = "thick"

[node]
max_volumes = 4

[pools.thick]
type = "lvm"
vg = "vg0"
"""
NODE = """
[node]
max_volumes = 4
"""
SIZE_BYTES = 64 << 20


@pytest.mark.soak
def test_csi_sanity_on_lvm_tgt_and_iscsi(lab: Lab, say: Say) -> None:
    _run(lab, say, [("thick", "mount")])


@pytest.mark.soak
def test_csi_sanity_on_every_kind_of_pool(lab: Lab, say: Say) -> None:
    _run(lab, say, [("thick", "block"), ("thin", "mount"), ("mirror", "mount")])


def _run(lab: Lab, say: Say, runs: Sequence[tuple[str, str]]) -> None:
    snode, cnode = roles.add_snode(lab, legs=2), roles.add_cnode(lab)
    lab.boot_all()
    roles.start_snode(snode)
    roles.ensure_thin_pool(snode)
    roles.start_cnode(cnode)
    controller = roles.start_driver(snode, "controller", CONTROLLER.format(portal=roles.portal(snode)) + POOLS)
    roles.serve_tcp(snode, controller.socket, 9000)
    node = roles.start_driver(cnode, "node", NODE)
    shutil.copy(tool_path("csi-sanity"), lab.share / "csi-sanity")
    for pool, access in runs:
        cnode.write("/run/parameters.yaml", f"pool: {pool}\n")
        name = f"{pool}-{access}"
        rc, out = cnode.run(
            [
                "/host/csi-sanity",
                f"-csi.endpoint=unix://{node.socket}",
                f"-csi.controllerendpoint=dns:///{snode.ip}:9000",
                "-csi.mountdir=/var/lib/kubelet/mount",
                "-csi.stagingdir=/var/lib/kubelet/staging",
                f"-csi.testvolumesize={SIZE_BYTES}",
                f"-csi.testvolumeexpandsize={2 * SIZE_BYTES}",
                "-csi.testvolumeparameters=/run/parameters.yaml",
                f"-csi.testvolumeaccesstype={access}",
                "-csi.testnodevolumeattachlimit",
                f"-ginkgo.junit-report=/host/{name}.xml",
            ],
            timeout=600,
        )
        report = lab.share / f"{name}.xml"
        assert report.exists(), out[-3000:]
        outcome = read_report(report)
        say(f"csi-sanity on {name}: {outcome.passed} passed, {outcome.pending} pending, rc {rc}")
        assert outcome.failed == [], out[-6000:]
        check(outcome)
    assert cnode.run("iscsiadm -m session")[0] == 21
    assert cnode.run("iscsiadm -m node")[0] == 21
    assert "io.snode" not in snode.sh("tgtadm --lld iscsi --op show --mode target")
    gone = "! lvs --noheadings -o lv_name | grep -qE 'v-|trash'"
    roles.until(snode, gone, "the wipe of deleted volumes", 600)
