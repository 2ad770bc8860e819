"""The doctor on machines made of a folder and a runner with fixed answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from csi import doctor
from csi.config import load
from csi.deadline import Deadline
from csi.doctor_host import Finding, Host
from csi.run import Result

ALL_TOOLS = sorted(doctor._PACKAGES)
_SHARED = "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n2 1 0:5 / /var/lib/kubelet rw shared:7 - tmpfs tmpfs rw\n"
_PRIVATE = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
_OTHER_GROUP = "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n2 1 0:5 / /var/lib/kubelet rw shared:9 - tmpfs tmpfs rw\n"


class Answers:
    """Answers `lvm vgs`, `lvm lvs`, `modprobe` and the tools' versions; anything else is a mistake of the test."""

    def __init__(self, *, vg: dict[str, str] | None = None, lv: dict[str, str] | None = None) -> None:
        self.vg = vg
        self.lv = lv
        self.loadable: set[str] = set()
        self.configs: list[str] = []

    def run(self, argv: Sequence[str], *, deadline: Deadline, **_options: Any) -> Result:
        if argv[0] == "modprobe":
            return Result(tuple(argv), 0 if argv[-1] in self.loadable else 1, "", "")
        if argv[0] in ("iscsiadm", "tgtd"):
            return Result(tuple(argv), 0, f"{argv[0]} version 1.0.85\n", "")
        assert argv[0] == "lvm", argv
        self.configs.append(argv[2])
        section, row = ("vg", self.vg) if argv[1] == "vgs" else ("lv", self.lv)
        if row is None:
            return Result(tuple(argv), 5, "", f'  Volume group "{argv[-1]}" not found\n  Cannot process it\n')
        return Result(tuple(argv), 0, json.dumps({"report": [{section: [row]}]}), "")


