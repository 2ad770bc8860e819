"""What a SNODE sees of its nodes, and how it tells the others."""

from pathlib import Path

from csi.failover.rules import Silence, View
from csi.failover.view import Watch, from_text, to_text, view_of
from csi.model import NodeId
from csi.publications import Publications
from csi.records import RecordStore
from tests.unit.exports.conftest import Make
from tests.unit.exports.conftest import folder as folder
from tests.unit.exports.conftest import make as make

A, B = NodeId(name="a", initiator="iqn.2026-11.io.test:a"), NodeId(name="b", initiator="iqn.2026-11.io.test:b")


def test_a_node_is_as_alive_as_its_liveliest_session(make: Make) -> None:
    one, two, three = make(node=A), make(node=A), make(node=B)
    idle = {one.target: 30.0, two.target: 21.0, three.target: 1.0}
    seen = view_of(
        [one, two, three], snode="s", driver="d", idle_seconds=idle.get, had_session=lambda target: target == two.target
    )
    assert seen.nodes == {
        "a": Silence(21.0, frozenset({one.volume_id, two.volume_id}), True),
        "b": Silence(1.0, frozenset(), False),
    }
    # What can't be told of is alive.
    del idle[one.target]
    unknown = view_of([one, two], snode="s", driver="d", idle_seconds=idle.get, had_session=lambda _: True)
    assert unknown.nodes["a"].seconds == 0


def test_what_is_told_is_understood() -> None:
    seen = View("s", "d.io", {"a": Silence(21.0, frozenset({"v1", "v2"}), True), "b": Silence(0.0)})
    assert from_text(to_text(seen)) == seen


def test_what_is_not_understood_is_nobodys_view() -> None:
    for text in ("", "{}", "[]", "null", '{"format": 2}', '{"format": 1, "snode": "s", "driver": "d", "nodes": [1]}'):
        assert from_text(text) is None, text


def test_the_records_of_another_process_are_only_read(tmp_path: Path, make: Make) -> None:
    folder = tmp_path / "publications"
    watch = Watch(tmp_path / "socket", folder, ports=[3260], snode="s", driver="d")
    assert watch.publications() == [] and not folder.exists()
    published = Publications(RecordStore(folder))
    under_way = folder / "v-x.1-2.tmp"  # the controller is about to rename it
    under_way.touch()
    first, local = make(node=A), make(node=B, protocol="loop")
    published.write(first)
    published.write(local)
    assert watch.publications() == [first] and under_way.exists()
    published.remove(first)
    assert watch.publications() == []
