"""The doctor on machines made of a folder and a runner with fixed answers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from csi import doctor
from csi.config import load
from csi.doctor_host import Finding, Host
from csi.model import volume_id_of
from tests.fakes.lvm import FakeLvm
from tests.fakes.runner import FakeRunner, Reply

ALL_TOOLS = sorted(doctor._PACKAGES)
_SHARED = "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n2 1 0:5 / /var/lib/kubelet rw shared:7 - tmpfs tmpfs rw\n"
_PRIVATE = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
_OTHER_GROUP = "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n2 1 0:5 / /var/lib/kubelet rw shared:9 - tmpfs tmpfs rw\n"


class Answers(FakeRunner):
    """A FakeLvm, and fixed answers of `modprobe` and `tgtd`; anything else is a mistake of the test."""

    def __init__(self, folder: Path) -> None:
        self.lvm = FakeLvm(folder)
        self.lvm.mda_size, self.lvm.mda_free = 64 << 20, 60 << 20
        self.loadable: set[str] = set()
        super().__init__({**self.lvm.programs, "modprobe": self._modprobe, "tgtd": lambda *_: (0, "1.0.85\n", "")})

    def _modprobe(self, argv: Sequence[str], _input: str | None) -> Reply:
        return (0 if argv[-1] in self.loadable else 1), "", ""

    def has(self, program: str) -> bool:
        """Tools are looked for in the machine's folder; connectors ask the runner."""
        return True


