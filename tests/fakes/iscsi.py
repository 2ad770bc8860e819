"""An iSCSI initiator in a folder: iscsiadm, tee and blockdev as programs, and the sysfs, /dev and node database they
change. Keeps state; an argument that it does not know fails the test."""

import os
import shutil
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi.connectors.iscsi import IscsiConnector
from csi.model import TARGET_PREFIX, Attachment, Chap, IscsiPath, scsi_id_of
from csi.run import Boundary, no_boundary
from tests.fakes.runner import FakeRunner, Reply

OK: Reply = (0, "", "")
CHAP = Chap(
    user="user0123456789", secret="SENTINELsecret1", mutual_user="target01234567", mutual_secret="SENTINELsecret2"
)


@dataclass
class FakeLun:
    """What a target offers."""

    scsi_id: str
    size_bytes: int
    readonly: bool = False
    kind: str = "0"  # the SCSI device type: 0 is a disk, 12 a controller
    after_scans: int = 0  # so many scans find nothing


@dataclass
class FakeTarget:
    """A target on the SNODE."""

    lun: FakeLun | None
    chap: Chap | None = CHAP


@dataclass
class _Disk:
    name: str
    unit: Path


@dataclass
class _FakeSession:
    number: int
    target: str
    folder: Path
    disks: list[_Disk] = field(default_factory=list)


