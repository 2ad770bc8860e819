"""The invariants themselves: each breach is seen, and a cluster in order has none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csi.fs.mountinfo import parse
from csi.model import TARGET_PREFIX

from .invariants import Cnode, Session, Snode, Target, problems_of

VOLUME = f"v-{'a' * 26}"
DEVICE = f"/dev/vg0/{VOLUME}"
NAME = f"{TARGET_PREFIX}:{VOLUME}:0011"
PATHS = ("/var/lib/kubelet/staging/a", "/var/lib/kubelet/target/a")


def publication(nonce: str = "0011", node: str = "one", **changes: Any) -> dict[str, Any]:
    return {
        "volume_id": VOLUME,
        "nonce": nonce,
        "node_id": f"1;{node};key;iqn.{node}",
        "device": DEVICE,
        "readonly": False,
        "revoked": False,
        "capability": {"access_mode": "SINGLE_NODE_WRITER"},
        "chap": {"user": f"n{nonce}", "mutual_user": f"t{nonce}"},
        **changes,
    }


def target(name: str = NAME, *, node: str = "one") -> Target:
    return Target(name, [f"iqn.{node}"], False, DEVICE, [f"iqn.{node}"])


SNODE = Snode(
    volumes={VOLUME: 1 << 24},
    tags={VOLUME: "snode.format=1,snode.name=YQ=="},
    targets={NAME: target()},
    accounts=frozenset({"n0011", "t0011"}),
    publications=[publication()],
    notes=frozenset({VOLUME}),
)
CNODE = Cnode(
    name="one",
    sessions=[Session(NAME, "LOGGED_IN", {"sda": "8:0"})],
    database=frozenset({NAME}),
    mounts=parse("\n".join(f"40 39 8:0 / {path} rw - ext4 /dev/sda rw" for path in PATHS).encode()),
    records={VOLUME: {"staged": {PATHS[0]: {}}, "targets": {PATHS[1]: {}}}},
)
OTHER = f"{TARGET_PREFIX}:{VOLUME}:0022"


def test_a_cluster_in_order() -> None:
    assert problems_of(SNODE, [CNODE]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tags": {VOLUME: "snode.format=1"}}, "no record in its tags"),
        ({"notes": frozenset({"v-gone"})}, "a note is left of v-gone"),
        ({"volumes": {}, "tags": {}, "notes": frozenset()}, "is published and does not exist"),
        ({"publications": [], "accounts": frozenset()}, "without a publication"),
        ({"publications": [publication(revoked=True)], "accounts": frozenset()}, "without a publication"),
        ({"targets": {}}, "no target for publication"),
        ({"accounts": frozenset({"n0011"})}, "['t0011'] missing"),
        ({"accounts": SNODE.accounts | {"n0033"}}, "['n0033'] too many"),
        ({"targets": {NAME: replace(target(), device="/dev/vg0/other")}}, "offers /dev/vg0/other"),
        ({"targets": {NAME: replace(target(), readonly=True)}}, "readonly True"),
        ({"targets": {NAME: replace(target(), allowed=["iqn.two"])}}, "lets in ['iqn.two']"),
        ({"targets": {NAME: replace(target(), initiators=["iqn.one", "iqn.two"])}}, "several nodes can write"),
    ],
)
def test_breaches_on_the_snode(changes: dict[str, Any], words: str) -> None:
    assert any(words in problem for problem in problems_of(replace(SNODE, **changes), []))


@pytest.mark.parametrize(
    ("mode", "fine"),
    [("SINGLE_NODE_WRITER", False), ("MULTI_NODE_MULTI_WRITER", True)],
)
def test_two_publications(mode: str, fine: bool) -> None:
    capability = {"access_mode": mode}
    two = replace(
        SNODE,
        targets={NAME: target(), OTHER: target(OTHER, node="two")},
        accounts=frozenset({"n0011", "t0011", "n0022", "t0022"}),
        publications=[publication(capability=capability), publication("0022", "two", capability=capability)],
    )
    found = problems_of(two, [])
    assert (found == []) == fine
    assert fine or ("granted to several nodes" in found[0] and "several nodes can write" in found[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"records": {}}, [f"session {NAME}, not staged", f"remembers {NAME}", "is not on record", "is not on record"]),
        ({"records": {VOLUME: {"staged": {PATHS[0]: {}}}}}, [f"{PATHS[1]}, which is not on record"]),
        ({"sessions": []}, ["is gone", "is gone"]),
        ({"mounts": [], "sessions": [], "database": frozenset()}, []),
    ],
)
def test_breaches_on_a_cnode(changes: dict[str, Any], words: list[str]) -> None:
    found = problems_of(None, [replace(CNODE, **changes)])
    assert len(found) == len(words)
    assert all(word in problem for word, problem in zip(words, found, strict=True)), found


def test_paths_on_record() -> None:
    assert CNODE.paths(VOLUME) == {Path(path) for path in PATHS}
