"""A stateful LVM behind the Runner: one volume group, its devices as files of a folder.

It parses the argv that the driver uses and fails the test on anything else. Devices of active volumes are files
`FOLDER/VG/NAME` with real content, so that wiping and looking for signatures are real.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi.backends.device_nodes import DeviceNodes, Node
from tests.fakes.runner import Program, Reply

_COMMON = {"config", "reportformat", "units", "nosuffix", "yes"}
_OPTIONS = {
    "lvm": {"configreport", "options"},
    "pvs": {"options"},
    "lvcreate": {
        "setactivationskip", "ignoreactivationskip", "wipesignatures", "zero", "type", "extents", "stripes", "mirrors",
        "virtualsize", "thinpool", "addtag", "name",
    },
    "lvextend": {"extents"},
    "lvrename": set(),
    "lvremove": set(),
    "dmsetup": set(),
    "lvchange": {"activate", "ignoreactivationskip", "refresh", "deltag"},
}  # fmt: skip
_TAG = re.compile(r"[A-Za-z0-9_.+\-/=!:&#]{1,1024}")
_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,126}")


@dataclass
class FakeLv:
    """A logical volume."""

    name: str
    uuid: str
    extents: int
    kind: str  # linear, striped, raid1 …, thin, thin-pool
    tags: list[str] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)  # extents on each disk
    pool: str = ""
    active: bool = True
    is_open: bool = False
    table_extents: int | None = None  # what the kernel has; differs after a killed lvextend
    suspended: bool = False
    health: str = ""
    sync: str = ""
    zeroes: bool = True  # thin pool
    legs: list[str] = field(default_factory=list)  # devices that a killed activation left
    leg_left: bytes | None = None  # RAID: what is on the leg that fell out
    half_made: bool = False  # RAID whose lvcreate was killed: never to be activated
    data_percent: float = 0.0
    metadata_percent: float = 10.0

    def alive(self) -> str:
        """The kernel's letter for each RAID leg."""
        letters = "A" * len(self.taken)
        return letters if self.leg_left is None else letters[:-1] + "D"


@dataclass
class FakeVg:
    """Another group of the machine, as `pvs` shows it."""

    name: str
    uuid: str
    disks: tuple[str, ...]


