from pathlib import Path

import pytest

from csi.demo_service import Service
from csi.errors import Unavailable


def test_it_runs_until_it_is_stopped(tmp_path: Path) -> None:
    service = Service(["sh", "-c", "echo hello; sleep 60"], log=tmp_path / "log")
    assert service.running
    service.stop(seconds=5)
    assert not service.running


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no-such-program"):
        Service(["no-such-program"], log=tmp_path / "log")
