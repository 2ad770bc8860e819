"""Fixtures of the clusters' tests, which run in two processes at once: each file in one of them, on labs of its own.

Labs wait for most of their time, for a Lease that gets old or a daemon that comes back, so that two of them take little
longer than one.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.lab.conftest import SAID, lab, say
from tests.lab.kubernetes import Kubernetes, running
from tests.lab.kubernetes_objects import storage_class

__all__ = ["lab", "say"]


class _ByCluster(LoadScopeScheduling):  # type: ignore[misc]  # ships no types
    """A file's tests run in one process, and those of Kubernetes' files, which share a cluster, in one as well."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "kubernetes" if "/test_kubernetes_" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Who runs what."""
    return _ByCluster(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print what a test in another process said."""
    lines = [text for name, text in report.user_properties if name == SAID]
    if report.when == "teardown" and lines:
        print(f"\n{report.nodeid}", *lines, sep="\n    ", flush=True)


@pytest.fixture(scope="session")
def kubernetes() -> Iterator[Kubernetes]:
    """A SNODE and two CNODEs with the driver as users deploy it, and some more StorageClasses."""
    # How soon kubelet sees that a volume has grown; 1 to 1.5 minutes by default.
    with running(kubelet={"syncFrequency": "10s"}) as made:
        made.create(
            storage_class("at-once", immediate=True),
            storage_class("kept", retain=True),
            storage_class("options", mount_options=["noatime"]),
            storage_class("xfs", parameters={"pool": "thick", "csi.storage.k8s.io/fstype": "xfs"}),
        )
        yield made
