"""How many processes a stage starts, on the fakes: each costs tens of milliseconds, on a busy node many more."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from csi.fs.format import Filesystems
from csi.fs.mounts import Mounts
from csi.locks import VolumeLocks
from csi.model import AccessMode, Attachment, Capability
from csi.records import RecordStore
from csi.run import step_name
from csi.sealing import NodeKey
from csi.staging import Staging
from tests.fakes.iscsi import FakeIscsi
from tests.fakes.mounts import FakeDisk, FakeMounts
from tests.fakes.runner import FakeRunner
from tests.unit.snode import soon

pytestmark = pytest.mark.root  # device nodes

VOLUME = "v-" + "a" * 26
#: What attaching takes: record, login, scan. Where it is attached already: a rescan, which asks the disk for its size.
ATTACH = ["iscsiadm", "iscsiadm", "attribute_helper"]
ATTACHED = ["attribute_helper"]


class Opened(Staging):
    """Attaches what the fake SNODE has published, without a context that would have to be sealed."""

    published: Attachment

    def _open_context(self, volume_id: str, context: Mapping[str, str]) -> Attachment:
        return self.published


class Node:
    """A CNODE with one published volume."""

    def __init__(self, folder: Path) -> None:
        (folder / "kernel").mkdir()
        self.path = folder / "staging"
        self.iscsi = FakeIscsi(folder / "kernel")
        self.mounts = FakeMounts(folder, find_disk=self._find_disk)
        self.runner = self.iscsi.runner = FakeRunner({**self.iscsi.runner.programs, **self.mounts.programs})
        self._published = self.iscsi.publish(VOLUME)
        records = RecordStore(folder / "records")
        self._staging = Opened(
            [self.iscsi.connector()],
            filesystems=Filesystems(self.runner),
            mounts=Mounts(self.runner, table=self.mounts.table, number_of=self.mounts.number_of),
            records=records,
            locks=VolumeLocks(folder / "locks"),
            key=NodeKey.load(records),
            name="c1",
            read_initiator=lambda: "",
            target_roots=[],
        )
        self._staging.published = self._published

    def stage(self, fs_type: str) -> list[str]:
        """Stage; returns the programs that ran."""
        before = len(self.runner.calls)
        self._staging.stage(
            VOLUME,
            staging_path=self.path,
            capability=Capability(AccessMode.SINGLE_NODE_WRITER, fs_type=fs_type),
            publish_context={},
            deadline=soon(),
        )
        return [step_name(call) for call in self.runner.calls[before:]]

    def unstage(self) -> None:
        self._staging.unstage(VOLUME, staging_path=self.path, deadline=soon())

    def grow(self, size_bytes: int) -> None:
        self.iscsi.lun_of(self._published).size_bytes = size_bytes

    def fs_bytes(self) -> int:
        return self.mounts.on("volume").fs_bytes

    def _find_disk(self, path: Path) -> FakeDisk | None:
        folder = self.iscsi.sysfs / "block" / path.name
        if not folder.exists():
            return None
        number, size = (folder / "dev").read_text().strip(), int((folder / "size").read_text())
        return FakeDisk("volume", number, size * 512)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.iscsi.close()


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_new_volume(node: Node, fs_type: str) -> None:
    assert node.stage(fs_type) == [*ATTACH, "look_helper", f"mkfs.{fs_type}", "mount"]


@pytest.mark.parametrize(
    ("fs_type", "expected"),
    [
        ("ext4", ["look_helper", "e2fsck", "mount"]),
        ("xfs", ["look_helper", "mount"]),
        ("btrfs", ["look_helper", "mount"]),
    ],
)
def test_a_volume_that_has_a_filesystem(
    node: Node, fs_type: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.fs.grow.may_grow_mounted_ext4", lambda: False)
    node.stage(fs_type)
    node.unstage()
    assert node.stage(fs_type) == [*ATTACH, *expected]


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("may_grow_mounted", [True, False])
def test_a_volume_that_has_grown(
    node: Node, fs_type: str, may_grow_mounted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.fs.grow.may_grow_mounted_ext4", lambda: may_grow_mounted)
    node.stage(fs_type)
    node.unstage()
    node.grow(2 << 30)
    node.stage(fs_type)
    assert node.fs_bytes() == 2 << 30


def test_a_growth_that_was_killed_after_the_mount_is_made_good(node: Node) -> None:
    node.stage("xfs")
    node.unstage()
    node.grow(2 << 30)
    node.runner.fail("xfs_growfs")
    with pytest.raises(Exception, match="injected"):
        node.stage("xfs")
    assert node.stage("xfs") == [*ATTACHED, "xfs_growfs"]
    assert node.fs_bytes() == 2 << 30
