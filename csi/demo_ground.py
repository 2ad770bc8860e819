"""What the demo stands on: a throw-away pool, real LVM + tgt + iSCSI where the kernel has them, else files.

Everything lies in one folder and is undone by `close`, in reverse order, also after a failure.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from csi.deadline import Deadline, wait_until
from csi.demo_service import Service
from csi.errors import DriverError, Unavailable
from csi.run import Runner

_PORTAL = "127.0.0.1:13260"
_CONTROL_PORT = "3270"
_ISCSID_SOCKET = "\0ISCSIADM_ABSTRACT_NAMESPACE"
_DISK_BYTES = 2 << 30

_TOML = """\
state_dir = "{folder}/state"
endpoint = "unix://{folder}/run/csi.sock"
log_level = "debug"

[controller]
default_pool = "demo"
{controller}

[node]
name = "demo"
{node}

[pools.demo]
{pool}
"""


def why_not_iscsi(runner: Runner, deadline: Deadline) -> str:
    """Why LVM + tgt + iSCSI can't be shown here, or "" when it can."""
    for module, sign, what in (
        ("dm_mod", Path("/dev/mapper/control"), "device-mapper, which LVM needs"),
        ("iscsi_tcp", Path("/sys/class/iscsi_transport/tcp"), "the iSCSI initiator"),
        ("sd_mod", Path("/sys/bus/scsi/drivers/sd"), "SCSI disks"),
    ):
        if not sign.exists():
            runner.run(["modprobe", "-q", module], deadline=deadline, ok=None)
        if not sign.exists():
            return f"this kernel lacks {what} (module {module})"
    return ""


