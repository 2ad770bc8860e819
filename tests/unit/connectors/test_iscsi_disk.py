import dataclasses

import pytest

from csi.deadline import Deadline
from csi.errors import DataLoss, InUse, NotFound, Timeout, Unavailable
from tests.fakes.iscsi import FakeIscsi

V = "v-" + "a" * 26
OTHER = "v-" + "b" * 26
NEW = "00000000000000ff"


def test_disk_that_appears_late(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.lun_of(attachment).after_scans = 2
    assert node.connector().connect(attachment, deadline).path == node.dev / "sda"


def test_disk_that_never_appears(node: FakeIscsi) -> None:
    attachment = node.publish(V)
    node.targets[attachment.paths[0].target].lun = None
    with pytest.raises(Unavailable, match="LUN 1 shows no disk"):
        node.connector().connect(attachment, Deadline.after(4))
    assert node.leftovers() == []


def test_unit_that_is_no_disk_is_forgotten_and_looked_for_again(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.lun_of(attachment).kind = "12"
    connector = node.connector()
    with pytest.raises(Unavailable):
        connector.connect(attachment, Deadline.after(4))
    node.lun_of(attachment).kind = "0"
    assert connector.connect(attachment, deadline)


def test_disk_without_its_node_is_not_used(node: FakeIscsi) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, Deadline.after(5))
    (node.dev / "sda").unlink()
    with pytest.raises(Unavailable, match="host's /dev"):
        connector.connect(attachment, Deadline.after(0.5))


def test_foreign_disk_is_refused_and_detached(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.lun_of(attachment).scsi_id = "6" + "1" * 31
    with pytest.raises(DataLoss, match=r"another disk.*naa.6111"):
        node.connector().connect(attachment, deadline)
    assert node.leftovers() == []


def test_lun_swapped_under_a_session_is_noticed(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, deadline)
    node.lun_of(attachment).scsi_id = "6" + "1" * 31
    with pytest.raises(DataLoss):
        connector.rescan(V, size_bytes=1, deadline=deadline)
    with pytest.raises(DataLoss):
        connector.connect(attachment, deadline)


def test_identity_is_asked_of_the_disk_not_of_the_cache(
    node: FakeIscsi, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "names", lambda _path: frozenset({"naa.6" + "2" * 31}))
    with pytest.raises(DataLoss):
        node.connector().connect(node.publish(V), deadline)


def test_size_may_be_larger_than_the_context_says_but_not_smaller(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    node.lun_of(attachment).size_bytes += 1 << 20
    assert connector.connect(attachment, deadline).size_bytes == attachment.size_bytes + (1 << 20)
    connector.disconnect(V, deadline)
    node.lun_of(attachment).size_bytes = attachment.size_bytes - 512
    with pytest.raises(DataLoss, match="bytes"):
        connector.connect(attachment, deadline)
    assert node.leftovers() == []


@pytest.mark.parametrize("readonly", [True, False])
def test_write_protection_must_be_as_published(node: FakeIscsi, deadline: Deadline, readonly: bool) -> None:
    attachment, connector = node.publish(V, readonly=readonly), node.connector()
    assert connector.connect(attachment, deadline)
    with pytest.raises(Unavailable, match="publish it again"):
        connector.connect(dataclasses.replace(attachment, readonly=not readonly), deadline)


def test_multipath_that_took_the_disk_is_named(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, deadline)
    node.add_holder("sda", name="dm-3", uuid="mpath-36001", label="mpatha")
    with pytest.raises(InUse, match=r"dm-3 \(mpatha\).*blacklist"):
        connector.connect(attachment, deadline)


def test_rescan_waits_for_the_new_size(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    connector.connect(attachment, deadline)
    with pytest.raises(Timeout, match="2147483648 bytes"):
        connector.rescan(V, size_bytes=2 << 30, deadline=Deadline.after(0.5))
    node.lun_of(attachment).size_bytes = 2 << 30
    assert connector.rescan(V, size_bytes=2 << 30, deadline=deadline).size_bytes == 2 << 30
    with pytest.raises(NotFound):
        connector.rescan(OTHER, size_bytes=1, deadline=deadline)
