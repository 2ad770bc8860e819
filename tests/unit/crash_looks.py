"""What fakes have, in the words of the lab's invariants (tests/lab/invariants.py), so that both grounds share these."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from csi.fs.mountinfo import parse
from csi.publications import Publications
from tests.fakes.tgt import FakeTgtd
from tests.lab.invariants import Cnode, Session, Snode, Target, volume_of
from tests.model import cnode as model


def look_at_snode(
    tgtd: FakeTgtd,
    publications: Publications,
    *,
    volumes: Mapping[str, int],
    tags: Mapping[str, str],
    notes: frozenset[str] = frozenset(),
) -> Snode:
    """volumes: their sizes in bytes. tags: what says that they are ours. notes: volumes with a note about them."""
    with tgtd.guard:
        targets = {target.name: target for target in tgtd.targets.values()}
        return Snode(
            volumes=volumes,
            tags=tags,
            targets={
                name: Target(
                    name,
                    initiators=[session.initiator for session in target.sessions if session.connected],
                    readonly=target.luns[1].readonly,
                    device=target.luns[1].path,
                    allowed=[*target.names, *target.addresses],
                )
                for name, target in targets.items()
                if volume_of(name)
            },
            accounts=frozenset(tgtd.accounts),
            publications=[
                json.loads(json.dumps(asdict(publication), default=str)) for publication in publications.all()
            ],
            notes=notes,
        )


def look_at_cnode(node: "model.Cnode") -> Cnode:
    """What a CNODE has now."""
    initiator = node.initiator
    sessions = [
        Session(
            session.target,
            "LOGGED_IN" if initiator.alive(number) else "FAILED",
            {disk.name: (disk.unit / "block" / disk.name / "dev").read_text().strip() for disk in session.disks},
        )
        for number, session in initiator.sessions.items()
    ]
    points = set(node.mounts.mount_points())
    names = [name for name in node.records.names() if name.startswith("v-")]
    return Cnode(
        name=node.name,
        sessions=sessions,
        database=frozenset(part for path in initiator.database.rglob("*") for part in path.parts if volume_of(part)),
        mounts=[mount for mount in parse(node.mounts.table.read_bytes()) if mount.mount_point in points],
        records={name: node.records.read(name) or {} for name in names},
    )


def folder_of(node: "model.Cnode") -> list[str]:
    """What lies below the folder where a CNODE mounts."""
    return sorted(path.relative_to(node.root).as_posix() for path in Path(node.root).rglob("*"))
