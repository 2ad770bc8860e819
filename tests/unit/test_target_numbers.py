"""The numbers that tgtd knows targets by: new for each publication, and harmless when one is taken."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi.errors import Unavailable
from csi.model import Publication
from tests.fakes.tgt import FakeTgtd
from tests.unit.snode import Snode


@pytest.fixture
def tgtd(tmp_path: Path) -> Iterator[FakeTgtd]:
    fake = FakeTgtd(tmp_path / "tgtd.sock")
    fake.start()
    yield fake
    fake.stop()
    assert fake.unexpected == []


@pytest.fixture
def snode(tmp_path: Path, tgtd: FakeTgtd) -> Snode:
    return Snode(tmp_path / "snode", tgtd)


def test_no_number_is_used_twice(snode: Snode, tgtd: FakeTgtd) -> None:
    """Not by fifty at once, nor after an unpublish, nor after a kill: a login may still hold the old number."""
    volume_ids = [snode.create(f"v{number}", size_bytes=1 << 20).volume_id for number in range(50)]
    seen: set[int] = set()
    for life in range(2):
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(snode.publish, volume_ids))
        assert {publication.tid for publication in snode.publications.all()} == set(tgtd.targets)
        assert len(tgtd.targets) == len(volume_ids)
        assert not seen.intersection(tgtd.targets), f"a number is used again in life {life}"
        seen.update(tgtd.targets)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(snode.unpublish, volume_ids))
        assert tgtd.targets == {}
        snode.start()
        volume_ids = volume_ids[:10]


def test_a_number_that_is_taken_harms_neither_publication(
    snode: Snode, tgtd: FakeTgtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.publishing.secrets.randbelow", lambda limit: limit // 2)
    first, second = snode.create("a").volume_id, snode.create("b").volume_id
    snode.publish(first)
    [standing] = snode.publications.all()
    before = log_in(tgtd, standing)
    with pytest.raises(Unavailable, match=r"its number \d+ is taken.*unpublish volume .* and publish it again"):
        snode.publish(second)
    target = tgtd.by_name(standing.target)
    assert target is not None and before in target.sessions
    snode.unpublish(second)
    monkeypatch.undo()
    snode.publish(second)
    assert before in target.sessions
    assert {publication.tid for publication in snode.publications.all()} == set(tgtd.targets)


def log_in(tgtd: FakeTgtd, publication: Publication) -> object:
    """The session of the node that a volume is published to."""
    chap = publication.chap
    return tgtd.login(publication.target, publication.node.initiator, user=chap.user, secret=chap.secret)