class Ground:
    """A folder with a pool, its configuration file, and what must run beside it."""

    def __init__(self, runner: Runner, deadline: Deadline) -> None:
        self._runner = runner
        self._undo = ExitStack()
        if not Path("/dev/loop-control").exists():
            runner.run(["modprobe", "-q", "loop"], deadline=deadline, ok=None)
        if not Path("/dev/loop-control").exists():
            raise Unavailable(
                "/dev/loop-control is missing: no loop devices, which the demo needs; run `modprobe loop` on the host "
                "(in a container, mount the host's /dev and run it privileged)"
            )
        self.reason = why_not_iscsi(runner, deadline)
        self.folder = Path(tempfile.mkdtemp(prefix="snode-demo-", dir="/var/tmp"))
        self._undo.callback(self._remove_folder)
        self.vg = f"snodedemo{os.getpid()}"
        try:
            config = self._files() if self.reason else self._lvm(deadline)
        except BaseException:
            self.close()
            raise
        self.config = self.folder / "demo.toml"
        self.config.write_text(_TOML.format(folder=self.folder, **config))
        self.endpoint = f"unix://{self.folder}/run/csi.sock"

    @property
    def lvm(self) -> bool:
        """True if it stands on LVM + tgt + iSCSI."""
        return not self.reason

    def on_close(self, undo: Callable[[], object]) -> None:
        """Have something undone before the ground goes."""
        self._undo.callback(undo)

    def close(self) -> None:
        """Undo everything."""
        self._undo.close()

    def left_behind(self) -> list[str]:
        """What still exists of the walk: volumes, loop devices, sessions, mounts."""
        folder = str(self.folder)
        left = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if folder in line]
        left += [str(path) for path in self.folder.glob("pool/v-*")]
        for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
            if loop.read_text().startswith(f"{folder}/pool"):
                left.append(f"/dev/{loop.parent.parent.name}")
        for session in Path("/sys/class/iscsi_session").glob("*/targetname"):
            if "io.snode:" in session.read_text():
                left.append(f"session to {session.read_text().strip()}")
        if self.lvm:
            left += [str(path) for path in Path(f"/dev/{self.vg}").glob("*")]
        return left

    def _files(self) -> dict[str, str]:
        return {
            "controller": "",
            "node": "",
            "pool": f'type = "files"\ndirectory = "{self.folder}/pool"',
        }

    def _lvm(self, deadline: Deadline) -> dict[str, str]:
        device = self._disk(deadline)
        self._volume_group(device, deadline)
        socket_path = self._tgtd(deadline)
        initiator = self._iscsid(deadline)
        return {
            "controller": f'portals = ["{_PORTAL}"]\ntgt_socket = "{socket_path}"',
            "node": f'initiator_file = "{initiator}"',
            "pool": f'type = "lvm"\nvg = "{self.vg}"\ndevices = ["{device}"]',
        }

    def _disk(self, deadline: Deadline) -> str:
        image = self.folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        found = self._runner.run(["losetup", "--find", "--show", "--", str(image)], deadline=deadline)
        device = found.stdout.strip()
        self._undo.callback(self._run, "losetup", "--detach", device)
        return device

    def _volume_group(self, device: str, deadline: Deadline) -> None:
        devices = f'devices {{ filter=["a|^{device}$|","r|.*|"] use_devicesfile=0 scan_lvs=0 }}'
        ours = f"{devices} backup {{ backup=0 archive=0 }}"
        self._runner.run(
            ["vgcreate", "--config", ours, "--metadatasize", "64m", self.vg, device],
            deadline=deadline,
        )
        self._undo.callback(self._run, "vgremove", "--config", ours, "--force", "--yes", self.vg)

    def _tgtd(self, deadline: Deadline) -> Path:
        """A tgtd of our own, so that one that serves already is left alone."""
        path = self.folder / "tgtd"
        argv = [
            "tgtd",
            "--foreground",
            "--control-port",
            _CONTROL_PORT,
            "--iscsi",
            f"portal={_PORTAL}",
        ]
        service = Service(
            argv,
            log=self.folder / "tgtd.log",
            environment={"TGT_IPC_SOCKET": str(path)},
        )
        self._undo.callback(service.stop)
        full = path.with_name(f"{path.name}.{_CONTROL_PORT}")
        self._wait(service, full.exists, deadline, what="tgtd")
        return full

    def _iscsid(self, deadline: Deadline) -> Path:
        """There is one iscsid for each kernel: the machine's if it runs, else one of our own for this while."""
        usual = Path("/etc/iscsi/initiatorname.iscsi")
        if _listens(_ISCSID_SOCKET):
            return usual
        ours = self.folder / "initiatorname.iscsi"
        ours.write_text(f"InitiatorName=iqn.2026-11.io.snode:demo-{os.getpid()}\n")
        Path("/run/lock/iscsi").mkdir(exist_ok=True)
        argv = ["iscsid", "--foreground", f"--initiatorname={ours}"]
        service = Service(argv, log=self.folder / "iscsid.log")
        self._undo.callback(service.stop)
        self._wait(service, lambda: _listens(_ISCSID_SOCKET), deadline, what="iscsid")
        return ours

    def _wait(
        self,
        service: Service,
        ready: Callable[[], bool],
        deadline: Deadline,
        *,
        what: str,
    ) -> None:
        def look() -> bool:
            if not service.running:
                words = service.log.read_text(errors="replace").strip()[-300:]
                raise Unavailable(f"{what} did not start: {words or 'it said nothing'}")
            return ready()

        wait_until(look, deadline.within(15), what=f"{what} to start")

    def _run(self, *argv: str) -> None:
        """A step of undoing: an error is told, and the next step is done all the same."""
        try:
            self._runner.run(list(argv), deadline=Deadline.after(30))
        except DriverError as error:
            print(f"  while cleaning up: {error}")

    def _remove_folder(self) -> None:
        if any(str(self.folder) in line for line in Path("/proc/self/mountinfo").read_text().splitlines()):
            print(f"  something is still mounted below {self.folder}; it is left as it is")
            return
        shutil.rmtree(self.folder)


def _listens(abstract: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(abstract)
        except OSError:
            return False
        return True
