"""What must hold in a cluster whenever no request is under way, whatever happened before.

    problems = invariants.check(cluster)            # [] = all holds

The volumes that LVM has are those on record, tgtd has a target for each publication and nothing else, a CNODE has
sessions of staged volumes only and mounts at paths on record only, and at most one node writes a single-node volume.
Some of it the background makes true: `check` looks again until its `seconds` are over. What is switched off, or hangs,
is left out.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csi.fs.mountinfo import Mount, parse
from csi.model import TARGET_PREFIX

from .cluster import Cluster, Machine

#: Where the tests' CNODEs mount volumes; the same mounts show a second time in /var/keep, by propagation.
ROOT = Path("/var/lib/kubelet")
_SNODE = r"""
echo '#volumes'; lvs --noheadings --separator=' ' --units=b --nosuffix -o lv_name,lv_size,lv_tags 2>/dev/null
echo '#targets'; timeout 10 tgtadm --lld iscsi --op show --mode target |
    grep -E '^Target|Initiator:|Readonly:|Backing store path:|^    Account|^    ACL|^        [^ ]+( .outgoing.)?$'
echo '#accounts'; timeout 10 tgtadm --lld iscsi --op show --mode account
echo '#publications'; cat /var/lib/snode/publications/*.json 2>/dev/null
echo '#notes'; find /var/lib/snode/pools -path '*/creating/*.json' -o -path '*/used/*.json'
"""
_CNODE = r"""
echo '#sessions'
for s in /sys/class/iscsi_session/session*; do
    [ -e $s/targetname ] || continue
    disks=; for d in $s/device/target*/*/block/*; do [ -e $d/dev ] && disks+=" ${d##*/}=$(<$d/dev)"; done
    echo "$(<$s/targetname) $(<$s/state)$disks"
