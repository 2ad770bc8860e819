"""The use cases of a SNODE over the real files backend and a tgtd."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi.backends.files import FilesBackend
from csi.errors import (
    Busy,
    Conflict,
    DataLoss,
    DriverError,
    InUse,
    Invalid,
    NoSpace,
    NotFound,
    OutOfRange,
    Stale,
    Unavailable,
)
from csi.exports.none import NoExport
from csi.model import TOPOLOGY_NODE, AccessMode, Capability, NodeId
from csi.records import RecordStore
from csi.volumes import Pool
from tests.fakes.tgt import FakeTgtd
from tests.scratch_folder import scratch_folder
from tests.unit.snode import MIB, WRITER, Snode, soon

READERS = Capability(AccessMode.MULTI_NODE_READER_ONLY)
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
SHARED_BLOCK = Capability(AccessMode.MULTI_NODE_MULTI_WRITER, block=True)


@pytest.fixture
def tgtd() -> Iterator[FakeTgtd]:
    with scratch_folder("tgt") as folder:
        fake = FakeTgtd(folder / "tgtd.0")
        fake.start()
        yield fake
        fake.stop()
        assert fake.unexpected == []


@pytest.fixture
def snode(tmp_path: Path, tgtd: FakeTgtd) -> Snode:
    return Snode(tmp_path, tgtd)


def test_create_again_is_the_same_volume_and_other_wishes_are_a_conflict(snode: Snode) -> None:
    volume = snode.create(size_bytes=8 * MIB, limit_bytes=16 * MIB)
    assert snode.create(size_bytes=8 * MIB, limit_bytes=16 * MIB) == volume
    assert snode.create(size_bytes=0) == volume
    with pytest.raises(Conflict, match="exists with"):
        snode.create(size_bytes=9 * MIB)
    with pytest.raises(Conflict):
        snode.create(size_bytes=1 * MIB, limit_bytes=2 * MIB)
    with pytest.raises(Conflict, match="parameters"):
        snode.volumes.create(
            name="a", required_bytes=8 * MIB, limit_bytes=0, capabilities=[WRITER], parameters={"pool": "files"},
            requisite=[], deadline=soon(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("required", "limit"), [(2 * MIB, MIB), (MIB + 1, MIB + 2), (1 << 63, 0), ((1 << 63) - 1, 0), (0, 1)]
)
def test_sizes_that_can_not_be_had_are_out_of_range(snode: Snode, required: int, limit: int) -> None:
    with pytest.raises(OutOfRange, match="capacity_range"):
        snode.create(size_bytes=required, limit_bytes=limit)
    assert snode.files() == set()


def test_a_limit_alone_gets_the_largest_size_within_it(snode: Snode) -> None:
    assert snode.create("a", size_bytes=0, limit_bytes=MIB + MIB // 2).size_bytes == MIB
    assert snode.create("b", size_bytes=0, limit_bytes=MIB).size_bytes == MIB


def test_a_pool_that_is_too_small_says_so_and_keeps_nothing(snode: Snode) -> None:
    with pytest.raises(NoSpace, match="pool files"):
        snode.create(size_bytes=1 << 50)
    assert snode.files() == set()


def test_unknown_pool_names_the_pools_there_are(snode: Snode) -> None:
    with pytest.raises(Invalid, match=r"no pool 'fast'.*files"):
        snode.volumes.create(
            name="a", required_bytes=0, limit_bytes=0, capabilities=[WRITER], parameters={"pool": "fast"},
            requisite=[], deadline=soon(),
        )  # fmt: skip


def test_delete_refuses_a_published_volume_and_forgives_an_absent_one(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    with pytest.raises(InUse, match="published to c1"):
        snode.volumes.delete(volume_id, soon())
    snode.unpublish(volume_id, snode.node)
    snode.volumes.delete(volume_id, soon())
    snode.volumes.delete(volume_id, soon())
    assert snode.files() == set()


def test_publish_again_is_the_same_publication(snode: Snode, tgtd: FakeTgtd) -> None:
    volume_id = snode.create().volume_id
    first, second = snode.publish(volume_id), snode.publish(volume_id)
    assert {**first, "sealed": ""} == {**second, "sealed": ""}
    assert len(tgtd.targets) == 1
    (path,) = json.loads(first["paths"])
    assert snode.targets() == {path["target"]}


def test_publish_again_in_another_way_is_a_conflict(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    for capability, readonly in ((WRITER, True), (BLOCK, False), (READERS, False)):
        with pytest.raises(Conflict, match="published to node c1"):
            snode.publish(volume_id, capability=capability, readonly=readonly)


def test_the_own_publication_is_what_counts_whoever_else_reads(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    for node in (snode.other, snode.node):
        snode.publish(volume_id, node, capability=READERS)
    for node in (snode.other, snode.node):
        with pytest.raises(Conflict, match="MULTI_NODE_READER_ONLY"):
            snode.publish(volume_id, node)


def test_a_single_node_volume_goes_elsewhere_only_after_the_fence(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    first = snode.publish(volume_id)
    with pytest.raises(InUse, match="published to node c1"):
        snode.publish(volume_id, snode.other)
    snode.unpublish(volume_id, snode.node)
    assert snode.targets() == set()
    second = snode.publish(volume_id, snode.other)
    assert first["paths"] != second["paths"]
    assert first["scsi_id"] == second["scsi_id"]


def test_readers_share_and_writers_do_not_join_them(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    assert snode.publish(volume_id, capability=READERS)["readonly"] == "true"
    snode.publish(volume_id, snode.other, capability=READERS)
    assert len(snode.targets()) == 2
    third = NodeId(name="c3", public_key=snode.node.public_key, initiator="iqn.1993-08.org.debian:01:c3")
    with pytest.raises(InUse):
        snode.publish(volume_id, third)
    snode.unpublish(volume_id)
    assert snode.targets() == set()


def test_shared_writing_is_for_raw_block_only(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    with pytest.raises(Invalid, match="raw block"):
        snode.publish(volume_id, capability=Capability(AccessMode.MULTI_NODE_MULTI_WRITER))
    with pytest.raises(Invalid, match="MULTI_NODE_SINGLE_WRITER"):
        snode.publish(volume_id, capability=Capability(AccessMode.MULTI_NODE_SINGLE_WRITER, block=True))
    snode.publish(volume_id, capability=SHARED_BLOCK)
    snode.publish(volume_id, snode.other, capability=SHARED_BLOCK)
    assert len(snode.targets()) == 2


def test_a_second_node_of_the_same_initiator_name_is_refused(snode: Snode) -> None:
    snode.publish(snode.create("a").volume_id)
    clone = NodeId(name="c9", public_key=snode.other.public_key, initiator=snode.node.initiator)
    with pytest.raises(InUse, match="also that of node c1"):
        snode.publish(snode.create("b").volume_id, clone)


def test_a_node_set_up_anew_must_be_unpublished_first(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    again = NodeId(name="c1", public_key=snode.other.public_key, initiator=snode.node.initiator)
    with pytest.raises(InUse, match="set up anew"):
        snode.publish(volume_id, again)
    snode.unpublish(volume_id, again)
    snode.publish(volume_id, again)


def test_unknown_volume_or_node(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    with pytest.raises(NotFound, match="v-x"):
        snode.publish("v-x")
    with pytest.raises(NotFound, match="node_id"):
        snode.volumes.publish(volume_id, node_id="fake", capability=WRITER, readonly=False, deadline=soon())
    with pytest.raises(InUse, match="open-iscsi"):
        snode.publish(volume_id, NodeId(name="c1"))
    snode.unpublish("v-x")
    snode.volumes.unpublish(volume_id, node_id="fake", deadline=soon())


def test_permission_to_format_ends_when_data_is_seen(snode: Snode) -> None:
    volume = snode.create()
    assert snode.publish(volume.volume_id)["may_format"] == "true"
    _make_ext4(volume.device)
    snode.volumes.tend(soon())
    assert snode.publish(volume.volume_id)["may_format"] == "false"
    with volume.device.open("r+b") as device:
        device.write(bytes(1 << 20))  # the superblock is destroyed; that makes it no new volume
    snode.start()
    assert snode.publish(volume.volume_id)["may_format"] == "false"
    snode.unpublish(volume.volume_id)
    assert snode.publish(volume.volume_id, snode.other)["may_format"] == "false"


def test_permission_to_format_ends_with_a_writable_raw_publication(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    assert snode.publish(volume_id, capability=BLOCK)["may_format"] == "false"
    snode.unpublish(volume_id)
    assert snode.publish(volume_id)["may_format"] == "false"


def test_no_permission_to_format_for_readers(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    assert snode.publish(volume_id, readonly=True)["may_format"] == "false"
    snode.unpublish(volume_id)
    assert snode.publish(volume_id)["may_format"] == "true"


def test_expand_never_shrinks_and_reaches_the_target(snode: Snode, tgtd: FakeTgtd) -> None:
    volume_id = snode.create(size_bytes=8 * MIB).volume_id
    snode.publish(volume_id)
    volumes = snode.volumes
    assert volumes.expand(volume_id, required_bytes=16 * MIB, limit_bytes=0, deadline=soon()) == 16 * MIB
    assert volumes.expand(volume_id, required_bytes=8 * MIB, limit_bytes=0, deadline=soon()) == 16 * MIB
    with pytest.raises(OutOfRange, match="never shrink"):
        volumes.expand(volume_id, required_bytes=0, limit_bytes=8 * MIB, deadline=soon())
    assert snode.publish(volume_id)["size_bytes"] == str(16 * MIB)
    (target,) = tgtd.targets.values()
    assert [lun.size_bytes for lun in target.luns.values() if lun.path] == [16 * MIB]


def test_list_pages_stay_right_while_volumes_come_and_go(snode: Snode) -> None:
    ids = sorted(snode.create(name).volume_id for name in "abcdef")
    snode.publish(ids[0])
    page = snode.volumes.list_volumes(starting_token="", max_entries=2, deadline=soon())
    assert [entry.volume.volume_id for entry in page.entries] == ids[:2]
    assert page.entries[0].node_ids == (str(snode.node),)
    snode.volumes.delete(page.next_token, soon())
    rest = snode.volumes.list_volumes(starting_token=page.next_token, max_entries=0, deadline=soon())
    assert [entry.volume.volume_id for entry in rest.entries] == ids[2:]
    assert rest.next_token == ""
    exact = snode.volumes.list_volumes(starting_token=ids[1], max_entries=4, deadline=soon())
    assert exact.next_token == ""
    with pytest.raises(Stale, match="starting_token"):
        snode.volumes.list_volumes(starting_token="x", max_entries=0, deadline=soon())


def test_local_pools_are_tied_to_their_node(snode: Snode) -> None:
    pool = snode.volumes._pools.by_name["files"]
    snode.volumes._pools.by_name = {"files": type(pool)(pool.backend, pool.export, local_to="c1")}
    assert snode.volumes.topology_of(snode.create("a")) == {TOPOLOGY_NODE: "c1"}
    with pytest.raises(NoSpace, match="accessibility_requirements"):
        snode.volumes.create(
            name="b", required_bytes=0, limit_bytes=0, capabilities=[WRITER], parameters={},
            requisite=[{TOPOLOGY_NODE: "c2"}], deadline=soon(),
        )  # fmt: skip
    here = snode.volumes.capacity(parameters={}, topology={TOPOLOGY_NODE: "c1"}, capabilities=[], deadline=soon())
    there = snode.volumes.capacity(parameters={}, topology={TOPOLOGY_NODE: "c2"}, capabilities=[], deadline=soon())
    assert here.available_bytes > 0
    assert there.available_bytes == 0
    with pytest.raises(InUse, match="local to node c1"):
        snode.publish(snode.create("a").volume_id, snode.other)


def test_one_request_a_volume_at_a_time(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        try:
            snode.publish(volume_id)
            outcomes.append("ok")
        except Busy:
            outcomes.append("busy")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"ok", "busy"}
    assert "ok" in outcomes
    assert len(snode.targets()) == 1


def test_a_restarted_tgtd_gets_its_targets_back(snode: Snode, tgtd: FakeTgtd) -> None:
    for name in "abc":
        snode.publish(snode.create(name).volume_id)
    before = snode.targets()
    tgtd.restart()
    assert snode.targets() == set()
    snode.volumes.tend(soon())
    assert snode.targets() == before
    assert tgtd.state == "ready"


def test_a_fenced_node_stays_out_while_the_background_runs(snode: Snode, tgtd: FakeTgtd) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    tgtd.fail("target-delete")
    with pytest.raises(DriverError):
        snode.unpublish(volume_id, snode.node)
    (publication,) = snode.publications.of(volume_id)
    assert publication.revoked
    snode.volumes.tend(soon())
    assert snode.targets() == set()
    with pytest.raises(InUse):
        snode.volumes.delete(volume_id, soon())
    snode.publish(volume_id, snode.other)
    assert [p.node.name for p in snode.publications.of(volume_id)] == ["c2"]


def test_a_damaged_record_costs_its_volume_only(snode: Snode, tmp_path: Path) -> None:
    one, two = snode.create("a").volume_id, snode.create("b").volume_id
    snode.publish(one)
    (record,) = (tmp_path / "state" / "publications").glob("*.json")
    record.write_bytes(record.read_bytes()[:40])
    before = snode.targets()
    snode.start()
    with pytest.raises(DataLoss, match="damaged"):
        snode.publish(one, snode.other)
    snode.publish(two)
    snode.volumes.tend(soon())
    assert before <= snode.targets()
    assert any("damaged" in problem for problem in snode.volumes._publishing.record_problems())


def test_a_pool_that_fell_out_of_the_settings_costs_no_node_its_target(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    before = snode.targets()
    pool = snode.volumes._pools.by_name["files"]
    snode.volumes._pools.by_name = {"other": pool}
    snode.volumes.tend(soon())
    assert snode.targets() == before
    assert any("pool files" in problem for problem in snode.volumes._publishing.record_problems())
    with pytest.raises(InUse, match="put it back"):
        snode.unpublish(volume_id)


def test_limit_of_volumes_for_each_node(snode: Snode) -> None:
    snode.volumes._publishing._max_per_node = 1
    one, two = snode.create("a").volume_id, snode.create("b").volume_id
    snode.publish(one)
    snode.publish(one)
    with pytest.raises(NoSpace, match="max_volumes"):
        snode.publish(two)
    snode.publish(two, snode.other)


def _make_ext4(path: Path) -> None:
    """As a node's mkfs does."""
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)


