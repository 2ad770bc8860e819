"""Settings become objects; nothing here starts a process or a thread."""

from pathlib import Path

import pytest

from csi import wire
from csi.config import Config, load
from csi.deadline import Deadline
from csi.errors import Unavailable
from csi.model import NodeId

ALL = frozenset({"controller", "node"})
FILES = '[pools.local]\ntype = "files"\ndirectory = "{folder}/pool"\n'
LVM = (
    '[controller]\nportals = ["192.0.2.1:3260"]\n[pools.disks]\ntype = "lvm"\nvg = "vg0"\nlayout = "raid1"\n'
    '[pools.thin]\ntype = "lvm-thin"\nvg = "vg0"\nthin_pool = "tp"\n'
)


def _config(folder: Path, text: str) -> Config:
    file = folder / "snode.toml"
    file.write_text(f'state_dir = "{folder}/state"\n[node]\nname = "node-a"\n{text.format(folder=folder)}')
    return load(file, environment={})


def _protocols(config: Config, *roles: str) -> list[str]:
    staging = wire.build(config, roles=frozenset(roles)).staging
    assert staging is not None
    return sorted(staging._connectors)


def test_a_role_has_its_parts_only(tmp_path: Path) -> None:
    config = _config(tmp_path, FILES)
    controller = wire.build(config, roles=frozenset({"controller"}))
    assert controller.volumes is not None
    assert controller.staging is None
    node = wire.build(config, roles=frozenset({"node"}))
    assert node.volumes is None
    assert node.staging is not None
    assert len(list(wire.registrations(wire.build(config, roles=ALL), config))) == 3
    assert len(list(wire.registrations(node, config))) == 2


def test_a_node_attaches_what_its_pools_and_role_need(tmp_path: Path) -> None:
    files, lvm, both = (_config(tmp_path, text) for text in (FILES, LVM, LVM + FILES))
    assert _protocols(files, "controller", "node") == ["loop"]
    assert _protocols(lvm, "controller", "node") == ["iscsi"]
    assert _protocols(both, "controller", "node") == ["iscsi", "loop"]
    assert _protocols(files, "node") == ["iscsi", "loop"]


def test_pools_share_one_export_and_local_ones_are_tied_to_this_node(tmp_path: Path) -> None:
    volumes = wire.build(_config(tmp_path, LVM + FILES), roles=ALL).volumes
    assert volumes is not None
    pools = volumes._pools.by_name
    assert {name: pool.local_to for name, pool in pools.items()} == {"disks": "", "thin": "", "local": "node-a"}
    assert pools["disks"].export is pools["thin"].export
    assert {name: pool.export.protocol for name, pool in pools.items()} == {
        "disks": "iscsi",
        "thin": "iscsi",
        "local": "loop",
    }


def test_a_node_without_an_initiator_name_serves_local_volumes(tmp_path: Path) -> None:
    config = _config(tmp_path, f'initiator_file = "{tmp_path}/absent"\n' + FILES)
    staging = wire.build(config, roles=ALL).staging
    assert staging is not None
    node_id = NodeId.parse(str(staging._node_id()))
    assert (node_id.name, node_id.initiator) == ("node-a", "")
    assert node_id.public_key


def test_a_node_whose_id_csi_can_not_carry_is_not_ready(tmp_path: Path) -> None:
    initiator = tmp_path / "initiatorname.iscsi"
    initiator.write_text(f"InitiatorName=iqn.2004-01.com.x:{'y' * 150}\n")
    config = _config(tmp_path, f'initiator_file = "{initiator}"\n' + FILES)
    staging = wire.build(config, roles=ALL).staging
    assert staging is not None
    (problem,) = [problem for problem in staging.problems(Deadline.after(5)) if "node id" in problem]
    assert "shorten node.name" in problem.partition(" -> ")[2]
    with pytest.raises(Unavailable, match="CSI allows 192"):
        staging.info(Deadline.after(5))
