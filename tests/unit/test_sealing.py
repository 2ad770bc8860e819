"""Only the node that a secret was sealed for opens it, and only for that publication."""

from pathlib import Path

import pytest

from csi.errors import Invalid
from csi.model import Chap
from csi.records import RecordStore
from csi.sealing import NodeKey, seal

CHAP = Chap(user="n1", secret="s" * 32, mutual_user="t1", mutual_secret="m" * 32)


@pytest.fixture
def key(tmp_path: Path) -> NodeKey:
    return NodeKey.load(RecordStore(tmp_path / "a"))


def test_round_trip(key: NodeKey) -> None:
    sealed = seal(CHAP, public_key=key.public, bound_to="v n g")
    assert key.open(sealed, bound_to="v n g") == CHAP
    assert len(sealed) < 500
    assert CHAP.secret not in sealed


def test_two_seals_of_one_secret_differ(key: NodeKey) -> None:
    assert seal(CHAP, public_key=key.public, bound_to="x") != seal(CHAP, public_key=key.public, bound_to="x")


def test_another_publication_or_node_or_damage_is_refused(key: NodeKey, tmp_path: Path) -> None:
    sealed = seal(CHAP, public_key=key.public, bound_to="v n g")
    other = NodeKey.load(RecordStore(tmp_path / "b"))
    changed = ("A" if sealed[60] != "A" else "B").join([sealed[:60], sealed[61:]])
    for who, what, bound in (
        (key, sealed, "v n other"), (other, sealed, "v n g"), (key, changed, "v n g"),
        (key, "", "v n g"), (key, "€", "v n g"), (key, sealed[:40], "v n g"), (key, "A" * 300, "v n g"),
    ):  # fmt: skip
        with pytest.raises(Invalid, match=r"publish_context\.sealed"):
            who.open(what, bound_to=bound)


def test_key_is_kept(tmp_path: Path) -> None:
    first = NodeKey.load(RecordStore(tmp_path))
    assert NodeKey.load(RecordStore(tmp_path)).public == first.public
    assert len(first.public) == 43


def test_secrets_are_not_in_the_repr() -> None:
    assert CHAP.secret not in repr(CHAP)
    assert CHAP.mutual_secret not in repr(CHAP)