def test_one_broken_pool_beside_others_does_not_stop_the_service(snode: Snode, tmp_path: Path) -> None:
    pool = snode.volumes._pools.by_name["files"]
    broken = FilesBackend("broken", directory=tmp_path / "broken", state=tmp_path / "state" / "broken")
    snode.volumes._pools.by_name = {"files": pool, "broken": Pool(broken, pool.export)}
    (tmp_path / "broken").rmdir()
    (tmp_path / "broken").write_text("not a folder")
    export_problems = pool.export.problems(soon())
    assert snode.volumes.problems(soon()) == export_problems
    snode.volumes._pools.by_name = {"broken": Pool(broken, pool.export)}
    assert len(snode.volumes.problems(soon())) > len(export_problems)


class Broken:
    """A backend whose pool can't be read."""

    pool = "broken"

    def __getattr__(self, _name: str) -> object:
        def fail(*_: object, **__: object) -> object:
            raise Unavailable("pool broken: its disk does not answer")

        return fail


@pytest.mark.parametrize("order", [["broken", "files"], ["files", "broken"]])
def test_a_dead_pool_does_not_touch_the_volumes_of_the_others(snode: Snode, order: list[str]) -> None:
    volume_id = snode.create().volume_id
    pool = snode.volumes._pools.by_name["files"]
    both = {"files": pool, "broken": Pool(Broken(), pool.export)}  # type: ignore[arg-type]
    snode.volumes._pools.by_name = {name: both[name] for name in order}
    snode.publish(volume_id)
    snode.volumes.expand(volume_id, required_bytes=16 * MIB, limit_bytes=0, deadline=soon())
    assert snode.volumes.get(volume_id, soon()).volume.size_bytes == 16 * MIB
    snode.unpublish(volume_id)
    snode.volumes.delete(volume_id, soon())
    with pytest.raises(Unavailable):  # it may have a volume of that name
        snode.create("b")