done 2>/dev/null
echo '#database'; find /etc/iscsi/nodes /var/lib/iscsi/nodes -type f 2>/dev/null
echo '#mounts'; grep -F ' /var/lib/kubelet/' /proc/self/mountinfo
echo '#records'; tail -vn +1 /var/lib/snode/node/v-*.json 2>/dev/null
true
"""


@dataclass
class Target:
    """A target of ours in tgtd: who has a session, which accounts may log in, and whether its LUN takes writes."""

    name: str
    initiators: list[str] = field(default_factory=list)
    readonly: bool = False
    device: str = ""
    allowed: list[str] = field(default_factory=list)

    @property
    def volume_id(self) -> str:
        """The volume that it offers."""
        return volume_of(self.name)


@dataclass(frozen=True)
class Snode:
    """What a SNODE has. `volumes`: sizes in bytes; `notes`: volumes with a note of their creation or use."""

    volumes: Mapping[str, int]
    tags: Mapping[str, str]
    targets: Mapping[str, Target]
    accounts: frozenset[str]
    publications: Sequence[Mapping[str, Any]]
    notes: frozenset[str]

    @property
    def granted(self) -> dict[str, Mapping[str, Any]]:
        """The publications that are not being ended, by target."""
        return {target_of(p): p for p in self.publications if not p["revoked"]}


@dataclass(frozen=True)
class Session:
    """An iSCSI session of a CNODE, and the numbers (8:0) of its disks by their names."""

    target: str
    state: str
    disks: Mapping[str, str]

    @property
    def volume_id(self) -> str:
        """The volume it is for."""
        return volume_of(self.target)


@dataclass(frozen=True)
class Cnode:
    """What a CNODE has. `database`: targets that open-iscsi remembers; `records`: what was staged and published."""

    name: str
    sessions: Sequence[Session]
    database: frozenset[str]
    mounts: Sequence[Mount]
    records: Mapping[str, Mapping[str, Any]]

    def paths(self, volume_id: str) -> set[Path]:
        """Where a volume may be mounted, by its record."""
        record = self.records.get(volume_id, {})
        return {Path(path) for kind in ("staged", "targets") for path in record.get(kind, ())}


def check(cluster: Cluster, *, seconds: float = 20.0) -> list[str]:
    """What does not hold, a sentence each. The background gets so many seconds to make it true."""
    end = time.monotonic() + seconds
    while problems := look(cluster):
        if time.monotonic() >= end:
            break
        time.sleep(0.2)
    return problems


def look(cluster: Cluster) -> list[str]:
    """What does not hold in this moment."""
    snode = look_at_snode(cluster.snode) if cluster.snode.guest.alive else None
    cnodes = [look_at_cnode(machine) for machine in cluster.cnodes if machine.guest.alive]
    return problems_of(snode, cnodes)


def problems_of(snode: Snode | None, cnodes: Sequence[Cnode]) -> list[str]:
    """What does not hold of what was seen."""
    found = [*volumes_on_record(snode), *targets_published(snode), *one_writer(snode)] if snode else []
    for cnode in cnodes:
        found += [*sessions_staged(cnode), *mounts_published(cnode)]
    return found


# -- what must hold ----------------------------------------------------------------------------------------------


def volumes_on_record(snode: Snode) -> list[str]:
    """Every volume has its tags, and every note and publication its volume."""
    found = [
        f"volume {name} has no record in its tags" for name, tags in snode.tags.items() if "snode.name=" not in tags
    ]
    found += [f"a note is left of {name}, which does not exist" for name in snode.notes - snode.volumes.keys()]
    published = {str(p["volume_id"]) for p in snode.publications}
    return found + [f"{name} is published and does not exist" for name in published - snode.volumes.keys()]


def targets_published(snode: Snode) -> list[str]:
    """tgtd has the targets and accounts of the publications, and no others; each offers its own volume."""
    wanted = snode.granted
    found = [f"target {name} without a publication" for name in snode.targets.keys() - wanted.keys()]
    found += [f"no target for publication {name}" for name in wanted.keys() - snode.targets.keys()]
    used = {p["chap"][key] for p in wanted.values() for key in ("user", "mutual_user")}
    if used != snode.accounts:
        found.append(
            f"accounts in tgtd: {sorted(snode.accounts - used)} too many, {sorted(used - snode.accounts)} missing"
        )
    for name in wanted.keys() & snode.targets.keys():
        target, publication = snode.targets[name], wanted[name]
        if target.device != publication["device"] or target.readonly != publication["readonly"]:
            found.append(
                f"target {name} offers {target.device}, readonly {target.readonly}; published is {publication}"
            )
        if target.allowed != [initiator_of(publication)]:
            found.append(f"target {name} lets in {target.allowed}, published to {initiator_of(publication)}")
    return found


def one_writer(snode: Snode) -> list[str]:
    """A volume that is not shared is granted to one node, and at most one is connected for writing."""
    found = []
    writers: dict[str, set[str]] = {}
    for volume_id in {str(p["volume_id"]) for p in snode.granted.values()}:
        modes = [p["capability"]["access_mode"] for p in snode.granted.values() if p["volume_id"] == volume_id]
        if len(modes) > 1 and (len(set(modes)) > 1 or not modes[0].startswith("MULTI_NODE")):
            found.append(f"{volume_id} is granted to several nodes: {modes}")
    for target in snode.targets.values():
        publication = snode.granted.get(target.name)
        shared = publication is not None and publication["capability"]["access_mode"] == "MULTI_NODE_MULTI_WRITER"
        if not target.readonly and not shared:
            writers.setdefault(target.volume_id, set()).update(target.initiators)
    return found + [f"several nodes can write {name}: {sorted(who)}" for name, who in writers.items() if len(who) > 1]


def sessions_staged(cnode: Cnode) -> list[str]:
    """Sessions, and what open-iscsi remembers, are of volumes that are staged."""
    found = [
        f"{cnode.name}: session {s.target}, not staged" for s in cnode.sessions if s.volume_id not in cnode.records
    ]
    left = sorted(target for target in cnode.database if volume_of(target) not in cnode.records)
    return found + [f"{cnode.name}: open-iscsi remembers {target}, not staged" for target in left]


def mounts_published(cnode: Cnode) -> list[str]:
    """What is mounted below ROOT is at a path on record, of a volume whose disk is still there."""
    found = []
    places = {path for volume_id in cnode.records for path in cnode.paths(volume_id)}
    disks = {number for session in cnode.sessions for number in session.disks.values()}
    for mount in cnode.mounts:
        if mount.mount_point not in places:
            found.append(f"{cnode.name}: {mount.source} is mounted at {mount.mount_point}, which is not on record")
        elif mount.fs_type not in ("devtmpfs", "btrfs") and mount.major_minor not in disks:  # these two have others
            found.append(f"{cnode.name}: the disk under {mount.mount_point} is gone")
    return found


# -- looks -------------------------------------------------------------------------------------------------------


def look_at_snode(machine: Machine) -> Snode:
    """What a SNODE has now."""
    parts = _parts(machine.guest.sh(_SNODE, 120))
    rows = [line.split() for line in parts["volumes"].splitlines()]
    volumes = {row[0]: (int(row[1]), row[2] if len(row) > 2 else "") for row in rows if row and row[0].startswith("v-")}
    return Snode(
        volumes={name: size_bytes for name, (size_bytes, _) in volumes.items()},
        tags={name: tags for name, (_, tags) in volumes.items()},
        targets=_targets(parts["targets"]),
        accounts=frozenset(re.findall(r"^ +([nt][0-9a-f]{16})$", parts["accounts"], re.MULTILINE)),
        publications=_documents(parts["publications"]),
        notes=frozenset(Path(line).stem for line in parts["notes"].splitlines()),
    )


def look_at_cnode(machine: Machine) -> Cnode:
    """What a CNODE has now."""
    parts = _parts(machine.guest.sh(_CNODE, 120))
    sessions = [line.split() for line in parts["sessions"].splitlines()]
    records = re.split(r"^==> .*/(\S+)\.json <==$", parts["records"], flags=re.MULTILINE)[1:]
    targets = {part for line in parts["database"].splitlines() for part in Path(line).parts}
    return Cnode(
        name=machine.guest.name,
        sessions=[Session(row[0], row[1], dict(disk.split("=") for disk in row[2:])) for row in sessions],
        database=frozenset(target for target in targets if target.startswith(f"{TARGET_PREFIX}:")),
        mounts=parse(parts["mounts"].encode()),
        records={name: _documents(text)[0] for name, text in zip(records[::2], records[1::2], strict=True)},
    )


def volume_of(target: str) -> str:
    """The volume that a target of ours is for; "" for a foreign name."""
    parts = target.split(":")
    return parts[1] if target.startswith(f"{TARGET_PREFIX}:") and len(parts) == 3 else ""


def target_of(publication: Mapping[str, Any]) -> str:
    """The target of a publication's record."""
    return f"{TARGET_PREFIX}:{publication['volume_id']}:{publication['nonce']}"


def initiator_of(publication: Mapping[str, Any]) -> str:
    """The initiator that a publication's record is for."""
    return str(publication["node_id"]).split(";")[-1]


def _parts(out: str) -> dict[str, str]:
    parts = re.split(r"^#(\w+)$\n?", out, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _documents(text: str) -> list[dict[str, Any]]:
    decoder, found, text = json.JSONDecoder(), [], text.strip()
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:].strip()
    return found


def _targets(text: str) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for part in re.split(r"^Target \d+: ", text, flags=re.MULTILINE)[1:]:
        target = Target(part.splitlines()[0].strip())
        target.initiators = re.findall(r"Initiator: (\S+)", part)
        target.readonly = re.findall(r"Readonly: (\w+)", part)[-1:] == ["Yes"]  # LUN 0 comes first
        target.device = (re.findall(r"Backing store path: (\S+)", part) or [""])[-1]
        target.allowed = re.findall(r"^        (\S+)$", part.partition("    ACL")[2], re.MULTILINE)
        if target.name.startswith(f"{TARGET_PREFIX}:"):
            found[target.name] = target
    return found
