from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.deadline import Deadline
from tests.fakes.iscsi import FakeIscsi


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FakeIscsi]:
    fake = FakeIscsi(tmp_path)
    yield fake
    fake.close()


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(20)
