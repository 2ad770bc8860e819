"""csi-sanity, the conformance tests of the CSI project, against the real `snode all` with real mkfs and mounts.

Every spec that the advertised capabilities allow must run and pass. What is skipped is compared with a list, so that a
capability that is lost by mistake shows.
"""

import subprocess
from pathlib import Path

import pytest

from tests.driver import Driver
from tests.leftovers import all_below
from tests.sanity.report import Outcome, check, read_report
from tests.tools.build import tool_path

CONFIG = """
[controller]
default_pool = "files"
[node]
name = "sanity"
max_volumes = 4
[pools.files]
type = "files"
directory = "{folder}/pool"
"""


def run_csi_sanity(driver: Driver, folder: Path, *arguments: str) -> Outcome:
    """Run every spec against a driver; the report stays in folder/sanity.log."""
    report = folder / "sanity.xml"
    done = subprocess.run(
        [
            str(tool_path("csi-sanity")),
            f"-csi.endpoint={driver.endpoint}",
            f"-csi.mountdir={folder}/mount",
            f"-csi.stagingdir={folder}/staging",
            "-csi.testnodevolumeattachlimit",
            f"-ginkgo.junit-report={report}",
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    (folder / "sanity.log").write_text(done.stdout + done.stderr)
    assert report.exists(), f"csi-sanity made no report:\n{(done.stdout + done.stderr)[-3000:]}"
    return read_report(report)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("access", ["mount", "block"])
def test_csi_sanity_on_files(tmp_path: Path, access: str) -> None:
    with Driver(tmp_path, CONFIG.format(folder=tmp_path)) as driver:
        outcome = run_csi_sanity(driver, tmp_path, f"-csi.testvolumeaccesstype={access}")
        print(f"csi-sanity ({access}): {outcome.passed} passed, {outcome.pending} pending, {dict(outcome.skipped)}")
        check(outcome)
        assert list((tmp_path / "pool").glob("v-*")) == []
    assert all_below(tmp_path) == []
    assert list((tmp_path / "state" / "publications").glob("*.json")) == []
