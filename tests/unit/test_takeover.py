"""When a volume may be taken from a node that has fallen silent, and what is done to that node."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from csi import takeover
from csi.errors import InUse, Invalid, NoSpace
from csi.exports.none import NoExport
from csi.locks import VolumeLocks
from csi.model import AccessMode, Capability, Publication, Volume
from csi.volumes import Pool, Volumes
from tests.fakes.tgt import FakeTgtd, LoginRefused
from tests.unit.snode import MIB, WRITER, Snode, soon

READERS = Capability(AccessMode.MULTI_NODE_READER_ONLY)


@pytest.mark.parametrize(("text", "seconds"), [("", 0), ("10s", 10), ("15s", 15), ("2m", 120), ("24h", 86400)])
def test_times(text: str, seconds: int) -> None:
    assert takeover.after_seconds({"takeover": text}) == seconds


@pytest.mark.parametrize(
    "text", ["9s", "0s", "15", "15 s", "-15s", "1.5m", "25h", "1d", "\u0661\u0665s", "999999s", "s"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(Invalid, match=r"parameters\.takeover: .* such as 15s"):
        takeover.after_seconds({"takeover": text})


@pytest.mark.parametrize(
    ("idle", "words"),
    [
        ({"a": 16.0}, ""),
        ({"a": 15.0}, ""),
        ({"a": 14.9}, "heard of 15 s ago, and the volume may be taken after 15 s"),
        ({"a": 0.0}, "heard of 0 s ago"),
        ({"a": None}, "can't be told yet"),
        ({}, "can't be told yet"),
        # Others are alive, or dead for long: this one alone has fallen silent.
        ({"a": 16.0, "b": 1.0}, ""),
        ({"a": 16.0, "b": 14.0, "c": 4.0}, ""),
        ({"a": 16.0, "b": 3000.0}, ""),
        ({"a": 16.0, "b": None}, ""),
        # All at once: it is the SNODE that hears nothing.
        ({"a": 16.0, "b": 14.0}, "together with b, and no other node is heard of"),
        ({"a": 16.0, "b": 14.0, "c": 24.0, "d": 900.0}, "together with b, c"),
        ({"a": 16.0, "b": 16.0, "c": None}, "together with b"),
    ],
)
def test_who_keeps_the_volume(idle: Mapping[str, float | None], words: str) -> None:
    reason = takeover.refusal(15, "a", idle)
    assert (words in reason) if words else not reason, reason


# -- on a SNODE with a tgtd ------------------------------------------------------------------------------------------


@pytest.fixture
def tgtd() -> Iterator[FakeTgtd]:
    with tempfile.TemporaryDirectory(prefix="snode") as folder:
        fake = FakeTgtd(Path(folder) / "tgtd.0")
        fake.start()
        yield fake
        fake.stop()
        assert fake.unexpected == []


class Silent(Snode):
    """A SNODE whose nodes have been silent as long as `idle` says, by name."""

    def __init__(self, folder: Path, tgtd: FakeTgtd) -> None:
        super().__init__(folder, tgtd)
        self.idle: dict[str, float | None] = {}
        self.export.idle_seconds = self._idle  # type: ignore[method-assign]  # the test says how long a node is silent

    def _idle(self, publication: Publication) -> float | None:
        return self.idle.get(publication.node.name)

    def make(self, name: str = "a", *, after: str = "15s", pool: str = "files") -> Volume:
        return self.volumes.create(
            name=name, required_bytes=8 * MIB, limit_bytes=0, capabilities=[WRITER],
            parameters={"takeover": after, "pool": pool} if after else {}, requisite=[], deadline=soon(),
        )  # fmt: skip


@pytest.fixture
def snode(tmp_path: Path, tgtd: FakeTgtd) -> Silent:
    return Silent(tmp_path, tgtd)


def test_a_silent_node_is_fenced_before_another_one_has_the_volume(snode: Silent, tgtd: FakeTgtd) -> None:
    volume_id = snode.make().volume_id
    snode.publish(volume_id)
    (old,) = snode.targets()
    tgtd.add_session(old, snode.node.initiator)
    snode.idle = {"c1": 20.0}
    snode.publish(volume_id, snode.other)
    (new,) = snode.targets()
    assert new != old
    assert [publication.node.name for publication in snode.publications.of(volume_id)] == ["c2"]
    with pytest.raises(LoginRefused, match="target not found"):
        tgtd.login(old, snode.node.initiator)
    with pytest.raises(LoginRefused):
        tgtd.login(new, snode.node.initiator)
    # The old one comes back: it is a node like any other that does not have the volume.
    snode.idle = {"c1": 0.0, "c2": 1.0}
    with pytest.raises(InUse, match="published to node c2; it was heard of 1 s ago"):
        snode.publish(volume_id)
    assert snode.targets() == {new}


@pytest.mark.parametrize(
    ("idle", "words"),
    [
        ({"c1": 3.0}, "heard of 3 s ago"),
        ({"c1": None}, "can't be told yet"),
        ({"c1": 20.0, "c3": 19.0}, "together with c3"),
    ],
)
def test_a_node_keeps_what_it_uses(snode: Silent, idle: dict[str, float | None], words: str) -> None:
    volume_id = snode.make().volume_id
    snode.publish(volume_id)
    third = replace(snode.other, name="c3", initiator=f"{snode.other.initiator}-3")
    snode.publish(snode.make("b").volume_id, third)
    before = snode.targets()
    snode.idle = idle
    with pytest.raises(InUse, match=words):
        snode.publish(volume_id, snode.other)
    assert snode.targets() == before
    assert [publication.node.name for publication in snode.publications.of(volume_id)] == ["c1"]


def test_one_live_session_of_a_node_is_enough(snode: Silent) -> None:
    volume_id = snode.make().volume_id
    snode.publish(volume_id)
    other_id = snode.make("b").volume_id
    snode.publish(other_id)
    idle = {volume_id: 20.0, other_id: 2.0}
    snode.export.idle_seconds = lambda publication: idle[publication.volume_id]  # type: ignore[method-assign]  # the test says how long a node is silent
    with pytest.raises(InUse, match="heard of 2 s ago"):
        snode.publish(volume_id, snode.other)


def test_nothing_is_taken_that_was_not_offered(snode: Silent) -> None:
    volume_id = snode.make(after="").volume_id
    snode.publish(volume_id)
    snode.idle = {"c1": 3600.0}
    with pytest.raises(InUse, match="published to node c1 as SINGLE_NODE_WRITER; unpublish it there"):
        snode.publish(volume_id, snode.other)


def test_readers_share_and_take_nothing(snode: Silent) -> None:
    volume_id = snode.make().volume_id
    snode.publish(volume_id, capability=READERS)
    snode.idle = {"c1": 3600.0}
    snode.publish(volume_id, snode.other, capability=READERS)
    assert len(snode.targets()) == 2


def test_who_can_not_have_the_volume_takes_it_from_nobody(snode: Silent) -> None:
    snode.volumes = Volumes(
        {"files": Pool(snode.backend, snode.export)}, default_pool="files", publications=snode.publications,
        locks=VolumeLocks(snode.state / "locks2"), max_per_node=1,
    )  # fmt: skip
    volume_id = snode.make().volume_id
    snode.publish(volume_id)
    snode.publish(snode.make("b").volume_id, snode.other)
    before = snode.targets()
    snode.idle = {"c1": 20.0, "c2": 0.0}
    with pytest.raises(NoSpace, match="node c2: holds 1"):
        snode.publish(volume_id, snode.other)
    assert snode.targets() == before


def test_a_volume_that_only_one_node_reaches_can_not_be_taken(snode: Silent) -> None:
    snode.volumes = Volumes(
        {"here": Pool(snode.backend, NoExport(), local_to="c1")}, default_pool="here",
        publications=snode.publications, locks=VolumeLocks(snode.state / "locks2"),
    )  # fmt: skip
    with pytest.raises(Invalid, match=r"parameters\.takeover: volumes of pool here are on node c1 alone"):
        snode.make(pool="here")
