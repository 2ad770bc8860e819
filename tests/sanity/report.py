"""What a run of csi-sanity said, and what it must say."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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


def check(outcome: Outcome) -> None:
    """Every spec that the advertised capabilities allow ran and passed."""
    assert outcome.failed == []
    assert outcome.pending == 1  # pending in the tool itself
    assert outcome.skipped == NOT_ADVERTISED
    assert outcome.passed == SPECS - outcome.pending - outcome.skipped.total()