def test_a_dead_disk_keeps_no_node_attached(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    pool = snode.volumes._pools.by_name["files"]
    snode.volumes._pools.by_name = {"files": Pool(Broken(), pool.export)}  # type: ignore[arg-type]
    snode.unpublish(volume_id, snode.node)
    assert snode.targets() == set()
    assert snode.publications.all() == []


def test_a_node_whose_record_was_lost_is_fenced_before_another_gets_the_volume(snode: Snode, tmp_path: Path) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    (before,) = snode.targets()
    for record in (tmp_path / "state" / "publications").glob("*.json"):
        record.unlink()
    snode.start()
    snode.publish(volume_id, snode.other)
    assert before not in snode.targets()
    assert len(snode.targets()) == 1


def test_unpublish_fences_a_node_whose_record_was_lost(snode: Snode, tmp_path: Path) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    for record in (tmp_path / "state" / "publications").glob("*.json"):
        record.unlink()
    snode.start()
    snode.unpublish(volume_id, snode.node)
    assert snode.targets() == set()


def test_a_damaged_record_does_not_stop_the_restoration_of_the_others(
    snode: Snode, tgtd: FakeTgtd, tmp_path: Path
) -> None:
    one, two = snode.create("a").volume_id, snode.create("b").volume_id
    snode.publish(one)
    snode.publish(two)
    (record,) = (tmp_path / "state" / "publications").glob(f"{one}.*.json")
    record.write_bytes(b"")
    snode.start()
    tgtd.restart()
    snode.volumes.tend(soon())
    assert [name.split(":")[1] for name in snode.targets()] == [two]
    snode.unpublish(one)
    snode.publish(one, snode.other)
    assert len(snode.targets()) == 2


def test_a_full_state_folder_does_not_keep_a_node_attached(snode: Snode, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)

    def full(*_: object, **__: object) -> None:
        raise NoSpace("no space for the record")

    monkeypatch.setattr(RecordStore, "write", full)
    snode.unpublish(volume_id, snode.node)
    assert snode.targets() == set()
    assert snode.publications.all() == []


def test_a_publication_over_another_protocol_is_not_forgotten(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    snode.publish(volume_id)
    pool = snode.volumes._pools.by_name["files"]
    snode.volumes._pools.by_name = {"files": Pool(pool.backend, NoExport(), local_to="c1")}
    for action in (lambda: snode.unpublish(volume_id), lambda: snode.publish(volume_id)):
        with pytest.raises(InUse, match="over iscsi"):
            action()
    assert len(snode.targets()) == 1


def test_memory_holds_what_the_disk_holds_after_a_failed_sync(snode: Snode, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_id = snode.create().volume_id

    def fail(_self: RecordStore) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "_sync_folder", fail)
        with pytest.raises(Unavailable):
            snode.publish(volume_id)
    with pytest.raises(InUse, match="published to node c1"):
        snode.publish(volume_id, snode.other)
    snode.unpublish(volume_id)
    snode.start()
    assert snode.publications.all() == []


def test_limits_hold_when_many_publish_at_once(snode: Snode) -> None:
    snode.volumes._publishing._max_per_node = 2
    volumes = [snode.create(f"v{n}").volume_id for n in range(8)]
    barrier = threading.Barrier(8)

    def work(volume_id: str) -> None:
        barrier.wait()
        with contextlib.suppress(NoSpace):
            snode.publish(volume_id)

    threads = [threading.Thread(target=work, args=(volume_id,)) for volume_id in volumes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(snode.publications.all()) == 2


def test_an_existing_volume_out_of_reach_is_a_conflict(snode: Snode) -> None:
    snode.create()
    pool = snode.volumes._pools.by_name["files"]
    snode.volumes._pools.by_name = {"files": Pool(pool.backend, pool.export, local_to="c1")}
    with pytest.raises(Conflict, match="local to node c1"):
        snode.volumes.create(
            name="a", required_bytes=8 * MIB, limit_bytes=0, capabilities=[WRITER], parameters={},
            requisite=[{TOPOLOGY_NODE: "c2"}], deadline=soon(),
        )  # fmt: skip


def test_a_key_that_nothing_can_be_sealed_to_leaves_no_publication(snode: Snode) -> None:
    volume_id = snode.create().volume_id
    evil = NodeId(name="evil", public_key="A" * 43, initiator="iqn.1993-08.org.debian:01:evil")
    with pytest.raises(Invalid, match="key"):
        snode.publish(volume_id, evil)
    assert snode.publications.all() == []
    assert snode.targets() == set()


def test_commands_of_one_life_on_lvm(tmp_path: Path, tgtd: FakeTgtd) -> None:
    """CreateVolume is one LVM command; publish and unpublish start no process at all."""
    snode = Snode(tmp_path / "snode", tgtd, kind="lvm")
    snode.create("warm")  # the first one reads the volume group once
    assert snode.lvm is not None

    def commands(action: Callable[[], object]) -> list[str]:
        before = len(snode.runner.calls)
        action()
        return [call[1] if call[0] == "lvm" else call[0] for call in snode.runner.calls[before:]]

    ids: list[str] = []
    assert commands(lambda: ids.append(snode.create().volume_id)) == ["lvcreate"]
    assert commands(snode.create) == []
    assert commands(lambda: snode.publish(ids[0])) == []
    assert commands(lambda: snode.publish(ids[0])) == []
    assert commands(lambda: snode.unpublish(ids[0])) == []
    assert commands(lambda: snode.publish(ids[0], snode.other)) == []
    assert commands(lambda: snode.unpublish(ids[0], snode.other)) == []
