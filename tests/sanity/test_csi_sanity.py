"""csi-sanity, the conformance tests of the CSI project, against the real `snode all` with real mkfs and mounts.

Every spec that the advertised capabilities allow must run and pass. What is skipped is compared with the list here, so that
a capability that is lost by mistake shows.
"""

import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.driver import Driver
from tests.leftovers import all_below
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

#: How many specs csi-sanity v5.6.0 has.
SPECS = 103

#: Why csi-sanity v5.6.0 leaves a spec out, and how many: capabilities that the driver does not have.
NOT_ADVERTISED = Counter(
    {
        "Snapshot not supported": 2,
        "Volume Cloning not supported": 2,
        "Modify volume not supported": 1,
        "Modify Volume not supported": 1,
        "ControllerModifyVolume not supported": 6,
        "ListSnapshots not supported": 7,
        "GetSnapshot not supported": 3,
        "CreateSnapshot not supported": 6,
        "DeleteSnapshot not supported": 3,
        "GroupControllerService not supported": 6,
        "ControllerGetVolumeHealth not supported": 2,
        "ControllerListVolumeHealth not supported": 1,
        "NodeGetVolumeHealth not supported": 2,
        "NodeGetStorageHealth not supported": 1,
    }
)


@dataclass(frozen=True)
class Outcome:
    """What a run of csi-sanity said."""

    passed: int
    pending: int
    skipped: Counter[str]
    failed: list[str]


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


def read_report(report: Path) -> Outcome:
    """Sort the specs of a JUnit report."""
    passed, pending, skipped, failed = 0, 0, Counter[str](), []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if not case.get("name", "").startswith("[It]"):
            continue
        status = case.get("status")
        if status == "passed":
            passed += 1
        elif status == "pending":
            pending += 1
        elif status == "skipped":
            skip = case.find("skipped")
            skipped[skip.get("message", "").removeprefix("skipped - ") if skip is not None else ""] += 1
        else:
            failure = case.find("failure")
            words = (failure.get("message", "") if failure is not None else "")[:500]
            failed.append(f"{case.get('name')}: {status}: {words}")
    return Outcome(passed, pending, skipped, failed)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("access", ["mount", "block"])
def test_csi_sanity_on_files(tmp_path: Path, access: str) -> None:
    with Driver(tmp_path, CONFIG.format(folder=tmp_path)) as driver:
        outcome = run_csi_sanity(driver, tmp_path, f"-csi.testvolumeaccesstype={access}")
        print(f"csi-sanity ({access}): {outcome.passed} passed, {outcome.pending} pending, {dict(outcome.skipped)}")
        assert outcome.failed == []
        assert outcome.pending == 1  # pending in the tool itself
        assert outcome.passed == SPECS - outcome.pending - outcome.skipped.total()
        assert outcome.skipped == NOT_ADVERTISED
        assert list((tmp_path / "pool").glob("v-*")) == []
    assert all_below(tmp_path) == []
    assert list((tmp_path / "state" / "publications").glob("*.json")) == []
