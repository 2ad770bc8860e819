"""publish_context: what the controller writes, the node reads; anything else is refused by the key's name."""

from pathlib import Path

import pytest

from csi import publish_context
from csi.errors import Invalid
from csi.model import AccessMode, Capability, Chap, IscsiPath, NodeId, Publication, scsi_id_of
from csi.records import RecordStore
from csi.sealing import NodeKey

VOLUME_ID = "v-" + "a" * 26


@pytest.fixture
def key(tmp_path: Path) -> NodeKey:
    return NodeKey.load(RecordStore(tmp_path))


@pytest.fixture
def publication(key: NodeKey) -> Publication:
    return Publication(
        volume_id=VOLUME_ID,
        pool="fast",
        node_id=str(NodeId(name="c1", public_key=key.public, initiator="iqn.1993-08.org.debian:01:c1")),
        protocol="iscsi",
        nonce="0123456789abcdef",
        tid=5,
        device=Path("/dev/vg/x"),
        size_bytes=1 << 30,
        readonly=False,
        capability=Capability(AccessMode.SINGLE_NODE_WRITER),
        chap=Chap("n1", "s" * 32, "t1", "m" * 32),
    )


def _decode(key: NodeKey, publication: Publication, context: dict[str, str]):  # type: ignore[no-untyped-def]
    def open_sealed(sealed: str) -> Chap:
        return key.open(sealed, bound_to=publish_context.binding(VOLUME_ID, publication.node_id, context))

    return publish_context.decode(VOLUME_ID, context, open_sealed=open_sealed)


def test_iscsi_round_trip(key: NodeKey, publication: Publication) -> None:
    paths = (IscsiPath(publication.target, "10.0.0.1:3260", 1), IscsiPath(publication.target, "[fd00::1]:3260", 1))
    context = publish_context.encode(publication, protocol="iscsi", paths=paths, may_format=True)
    assert sum(len(k) + len(v) for k, v in context.items()) < 4096
    assert publication.chap.secret not in str(context)
    attachment = _decode(key, publication, context)
    assert attachment.paths == paths
    assert attachment.chap == publication.chap
    assert attachment.scsi_id == scsi_id_of(VOLUME_ID)
    assert (attachment.may_format, attachment.readonly, attachment.size_bytes) == (True, False, 1 << 30)


def test_loop_round_trip(key: NodeKey, publication: Publication) -> None:
    context = publish_context.encode(publication, protocol="loop", paths=(), may_format=False)
    attachment = _decode(key, publication, context)
    assert (attachment.protocol, attachment.file, attachment.chap) == ("loop", Path("/dev/vg/x"), None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", ""), ("format", "2"), ("protocol", "nfs"), ("protocol", ""), ("generation", ""),
     ("size_bytes", "-1"),
     ("size_bytes", "1e3"), ("size_bytes", "٣"), ("size_bytes", "9" * 30), ("readonly", "yes"), ("may_format", "True"),
     ("scsi_id", ""), ("paths", "x"), ("paths", "[]"), ("paths", "[{}]"), ("paths", "{}"), ("sealed", ""),
     ("sealed", "xx"), ("access_type", ""), ("access_type", "raw"),
     ("generation", "fedcba9876543210"), ("may_format", "false"), ("readonly", "true"), ("size_bytes", "5"),
     ("scsi_id", "6" + "0" * 31), ("access_type", "block"), ("more", "x"),
     ("paths", '[{"target": "iqn.x", "portal": "192.0.2.9:3260", "lun": 1}]')],
)  # fmt: skip
def test_other_values_are_refused_by_name(key: NodeKey, publication: Publication, field: str, value: str) -> None:
    paths = (IscsiPath(publication.target, "10.0.0.1:3260", 1),)
    context = publish_context.encode(publication, protocol="iscsi", paths=paths, may_format=True)
    with pytest.raises(Invalid, match=r"publish_context\."):
        _decode(key, publication, context | {field: value})