class Machine:
    """A root folder with tools and mount tables."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers = Answers(root / "fake")
        self.lvm = self.answers.lvm
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
    '[pools.thin]\ntype = "lvm-thin"\nvg = "vg0"\nthin_pool = "tp"\ndevices = ["/dev/sda"]\n'
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
    folder.chmod(0o770)
    assert "the driver refuses it" in _one(machine.examine(FILES), "state_dir", "error").text
    folder.chmod(0o700)
    assert _one(machine.examine(FILES), "state_dir", "ok")
    os.chown(folder, 65534, 65534)
    assert _one(machine.examine(FILES), "state_dir", "error").repair == f"chown 0 {folder}"


# -- LVM -------------------------------------------------------------------------------------------------------------


def test_a_volume_group_that_never_was_is_to_be_made(machine: Machine) -> None:
    machine.lvm.exists = False
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", "error")
    assert finding.text == "volume group vg0: not found on this machine"
    assert finding.repair == "vgcreate --metadatasize 64m vg0 DISK..., or correct pools.disks.vg"


def test_a_volume_group_that_is_not_on_the_given_disks_is_not_to_be_made(machine: Machine) -> None:
    settings = LVM.replace('vg = "vg0"', 'vg = "vg0"\ndevices = ["/dev/sdz"]')
    finding = _one(machine.examine(settings, role="controller"), "pool disks", "error")
    assert "vgcreate" not in finding.text + finding.repair
    assert "pools.disks.devices" in finding.repair
    machine.lvm.exists = False
    assert "vgcreate" in _one(machine.examine(settings, role="controller"), "pool disks", "error").repair


def test_no_failure_of_lvm_is_a_reason_to_make_the_group(machine: Machine) -> None:
    """vgcreate on disks that LVM only fails to read would end what is on them."""
    for words in (("pvs",), ("fullreport",)):
        for nth in (1, 2):
            for devices in ("", '\ndevices = ["/dev/sda"]'):
                machine.answers.fail(*words, nth=nth, reply=(5, "", "  Cannot get lock"))
                settings = LVM.replace('vg = "vg0"', f'vg = "vg0"{devices}')
                for finding in machine.examine(settings, role="controller"):
                    assert "vgcreate" not in finding.text + finding.repair, (words, nth, devices)
                machine.answers.forgive()
    machine.lvm.exists = False
    machine.answers.fail("pvs", reply=(5, "", "  /dev/sda: open failed: Permission denied"))
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", "error")
    assert "Permission denied" in finding.text
    machine.answers.forgive()
    finding = _one(machine.examine(LVM, role="controller", uid=1000), "pool disks", "error")
    assert "vgcreate" not in finding.repair, "others than root may not read the disks"


def test_a_volume_group_that_the_pool_was_made_on_is_to_be_brought_back(machine: Machine) -> None:
    machine.write("state/pools/disks/vg.json", json.dumps({"format": 1, "vg": "vg0", "uuid": "earlier"}))
    (machine.root / "state").chmod(0o700)
    assert "uuid earlier" in _one(machine.examine(LVM, role="controller"), "pool disks", "error").text
    machine.lvm.exists = False
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", "error")
    assert "vgcreate" not in finding.repair
    assert "bring its disks back" in finding.repair


def test_the_doctor_writes_nothing(machine: Machine) -> None:
    machine.examine(LVM + FILES, role="controller")
    assert not (machine.root / "state").exists()


@pytest.mark.parametrize(("free", "level"), [(400_000, "warning"), (30_000, "error")])
def test_a_small_metadata_area_is_told(machine: Machine, free: int, level: str) -> None:
    machine.lvm.mda_size, machine.lvm.mda_free = 521472, free
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", level)
    assert "509 KiB" in finding.text
    assert "64 MiB" in finding.repair


def test_autoactivation_is_told(machine: Machine) -> None:
    machine.lvm.autoactivation = "enabled"
    finding = _one(machine.examine(LVM, role="controller"), "pool disks", "warning")
    assert finding.repair == "vgchange --setautoactivation n vg0"


def test_lvm_that_looks_into_volumes_is_told(machine: Machine) -> None:
    machine.lvm.scan_lvs = 1
    assert "scan_lvs = 0" in _one(machine.examine(LVM, role="controller"), "lvm", "warning").repair


def test_sick_volumes_and_deleted_ones_that_keep_their_space_are_told(machine: Machine) -> None:
    tags = ["snode.format=1", "snode.pool=disks", "snode.name=eA=="]
    volume_id = volume_id_of("x")
    for name in (volume_id, "trash-0123456789abcdef", "somebody-elses"):
        machine.lvm.add(name, extents=1, kind="raid1", health="refresh needed", tags=tags if name[0] in "vt" else [])
    findings = _bad(machine.examine(LVM, role="controller"), "warning")
    volume, trash = [finding for finding in findings if finding[0] == "pool disks"]
    assert volume[1:] == (
        f"volume {volume_id}: a disk of the volume had errors",
        "`lvchange --refresh`, or replace it and `lvconvert --repair`",
    )
    assert "trash-0123456789abcdef: its space stays taken" in trash[1]
    assert "lvconvert --mirrors 0 vg0/trash-0123456789abcdef" in trash[2]


def test_a_missing_disk_is_told(machine: Machine) -> None:
    machine.lvm.disks["/dev/sdb"] = 100
    machine.lvm.gone.add("/dev/sdb")
    assert "1 of its disks" in _one(machine.examine(LVM, role="controller"), "pool disks", "error").text


def test_a_layout_that_needs_more_disks_is_a_warning(machine: Machine) -> None:
    settings = LVM.replace('vg = "vg0"', 'vg = "vg0"\nlayout = "raid1"')
    finding = _one(machine.examine(settings, role="controller"), "pool disks", "warning")
    assert "needs 2 disks" in finding.text
    assert finding.repair == "add disks (vgextend) or choose another layout"


def test_a_thin_pool_must_be_one(machine: Machine) -> None:
    finding = _one(machine.examine(THIN, role="controller"), "pool thin", "error")
    assert finding.text == "thin pool vg0/tp: does not exist"
    assert finding.repair.startswith("make it with `lvcreate --type=thin-pool")
    lv = machine.lvm.add("tp", extents=10)
    assert "is not a thin pool" in _one(machine.examine(THIN, role="controller"), "pool thin", "error").text
    lv.kind = "thin-pool"
    assert not [f for f in machine.examine(THIN, role="controller") if f.subject == "pool thin" and f.level == "error"]
    lvm = [call for call in machine.answers.calls if call[0] == "lvm" and call[1] != "lvmconfig"]
    assert lvm
    assert all('"a|^/dev/sda$|","r|.*|"' in call[2] for call in lvm), "LVM sees only our disks"


# -- daemons, roles, mounts ------------------------------------------------------------------------------------------


def test_tgtd_that_does_not_answer_is_told(machine: Machine) -> None:
    settings = LVM.replace("[controller]", f'[controller]\ntgt_socket = "{machine.root}/no-socket"')
    finding = _one(machine.examine(settings, role="controller"), "tgtd", "error")
    assert finding.text.startswith(f"tgtd does not answer on {machine.root}/no-socket")
    assert finding.repair.startswith("start it (systemctl start tgt)")


def test_a_missing_initiator_name_is_told(machine: Machine) -> None:
    settings = f'[node]\ninitiator_file = "{machine.root}/absent"\n'
    findings = machine.examine(settings, role="node")
    faults = [f for f in findings if f.subject == "iscsi" and f.level == "error"]
    assert any("no initiator name" in f.text and "iscsi-iname" in f.repair for f in faults)
    assert all(f.repair for f in faults)


def test_a_missing_iscsiadm_has_its_repair(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.answers, "has", lambda program: program != "iscsiadm")
    findings = machine.examine("", role="node")
    assert ("iscsi", "iscsiadm is missing", "install the package open-iscsi") in _bad(findings)


def test_a_node_id_that_csi_can_not_carry_is_told(machine: Machine) -> None:
    machine.write("iscsi", f"InitiatorName=iqn.2004-01.com.x:{'y' * 127}\n")
    settings = f'[node]\nname = "node-a"\ninitiator_file = "{machine.root}/iscsi"\n'
    finding = _one(machine.examine(settings, role="node"), "node id", "error")
    assert "has 198 bytes, CSI allows 192" in finding.text
    assert finding.repair == "shorten node.name (6 bytes) or the initiator name (145 bytes) by 6 bytes"


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