class FakeLvm:
    """The group `vg`. Switches: `midway` (programs that stop after the metadata commit), `stale` (old content)."""

    def __init__(self, folder: Path, *, vg: str = "vg0", disks: dict[str, int] | None = None, extent: int = 1 << 20):
        self.folder = folder
        self.vg = vg
        self.vg_uuid = "VgVgVg-0000-0000-0000-0000-0000-000001"
        self.extent = extent
        self.disks = disks if disks is not None else {"/dev/sda": 100}
        self.gone: set[str] = set()  # disks that are not there any more
        self.others: list[FakeVg] = []
        self.lvs: dict[str, FakeLv] = {}
        self.mda_size = 1 << 20
        self.mda_free = 1 << 19
        self.stale = b""
        self.midway: set[str] = set()
        self.exists = True
        self.autoactivation = ""
        self.scan_lvs = 0  # the machine's own setting
        self.dirty: list[str] = []  # thick volumes that were removed with data in them
        self._serial = 0
        (folder / vg).mkdir(parents=True, exist_ok=True)

    @property
    def programs(self) -> dict[str, Program]:
        """For FakeRunner."""
        return dict.fromkeys(_OPTIONS, self._run)

    def nodes(self) -> "FakeNodes":
        """The device nodes."""
        return FakeNodes(self)

    def device(self, name: str) -> Path:
        """The device of a volume."""
        return self.folder / self.vg / name

    def add(self, name: str, *, extents: int, kind: str = "linear", **more: object) -> FakeLv:
        """A volume that somebody made."""
        self._serial += 1
        lv = FakeLv(name, f"LvLvLv-0000-0000-0000-0000-0000-{self._serial:06}", extents, kind)
        for key, value in more.items():
            setattr(lv, key, value)
        self.lvs[name] = lv
        return lv

    def activate(self, name: str) -> None:
        """Make the device, with what is on the disk."""
        lv = self.lvs[name]
        lv.active, lv.suspended, lv.table_extents = True, False, lv.extents
        if lv.kind == "thin-pool":
            return
        with self.device(name).open("ab") as file:
            file.truncate(lv.extents * self.extent)

    def drop_leg(self, name: str) -> None:
        """The last RAID leg of a volume gets a write error: it keeps what it has, and takes nothing more."""
        self.lvs[name].leg_left = self.device(name).read_bytes()

    def reboot(self) -> None:
        """Nothing is active."""
        for lv in self.lvs.values():
            lv.active = lv.is_open = False

    def free(self) -> dict[str, int]:
        """Free extents of each disk."""
        return {
            disk: size - sum(lv.taken.get(disk, 0) for lv in self.lvs.values()) for disk, size in self.disks.items()
        }

    # -- programs ------------------------------------------------------------------------------------------------

    def _run(self, argv: Sequence[str], _input: str | None) -> Reply:
        program = argv[0]
        rest = list(argv[1:])
        if program == "dmsetup":
            return self._dmsetup(rest)
        if rest[:1] == ["lvmconfig"]:
            assert rest[1:] == ["--typeconfig=full", "devices/scan_lvs"], argv
            return 0, f"scan_lvs={self.scan_lvs}\n", ""
        if program == "lvm":
            program = f"lvm {rest.pop(0)}"
            assert program in ("lvm fullreport", "lvm vgs"), argv
        options, operands = _parse(program.partition(" ")[0], rest)
        config = options["config"][0]
        assert 'hints="none"' in config and "scan_lvs=0" in config and "backup=0 archive=0" in config, config
        if program == "pvs":
            return self._pvs(re.findall(r'"r\|\^(.*?)\$\|"', config))
        accepted = re.findall(r'"a\|\^(.*?)\$\|"', config)
        assert config.count('"r|.*|"') == 1 and "use_devicesfile=0" in config, config
        visible = {
            disk for disk in self.disks if disk not in self.gone and any(re.fullmatch(a, disk) for a in accepted)
        }
        if not visible or not self.exists:
            return (
                5,
                '{"report": []}',
                f'  Volume group "{self.vg}" not found\n  Cannot process volume group {self.vg}\n',
            )
        if program.startswith("lvm "):
            assert operands == [self.vg], argv
            if program == "lvm vgs":
                assert options["options"] == ["vg_autoactivation"], argv
                return 0, json.dumps({"report": [{"vg": [{"vg_autoactivation": self.autoactivation}]}]}), ""
            return 0, self._report(visible), ""
        if visible != set(self.disks) and program not in ("lvremove", "lvchange"):
            return 5, "", "  WARNING: VG vg0 is missing PV.\n  Cannot change VG vg0 while PVs are missing.\n"
        commands: dict[str, Callable[[dict[str, list[str]], list[str]], Reply]] = {
            "lvcreate": self._lvcreate, "lvextend": self._lvextend, "lvrename": self._lvrename,
            "lvremove": self._lvremove, "lvchange": self._lvchange,
        }  # fmt: skip
        return commands[program](options, operands)

    def _pvs(self, rejected: list[str]) -> Reply:
        rows = []
        groups = [FakeVg(self.vg, self.vg_uuid, tuple(self.disks))] if self.exists else []
        for group in [*groups, *self.others]:
            rows += [
                {"pv_name": "[unknown]" if disk in self.gone else disk, "vg_name": group.name, "vg_uuid": group.uuid}
                for disk in group.disks
                if disk not in rejected
            ]
        return 0, json.dumps({"report": [{"pv": rows}]}), ""

    def _report(self, visible: set[str]) -> str:
        vg = {
            "vg_name": self.vg, "vg_uuid": self.vg_uuid, "vg_extent_size": str(self.extent),
            "vg_mda_size": str(self.mda_size), "vg_mda_free": str(self.mda_free),
            "vg_missing_pv_count": str(len(set(self.disks) - visible)),
        }  # fmt: skip
        free = self.free()
        pvs = [
            {
                "pv_name": disk if disk in visible else "[unknown]", "pv_free": str(free[disk] * self.extent),
                "pv_allocatable": "allocatable", "pv_missing": "" if disk in visible else "missing",
            }
            for disk in self.disks
        ]  # fmt: skip
        lvs = [self._row(lv) for lv in self.lvs.values()]
        return json.dumps({"report": [{"vg": [vg], "pv": pvs, "lv": lvs, "pvseg": [], "seg": []}]})

    def _health(self, lv: FakeLv) -> str:
        if lv.health or lv.leg_left is None:
            return lv.health
        return "partial" if self.gone & set(lv.taken) else "refresh needed"

    def _row(self, lv: FakeLv) -> dict[str, str]:
        layout = {"thin": "thin,sparse", "thin-pool": "thin,pool"}.get(lv.kind, lv.kind)
        is_pool = lv.kind == "thin-pool"
        percents = is_pool and lv.active
        return {
            "lv_name": lv.name, "lv_uuid": lv.uuid, "lv_size": str(lv.extents * self.extent),
            "lv_tags": ",".join(sorted(lv.tags)), "lv_attr": "twi-aotz--" if is_pool and lv.zeroes else "-wi-a-----",
            "lv_layout": f"raid,{layout}" if layout.startswith("raid") else layout, "pool_lv": lv.pool,
            "data_percent": f"{lv.data_percent:.2f}" if percents else "",
            "metadata_percent": f"{lv.metadata_percent:.2f}" if percents else "",
            "sync_percent": lv.sync, "lv_health_status": self._health(lv),
            "lv_device_open": "open" if lv.is_open and lv.active else "",
        }  # fmt: skip

    def _lvcreate(self, options: dict[str, list[str]], operands: list[str]) -> Reply:
        assert operands == [self.vg]
        assert options["setactivationskip"] == ["y"] and "ignoreactivationskip" in options
        assert options["wipesignatures"] == ["y"]
        (name,), (kind,) = options["name"], options["type"]
        assert _NAME.fullmatch(name), name
        for tag in options["addtag"]:
            assert _TAG.fullmatch(tag), tag
        if name in self.lvs:
            return 5, "", f'  Logical Volume "{name}" already exists in volume group "{self.vg}"\n'
        if self.mda_free < 500:
            return 5, "", "  VG vg0 96 metadata (522246 bytes) exceeds maximum metadata size (521472 bytes)\n"
        if kind == "thin":
            lv = self.add(name, extents=int(options["virtualsize"][0].removesuffix("b")) // self.extent, kind=kind)
            lv.pool = options["thinpool"][0]
            assert self.lvs[lv.pool].kind == "thin-pool"
        else:
            assert options["zero"] == ["y"]
            taken = self._allocate(kind, options)
            if isinstance(taken, str):
                return 5, "", taken
            lv = self.add(name, extents=int(options["extents"][0]), kind=kind, taken=taken)
        lv.tags = list(options["addtag"])
        lv.active = False
        content = b"" if kind == "thin" else self.stale
        self.device(name).write_bytes(content)
        if "lvcreate" in self.midway:
            lv.half_made = kind.startswith("raid")
            return 137, "", ""
        self.activate(name)
        if content:
            with self.device(name).open("r+b") as file:
                file.write(bytes(len(content)))
        return 0, f'  Logical volume "{name}" created.\n', ""

    def _allocate(self, kind: str, options: dict[str, list[str]]) -> dict[str, int] | str:
        stripes = int(options.get("stripes", ["1"])[0])
        copies = int(options.get("mirrors", ["0"])[0]) + 1
        parity = {"raid5": 1, "raid6": 2}.get(kind, 0)
        extents = int(options["extents"][0])
        assert extents % stripes == 0, "the driver rounds to whole stripes itself"
        legs = stripes * copies + parity
        return self._take(legs, extents // stripes + (1 if kind.startswith("raid") else 0))

    def _take(self, legs: int, each: int) -> dict[str, int] | str:
        free = self.free()
        if sum(free.values()) < legs * each:
            return f"  Insufficient free space: {legs * each} extents needed, but only {sum(free.values())} available\n"
        if len([disk for disk in free.values() if disk]) < legs:
            return "  Insufficient suitable allocatable extents for logical volume: 1 more required\n"
        taken: dict[str, int] = {}
        while each:
            disks = sorted(free, key=lambda d: -free[d])[:legs]
            step = min(each, *(free[disk] for disk in disks))
            if not step:
                return "  Insufficient suitable allocatable extents for logical volume: 1 more required\n"
            for disk in disks:
                free[disk] -= step
                taken[disk] = taken.get(disk, 0) + step
            each -= step
        return taken

    def _lvextend(self, options: dict[str, list[str]], operands: list[str]) -> Reply:
        lv = self._lv(operands)
        if isinstance(lv, str):
            return 5, "", lv
        extents = int(options["extents"][0])
        if extents == lv.extents:
            return 5, "", f"  New size ({extents} extents) matches existing size ({extents} extents).\n"
        assert extents > lv.extents, "never smaller"
        if lv.kind != "thin":
            legs = max(1, len(lv.taken)) if lv.kind != "linear" else 1
            copies = legs if lv.kind == "raid1" else 1
            each = (extents - lv.extents) * copies // legs
            taken = self._take(legs, each)
            if isinstance(taken, str):
                return 5, "", taken
            lv.taken = {disk: lv.taken.get(disk, 0) + taken.get(disk, 0) for disk in {**lv.taken, **taken}}
        lv.extents = extents
        if "lvextend" in self.midway:
            lv.suspended = True
            return 137, "", ""
        if lv.active:
            self.activate(lv.name)
        return 0, "  Logical volume successfully resized.\n", ""

    def _lvrename(self, options: dict[str, list[str]], operands: list[str]) -> Reply:
        vg, old, new = operands
        assert vg == self.vg and _NAME.fullmatch(new)
        if old not in self.lvs:
            return 5, "", f'  Existing logical volume "{old}" not found in volume group "{vg}"\n'
        if new in self.lvs:
            return 5, "", f'  Logical volume "{new}" already exists in volume group "{vg}"\n'
        lv = self.lvs.pop(old)
        lv.name = new
        self.lvs[new] = lv
        self.device(old).rename(self.device(new))
        return 0, f'  Renamed "{old}" to "{new}" in volume group "{vg}"\n', ""

    def _lvremove(self, options: dict[str, list[str]], operands: list[str]) -> Reply:
        lv = self._lv(operands)
        if isinstance(lv, str):
            return 5, "", lv
        if lv.is_open:
            return 5, "", f"  Logical volume {self.vg}/{lv.name} in use.\n"
        if lv.kind == "thin" and self.lvs[lv.pool].legs:
            return 5, "", f"  Activation of {lv.pool} is prohibited while {lv.pool}_tdata is active.\n"
        if lv.kind != "thin" and (self.device(lv.name).read_bytes() + (lv.leg_left or b"")).strip(b"\0"):
            self.dirty.append(lv.name)
        del self.lvs[lv.name]
        self.device(lv.name).unlink()
        return 0, f'  Logical volume "{lv.name}" successfully removed.\n', ""

    def _lvchange(self, options: dict[str, list[str]], operands: list[str]) -> Reply:
        lv = self._lv(operands)
        if isinstance(lv, str):
            return 5, "", lv
        if "deltag" in options:
            lv.tags = [tag for tag in lv.tags if tag not in options["deltag"]]
        elif "refresh" in options:
            assert lv.active
            self.activate(lv.name)
            if not self.gone & set(lv.taken):
                lv.leg_left = None  # brought into step again
        else:
            assert options["activate"] == ["y"] and "ignoreactivationskip" in options
            if lv.legs or (lv.pool and self.lvs[lv.pool].legs):
                return 5, "", f"  Activation of {lv.name} is prohibited while {lv.name}_rimage_0 is active.\n"
            if lv.half_made:
                return 5, "", f"  Refusing activation of RAID LV {self.vg}/{lv.name} with visible SubLVs.\n"
            self.activate(lv.name)
        return 0, "", ""

    def _dmsetup(self, rest: list[str]) -> Reply:
        if rest[0] == "info":
            assert rest[1:] == ["--columns", "--noheadings", "--separator=:", "--options=name,uuid"]
            uuid = "LVM-" + self.vg_uuid.replace("-", "")
            lines = [f"{leg}:{uuid}{'x' * 32}" for lv in self.lvs.values() for leg in lv.legs]
            return 0, "\n".join(["other-device:CRYPT-1", *lines]) + "\n", ""
        if rest[0] == "status":
            assert rest[1:3] == ["--noflush", "--"] and len(rest) == 4
            lv = next(lv for lv in self.lvs.values() if f"{self.vg}-{lv.name.replace('-', '--')}" == rest[3])
            if not lv.active:
                return 1, "", "Device does not exist.\n"
            done = f"{float(lv.sync or 100):.0f}/100"
            return 0, f"0 {lv.extents << 11} raid {lv.kind} {len(lv.taken)} {lv.alive()} {done} idle 0 0 -\n", ""
        assert rest[:2] == ["remove", "--"] and len(rest) == 3
        for lv in self.lvs.values():
            if rest[2] in lv.legs:
                lv.legs.remove(rest[2])
                return 0, "", ""
        return 1, "", f"Device {rest[2]} not found\n"

    def _lv(self, operands: list[str]) -> FakeLv | str:
        (path,) = operands
        vg, _, name = path.partition("/")
        assert vg == self.vg and _NAME.fullmatch(name), path
        lv = self.lvs.get(name)
        return lv if lv is not None else f'  Failed to find logical volume "{path}"\n'


class FakeNodes(DeviceNodes):
    """The device nodes of a FakeLvm: what stat and sysfs would say."""

    def __init__(self, lvm: FakeLvm) -> None:
        super().__init__(dev=lvm.folder)
        self._lvm = lvm
        self.wrong: dict[str, str] = {}  # device-mapper uuids that are not what LVM says

    def look(self, vg: str, name: str) -> Node | None:
        """See DeviceNodes.look."""
        lv = self._lvm.lvs.get(name)
        if vg != self._lvm.vg or lv is None or not lv.active:
            return None
        extents = lv.extents if lv.table_extents is None else lv.table_extents
        uuid = self.wrong.get(name, f"LVM-{self._lvm.vg_uuid}{lv.uuid}".replace("-", "").replace("LVM", "LVM-", 1))
        return Node(self.path(vg, name), extents * self._lvm.extent, uuid, lv.suspended)


def _parse(program: str, arguments: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    options: dict[str, list[str]] = {}
    operands: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            operands = arguments[position + 1 :]
            break
        assert argument.startswith("--"), f"{program}: {argument}: only long options, operands after --"
        key, _, value = argument[2:].partition("=")
        assert key in _COMMON | _OPTIONS[program], f"{program}: unknown option {argument}"
        options.setdefault(key, []).append(value)
    return options, operands