class FakeIscsi:
    """The node and its target server. `close` ends the listening socket."""

    def __init__(self, root: Path, *, boundary: Boundary = no_boundary) -> None:
        self.sysfs, self.dev, self.database = root / "sys", root / "dev", root / "etc"
        self.mountinfo, self.initiator_file = root / "mountinfo", root / "initiatorname.iscsi"
        for folder in ("class/iscsi_session", "class/scsi_host", "class/iscsi_transport/tcp", "block"):
            (self.sysfs / folder).mkdir(parents=True)
        self.dev.mkdir()
        self.database.mkdir()
        self.mountinfo.write_text("20 1 8:1 / / rw - ext4 /dev/vda1 rw\n")
        self.initiator_file.write_text("InitiatorName=iqn.1993-08.org.debian:01:d680fb2fb0aa\n")
        self.targets: dict[str, FakeTarget] = {}
        self.sessions: dict[int, _FakeSession] = {}
        self.held_paths: set[Path] = set()
        self._next = 1
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.portal = f"127.0.0.1:{self._listener.getsockname()[1]}"
        programs = {"iscsiadm": self._iscsiadm, "attribute_helper": self._write, "flush_helper": self._flush}
        self.runner = FakeRunner(programs, boundary=boundary)

    def close(self) -> None:
        self._listener.close()

    def connector(self, *, boundary: Boundary = no_boundary) -> IscsiConnector:
        """A fresh connector on this node, as after a restart of the driver."""
        return IscsiConnector(
            self.runner,
            sysfs=self.sysfs,
            dev=self.dev,
            mount_tables=[self.mountinfo],
            database_folders=[self.database],
            initiator_file=self.initiator_file,
            block=self,
            boundary=boundary,
        )

    def publish(
        self, volume_id: str, *, generation: str = "0123456789abcdef", size_bytes: int = 1 << 30, readonly: bool = False
    ) -> Attachment:
        """Offer a volume and return what its publish context says."""
        target = f"{TARGET_PREFIX}:{volume_id}:{generation}"
        self.targets[target] = FakeTarget(FakeLun(scsi_id_of(volume_id), size_bytes, readonly))
        return Attachment(
            volume_id=volume_id,
            protocol="iscsi",
            generation=generation,
            size_bytes=size_bytes,
            readonly=readonly,
            may_format=True,
            scsi_id=scsi_id_of(volume_id),
            paths=(IscsiPath(target, self.portal, 1),),
            chap=CHAP,
        )

    def lun_of(self, attachment: Attachment) -> FakeLun:
        lun = self.targets[attachment.paths[0].target].lun
        assert lun is not None
        return lun

    def mount(self, device: Path, major_minor: str, where: str = "/mnt/x") -> None:
        with self.mountinfo.open("a") as file:
            file.write(f"40 20 {major_minor} / {where} rw,relatime shared:1 - ext4 {device} rw\n")

    def unmount_all(self) -> None:
        self.mountinfo.write_text("20 1 8:1 / / rw - ext4 /dev/vda1 rw\n")

    def set_state(self, session_state: str, disk_state: str) -> None:
        """Lose the connections, or get them back."""
        for session in self.sessions.values():
            (_inner(session) / "state").write_text(session_state + "\n")
            for disk in session.disks:
                (disk.unit / "state").write_text(disk_state + "\n")

    def add_holder(self, disk: str, *, name: str, uuid: str, label: str) -> None:
        """A device mapper device that has taken the disk."""
        (self.sysfs / "block" / disk / "holders" / name).touch()
        folder = self.sysfs / "block" / name / "dm"
        folder.mkdir(parents=True)
        (folder / "uuid").write_text(uuid + "\n")
        (folder / "name").write_text(label + "\n")

    def leftovers(self) -> list[str]:
        """What is still there of any attachment: sessions, disks, nodes, records, temporary files."""
        found = [path for folder in ("class/iscsi_session", "block") for path in (self.sysfs / folder).iterdir()]
        found += [*self.dev.iterdir(), *self.database.glob("nodes/*"), *self.database.glob("static/*")]
        found += self.database.glob(".*")
        return sorted(path.name for path in found)

    # BlockDevices

    def names(self, path: Path) -> frozenset[str]:
        disk, session = self._find(path.name)
        lun = self.targets[session.target].lun
        assert lun is not None, f"{disk.name}: INQUIRY without a LUN"
        return frozenset({"naa.3000000100000001", f"naa.{lun.scsi_id}"})

    def held(self, path: Path) -> bool:
        return path in self.held_paths

    # programs

    def _iscsiadm(self, argv: Sequence[str], _input: str | None) -> Reply:
        options = dict(word.partition("=")[::2] for word in argv[1:])
        match options:
            case {"--mode": "node", "--targetname": target, "--portal": portal, "--op": "new"}:
                return self._new_record(target, portal)
            case {"--mode": "node", "--targetname": target, "--portal": portal, "--login": ""}:
                return self._login(target, portal)
            case {"--mode": "session", "--sid": number, "--logout": ""}:
                return self._end_session(int(number))
        raise AssertionError(f"iscsiadm: unknown call {argv}")

    def _record(self, target: str, portal: str) -> Path:
        host, _, rest = portal.rpartition(":")
        return self.database / "nodes" / target / f"{host.strip('[]')},{rest}" / "default"

    def _new_record(self, target: str, portal: str) -> Reply:
        record = self._record(target, portal)
        if record.exists() and "# END RECORD" not in record.read_text():
            return 6, "", "iscsiadm: Error while adding record: encountered iSCSI database failure"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(
            f"# BEGIN RECORD 2.1.8\nnode.name = {target}\nnode.tpgt = 1\nnode.startup = automatic\n"
            "node.session.scan = auto\nnode.session.auth.authmethod = None\nnode.conn[0].startup = automatic\n"
            "# END RECORD\n"
        )
        record.chmod(0o600)
        (self.database / "static").mkdir(exist_ok=True)
        link = self.database / "static" / f"{target},{record.parent.name},default"
        link.unlink(missing_ok=True)
        link.symlink_to(record.parent)
        return OK

    def _login(self, target: str, portal: str) -> Reply:
        record = self._record(target, portal)
        if not record.is_file():
            return 21, "", "iscsiadm: No records found"
        if any(session.target == target for session in self.sessions.values()):
            return 15, "", "iscsiadm: default: 1 session requested, but 1 already present."
        found = self.targets.get(target)
        if found is None:
            return 19, "", "iscsiadm: initiator reported error (19)"
        settings = dict(line.partition(" = ")[::2] for line in record.read_text().splitlines())
        keys = ("username", "password", "username_in", "password_in")
        shown = tuple(settings.get(f"node.session.auth.{key}") for key in keys)
        chap = found.chap
        if chap and shown != (chap.user, chap.secret, chap.mutual_user, chap.mutual_secret):
            return 24, "", "iscsiadm: initiator reported error (24)"
        assert settings["node.startup"] == settings["node.session.scan"] == "manual"
        self.make_session(target)
        return OK

    def make_session(self, target: str) -> None:
        """A session in the kernel, however it came about."""
        number = self._next
        self._next += 1
        folder = self.sysfs / "devices" / "platform" / f"host{number}" / f"session{number}"
        inner = folder / "iscsi_session" / folder.name
        inner.mkdir(parents=True)
        for name, text in {"targetname": target, "state": "LOGGED_IN", "target_id": "0"}.items():
            (inner / name).write_text(text + "\n")
        (inner / "device").symlink_to(folder)
        (self.sysfs / "class" / "iscsi_session" / folder.name).symlink_to(inner)
        host = self.sysfs / "class" / "scsi_host" / f"host{number}"
        host.mkdir()
        (host / "scan").touch()
        self.sessions[number] = _FakeSession(number, target, folder)

    def _end_session(self, number: int) -> Reply:
        session = self.sessions.pop(number, None)
        if session is None:
            return 22, "", "iscsiadm: Could not get session info"
        for disk in list(session.disks):
            self._remove(session, disk)
        (self.sysfs / "class" / "iscsi_session" / f"session{number}").unlink()
        shutil.rmtree(session.folder.parent)
        shutil.rmtree(self.sysfs / "class" / "scsi_host" / f"host{number}")
        return OK

    def _write(self, argv: Sequence[str], input: str | None) -> Reply:
        assert len(argv) == 5 and input is not None, argv
        path = Path(argv[4])
        assert path.is_relative_to(self.sysfs), path
        if not path.exists():
            return 1, "", f"{path}: No such file or directory"
        if path.name == "scan":
            assert input == "0 0 1\n", input
            self.scan(self.sessions[int(path.parent.name.removeprefix("host"))])
        elif path.name == "delete":
            session, disk = self._find_unit(path.parent)
            self._remove(session, disk)
        elif path.name == "rescan":
            disk, session = self._find(path.parent.parent.name)
            lun = self.targets[session.target].lun
            if lun:
                self._show(disk, lun)
        else:
            raise AssertionError(f"unknown sysfs file {path}")
        return OK

    def _flush(self, argv: Sequence[str], _input: str | None) -> Reply:
        assert len(argv) == 5, argv
        self._find(Path(argv[4]).name)
        return OK

    # the kernel

    def scan(self, session: _FakeSession) -> None:
        """Look for LUN 1 of a session."""
        target = self.targets.get(session.target)
        if target is None or target.lun is None or session.disks:
            return
        if target.lun.after_scans > 0:
            target.lun.after_scans -= 1
            return
        number = session.number
        unit = session.folder / f"target{number}:0:0" / f"{number}:0:0:1"
        unit.mkdir(parents=True)
        for name in ("delete", "rescan"):
            (unit / name).touch()
        (unit / "type").write_text(target.lun.kind + "\n")
        (unit / "state").write_text("running\n")
        name, major, minor = self.place_of(number)
        disk = _Disk(name, unit)
        session.disks.append(disk)
        if target.lun.kind == "0":
            block = unit / "block" / disk.name
            (block / "holders").mkdir(parents=True)
            (block / "dev").write_text(f"{major}:{minor}\n")
            (block / "device").symlink_to(unit)
            (self.sysfs / "block" / disk.name).symlink_to(block)
            os.mknod(self.dev / disk.name, stat.S_IFBLK | 0o600, os.makedev(major, minor))
            self._show(disk, target.lun)

    def place_of(self, number: int) -> tuple[str, int, int]:
        """Name, major and minor of the disk of a session."""
        return f"sd{chr(96 + number)}", 8, number * 16

    def _show(self, disk: _Disk, lun: FakeLun) -> None:
        block = disk.unit / "block" / disk.name
        (block / "size").write_text(f"{lun.size_bytes // 512}\n")
        (block / "ro").write_text(f"{int(lun.readonly)}\n")
        (disk.unit / "wwid").write_text(f"naa.{lun.scsi_id}\n")

    def _remove(self, session: _FakeSession, disk: _Disk) -> None:
        (self.sysfs / "block" / disk.name).unlink(missing_ok=True)
        (self.dev / disk.name).unlink(missing_ok=True)
        shutil.rmtree(disk.unit.parent)
        session.disks.remove(disk)

    def _find(self, name: str) -> tuple[_Disk, _FakeSession]:
        for session in self.sessions.values():
            for disk in session.disks:
                if disk.name == name:
                    return disk, session
        raise AssertionError(f"no disk {name}")

    def _find_unit(self, unit: Path) -> tuple[_FakeSession, _Disk]:
        for session in self.sessions.values():
            for disk in session.disks:
                if disk.unit == unit:
                    return session, disk
        raise AssertionError(f"no unit {unit}")


def _inner(session: _FakeSession) -> Path:
    return session.folder / "iscsi_session" / session.folder.name
