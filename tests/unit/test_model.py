"""Ids and names: the grammars that keep the caller's text out of command lines and paths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import Invalid
from csi.model import VOLUME_ID, NodeId, parse_portal, scsi_id_of, volume_id_of

KEY = "k" * 43
IQN = "iqn.1993-08.org.debian:01:abcdef"


@given(st.text(min_size=1, max_size=128))
def test_every_name_gives_an_id_of_our_grammar(name: str) -> None:
    volume_id = volume_id_of(name)
    assert VOLUME_ID.fullmatch(volume_id)
    assert volume_id == volume_id_of(name)
    scsi_id = scsi_id_of(volume_id)
    assert len(scsi_id) == 32
    assert scsi_id[0] == "6"
    int(scsi_id, 16)


def test_identities_of_many_volumes_differ() -> None:
    ids = {volume_id_of(f"pvc-{n}") for n in range(100_000)}
    assert len(ids) == 100_000
    assert len({scsi_id_of(volume_id) for volume_id in ids}) == 100_000


def test_node_id_round_trip_within_the_limit_of_csi() -> None:
    node = NodeId(name="n" * 63, public_key=KEY, initiator=IQN)
    assert NodeId.parse(str(node)) == node
    assert len(str(node)) <= 192
    assert NodeId.parse("1;a;;") == NodeId(name="a")


def test_a_node_id_that_csi_can_not_carry_is_a_problem_with_its_repair() -> None:
    longest = NodeId(name="node-a", public_key=KEY, initiator="iqn.2004-01.com.x:".ljust(139, "y"))
    assert (len(str(longest)), longest.problem()) == (192, "")
    node = NodeId(name="node-a", public_key=KEY, initiator="iqn.2004-01.com.x:".ljust(223, "y"))
    assert node.problem() == (
        "the node id of node-a has 276 bytes, CSI allows 192 -> shorten node.name (6 bytes) or the initiator name "
        "(223 bytes) by 84 bytes"
    )


@pytest.mark.parametrize(
    ("text", "portal"),
    [
        ("192.0.2.10:3260", ("192.0.2.10", 3260)),
        ("[2001:DB8::0:10]:1", ("2001:db8::10", 1)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_a_portal(text: str, portal: tuple[str, int]) -> None:
    assert parse_portal(text) == portal


@given(st.text(alphabet="0123456789abf.:[]% \n", max_size=30))
def test_any_text_is_a_portal_or_refused(text: str) -> None:
    try:
        address, port = parse_portal(text)
    except Invalid:
        return
    again = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    assert parse_portal(again) == (address, port)


@pytest.mark.parametrize(
    "text",
    ["", "node", "2;a;;", "1;a;", "1;A;;", "1;a/b;;", "1;-a;;", f"1;a;{KEY}k;", "1;a;;iqn.x", "1;a;;iqn.2026-11.a,b",
     f"1;a;{KEY};{IQN}\n", "1;a\n;;", "1;a;;" + "iqn.2026-11." + "a" * 200, "1;é;;"],
)  # fmt: skip
def test_other_node_ids_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="node_id"):
        NodeId.parse(text)


@given(st.text(max_size=200))
def test_any_text_is_a_node_id_or_refused(text: str) -> None:
    try:
        node = NodeId.parse(text)
    except Invalid:
        return
    assert str(node) == text