class Machine:
    """A root folder with tools and mount tables."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers = Answers(vg={"vg_mda_size": str(64 << 20), "vg_mda_free": str(60 << 20), "vg_autoactivation": ""})
        for tool in ALL_TOOLS:
            self.write(f"usr/sbin/{tool}", "")
        self.mounts(_SHARED)
        for sign in ("dev/loop-control", "dev/mapper/control", "sys/module/dm_thin_pool", "sys/module/dm_raid"):
            self.write(sign, "")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def remove(self, name: str) -> None:
        (self.root / name).unlink()

    def mounts(self, ours: str, *, first: str = _SHARED) -> None:
        self.write("proc/self/mountinfo", ours)
        self.write("proc/1/mountinfo", first)

    def examine(self, text: str, *, role: str = "all", uid: int = 0) -> list[Finding]:
        file = self.root / "snode.toml"
        file.write_text(f'state_dir = "{self.root}/state"\n{text}')
        host = Host(runner=self.answers, root=self.root, uid=uid, release="6.1.0")
        return doctor.examine(load(file, environment={}), role=role, host=host)


FILES = '[pools.local]\ntype = "files"\ndirectory = "/var/tmp/nothing/here"\n'
LVM = '[pools.disks]\ntype = "lvm"\nvg = "vg0"\n[controller]\nportals = ["192.0.2.1:3260"]\n'
THIN = (
    '[pools.thin]\ntype = "lvm-thin"\nvg = "vg0"\nthin_pool = "tp"\ndevices = ["/dev/sdb"]\n'
    '[controller]\nportals = ["192.0.2.1:3260"]\n'
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def _bad(findings: list[Finding], level: str = "error") -> list[tuple[str, str, str]]:
    return [(f.subject, f.text, f.repair) for f in findings if f.level == level]


def _one(findings: list[Finding], subject: str, level: str) -> Finding:
    (finding,) = [f for f in findings if f.subject == subject and f.level == level]
    return finding


def test_a_machine_with_everything_has_no_fault(machine: Machine) -> None:
    findings = machine.examine(FILES)
    assert _bad(findings) == []
    assert _bad(findings, "warning") == []
    subjects = {finding.subject for finding in findings}
    assert subjects == {"settings", "state_dir", "tools", "kernel module", "pool local", "mounts"}
    assert not any(finding.repair for finding in findings)


def test_not_root_is_told(machine: Machine) -> None:
    assert _one(machine.examine(FILES, uid=1000), "user", "error").repair == "run it with sudo"


@pytest.mark.parametrize(
    ("tool", "package", "settings"),
    [
        ("losetup", "mount", FILES),
        ("mkfs.ext4", "e2fsprogs", FILES),
        ("lvm", "lvm2", LVM),
        ("tgtd", "tgt", LVM),
        ("iscsiadm", "open-iscsi", LVM),
        ("thin_check", "thin-provisioning-tools", THIN),
    ],
)
def test_a_missing_tool_is_told_with_its_package(machine: Machine, tool: str, package: str, settings: str) -> None:
    machine.remove(f"usr/sbin/{tool}")
    missing = [f for f in machine.examine(settings) if f.subject == "tools"]
    assert [(f.level, f.text, f.repair) for f in missing if f.level != "ok"] == [
        ("error", f"{tool} is missing", f"apt-get install {package}")
    ]


def test_a_missing_filesystem_is_a_warning(machine: Machine) -> None:
    machine.remove("usr/sbin/mkfs.xfs")
    finding = _one(machine.examine(FILES), "tools", "warning")
    assert "fs_type xfs" in finding.text
    assert finding.repair == "apt-get install xfsprogs"


@pytest.mark.parametrize(
    ("module", "sign", "settings"),
    [
        ("loop", "dev/loop-control", FILES),
        ("dm_mod", "dev/mapper/control", LVM),
        ("dm_thin_pool", "sys/module/dm_thin_pool", THIN),
        ("dm_raid", "sys/module/dm_raid", LVM.replace('vg = "vg0"', 'vg = "vg0"\nlayout = "raid1"')),
    ],
)
def test_a_kernel_module_is_there_loadable_built_in_or_told(
    machine: Machine, module: str, sign: str, settings: str
) -> None:
    def finding() -> Finding:
        (found,) = [
            f for f in machine.examine(settings) if f.subject == "kernel module" and f.text.split()[0] == module
        ]
        return found

    assert (finding().level, finding().text) == ("ok", f"{module} is loaded")
    machine.remove(sign)
    assert finding().level == "error"
    assert f"modprobe {module}" in finding().repair
    machine.answers.loadable.add(module)
    assert finding().text == f"{module} can be loaded"
    machine.answers.loadable.clear()
    machine.write("lib/modules/6.1.0/modules.builtin", f"kernel/drivers/md/{module.replace('_', '-')}.ko\n")
    assert finding().text == f"{module} is part of the kernel"


def test_a_readable_state_folder_is_told(machine: Machine) -> None:
    folder = machine.root / "state"
    folder.mkdir(mode=0o755)
    assert _one(machine.examine(FILES), "state_dir", "error").repair == f"chmod 0700 {folder}"
    folder.chmod(0o700)
    assert _one(machine.examine(FILES), "state_dir", "ok")


# -- LVM -------------------------------------------------------------------------------------------------------------


def test_a_missing_volume_group_is_told(machine: Machine) -> None:
    machine.answers.vg = None
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", "error")
    assert 'Volume group "vg0" not found' in finding.text
    assert finding.repair == "vgcreate --metadatasize 64m vg0 DISK..."


@pytest.mark.parametrize(("free", "level"), [(400_000, "warning"), (30_000, "error")])
def test_a_small_metadata_area_is_told(machine: Machine, free: int, level: str) -> None:
    machine.answers.vg = {"vg_mda_size": "521472", "vg_mda_free": str(free), "vg_autoactivation": ""}
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", level)
    assert "509 KiB" in finding.text
    assert "--metadatasize 64m" in finding.repair


def test_autoactivation_is_told(machine: Machine) -> None:
    assert machine.answers.vg is not None
    machine.answers.vg["vg_autoactivation"] = "enabled"
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", "warning")
    assert finding.repair == "vgchange --setautoactivation n vg0"


def test_a_thin_pool_must_be_one(machine: Machine) -> None:
    machine.answers.lv = {"lv_name": "tp", "segtype": "linear"}
    finding = _one(machine.examine(THIN, role="controller"), "pool thin", "error")
    assert "vg0/tp is not a thin pool" in finding.text
    machine.answers.lv["segtype"] = "thin-pool"
    assert not [f for f in machine.examine(THIN, role="controller") if f.subject == "pool thin" and f.level == "error"]
    assert all('"a|^/dev/sdb$|","r|.*|"' in config for config in machine.answers.configs), "LVM sees only our disks"


# -- daemons, roles, mounts ------------------------------------------------------------------------------------------


def test_tgtd_that_does_not_answer_is_told(machine: Machine) -> None:
    settings = LVM.replace("[controller]", f'[controller]\ntgt_socket = "{machine.root}/no-socket"')
    assert "tgtd" in _one(machine.examine(settings, role="controller"), "tgtd", "error").text


def test_a_missing_initiator_name_is_told(machine: Machine) -> None:
    settings = f'[node]\ninitiator_file = "{machine.root}/absent"\n'
    findings = machine.examine(settings, role="node")
    texts = [f"{f.text} {f.repair}" for f in findings if f.subject == "iscsi"]
    assert any("initiator name" in text and "iscsi-iname" in text for text in texts)


def test_roles_are_asked_only_for_what_they_need(machine: Machine) -> None:
    controller = {f.subject for f in machine.examine(LVM, role="controller")}
    assert {"pool disks", "tgtd"} <= controller
    assert not {"iscsi", "mounts"} & controller
    node = {f.subject for f in machine.examine(LVM, role="node")}
    assert {"iscsi", "mounts"} <= node
    assert not {"pool disks", "tgtd"} & node


def _roots(machine: Machine, folder: str) -> str:
    return f'{FILES}[node]\ntarget_roots = ["{folder}"]\n'


def test_private_mounts_are_an_error_below_a_root_that_is_named(machine: Machine, tmp_path: Path) -> None:
    machine.mounts(_PRIVATE)
    finding = _one(machine.examine(_roots(machine, str(tmp_path))), "mounts", "error")
    assert "mount --make-rshared" in finding.repair
    assert _one(machine.examine(FILES), "mounts", "warning")


def test_mounts_shared_with_somebody_else_than_the_host_are_an_error(machine: Machine, tmp_path: Path) -> None:
    table = f"1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n2 1 0:5 / {tmp_path} rw shared:7 - tmpfs tmpfs rw\n"
    machine.mounts(table, first=_OTHER_GROUP)
    finding = _one(machine.examine(_roots(machine, str(tmp_path))), "mounts", "error")
    assert "Bidirectional" in finding.repair
    machine.mounts(table, first=table)
    assert _one(machine.examine(_roots(machine, str(tmp_path))), "mounts", "ok")


def test_a_root_that_is_not_there_is_told(machine: Machine) -> None:
    assert "does not exist" in _one(machine.examine(_roots(machine, "/no/such/root")), "mounts", "error").text
