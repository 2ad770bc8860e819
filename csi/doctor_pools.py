"""What `snode doctor` says of the pools."""

import json
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from csi.config import Config, FilesPool, LvmPool, LvmThinPool
from csi.deadline import Deadline
from csi.doctor_host import ERROR, OK, WARNING, Finding, Host, told
from csi.errors import DriverError

if TYPE_CHECKING:
    from csi.backends.lvm_cli import Lvm

#: LVM's default of about half a MiB is full with some 1,100 volumes, and can't be enlarged later.
_SMALL_METADATA_BYTES = 16 << 20


class Pools:
    """The pools of a configuration, on a host."""

    def __init__(self, config: Config, host: Host, deadline: Deadline) -> None:
        self._config = config
        self._host = host
        self._deadline = deadline

    def findings(self) -> Iterator[Finding]:
        """What is right and wrong with each pool."""
        if any(not isinstance(pool, FilesPool) for pool in self._config.pools.values()) and self._scans_volumes():
            text = "LVM looks into logical volumes (devices/scan_lvs = 1): it activates what guests make in theirs"
            yield Finding(WARNING, "lvm", text, "set scan_lvs = 0 in the section devices of /etc/lvm/lvm.conf")
        for name, pool in self._config.pools.items():
            if isinstance(pool, FilesPool):
                yield from self._files_pool(name, pool)
            else:
                yield from self._lvm_pool(name, pool)

    def _scans_volumes(self) -> bool:
        """Whether LVM, when the machine itself calls it, looks into volumes. The driver's own commands never do."""
        argv = ["lvm", "lvmconfig", "--typeconfig=full", "devices/scan_lvs"]
        try:
            said = self._host.runner.run(argv, deadline=self._deadline, read_only=True, ok=None).stdout
        except DriverError:
            return False  # that lvm is missing is told elsewhere
        return said.strip() == "scan_lvs=1"

    def _files_pool(self, name: str, pool: FilesPool) -> Iterator[Finding]:
        folder = pool.directory
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            yield Finding(
                ERROR, f"pool {name}", f"{folder} is not a folder", f"move it away, or set pools.{name}.directory"
            )
            return
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize
        text = f"{pool.directory}: {free / (1 << 30):.1f} GiB free"
        if folder != pool.directory:
            text += "; the folder is made at the start"
        yield Finding(OK if free else ERROR, f"pool {name}", text, "" if free else "free space there")

    def _lvm_pool(self, name: str, pool: LvmPool | LvmThinPool) -> Iterator[Finding]:
        from csi.backends.lvm_cli import Lvm
        from csi.backends.lvm_trash import stuck
        from csi.backends.lvm_view import is_of_pool, sick

        subject = f"pool {name}"
        udev = self._host.root / "run/udev/control"
        # Without its state: the doctor writes nothing.
        lvm = Lvm(pool.vg, runner=self._host.runner, state=None, devices=pool.devices, udev=udev)
        try:
            report = lvm.report(self._deadline)
        except DriverError as error:
            yield Finding(ERROR, subject, str(error).partition(" -> ")[0], self._repair(name, pool, lvm))
            return
        known = self._known_uuid(name)
        if known and known != report.vg_uuid:
            text = f"volume group {pool.vg} is not the one that this pool was made on, which has the uuid {known}"
            yield Finding(ERROR, subject, text, f"bring its disks back, or set pools.{name}.vg to its name")
        yield _metadata(subject, pool.vg, size=report.mda_size_bytes, free=report.mda_free_bytes)
        if report.missing_pvs:
            text = f"volume group {pool.vg}: {report.missing_pvs} of its disks are missing"
            repair = f"bring them back (`pvs` names them), or give them up with `vgreduce --removemissing {pool.vg}`"
            yield Finding(ERROR, subject, text, repair)
        if lvm.is_activated_at_boot(self._deadline):
            text = f"volume group {pool.vg} is activated at boot, before the driver's filter is in place"
            yield Finding(WARNING, subject, text, f"vgchange --setautoactivation n {pool.vg}")
        space = pool.space()
        problems, warnings = space.problems(report), space.warnings(report)
        yield from told(ERROR, subject, problems)
        yield from told(WARNING, subject, warnings)
        yield from told(WARNING, subject, sick(report, pool=name, space=space, told=warnings))
        yield from told(WARNING, subject, stuck(report, mine=partial(is_of_pool, pool=name, space=space)))
        if isinstance(pool, LvmThinPool) and not problems:
            yield Finding(OK, subject, f"thin pool {pool.vg}/{pool.thin_pool}")

    def _repair(self, name: str, pool: LvmPool | LvmThinPool, lvm: "Lvm") -> str:
        """To make the group only when it surely never was: the advice would overwrite one that LVM fails to read."""
        try:
            # Others than root may not read the disks, which for LVM is the same as no group on them.
            absent = self._host.uid == 0 and not self._known_uuid(name) and lvm.is_absent(self._deadline)
        except DriverError:
            absent = False
        if absent:
            return f"vgcreate --metadatasize 64m {pool.vg} DISK..., or correct pools.{name}.vg"
        return f"see `vgs {pool.vg}` and `pvs`, bring its disks back, or correct pools.{name}.devices"

    def _known_uuid(self, name: str) -> str:
        """The uuid of the group that the pool was made on; "" when it was never used, or nobody can say."""
        try:
            record = self._config.state_dir / "pools" / name / "vg.json"
            return str(json.loads(record.read_text())["uuid"])
        except (OSError, ValueError, KeyError):
            return ""


def _metadata(subject: str, vg: str, *, size: int, free: int) -> Finding:
    spare = 100 * free // max(size, 1)
    if size >= _SMALL_METADATA_BYTES:
        return Finding(OK, subject, f"volume group {vg}: metadata area of {size >> 20} MiB, {spare} % free")
    text = f"volume group {vg}: metadata area of {size >> 10} KiB, {spare} % free; about 450 bytes a volume"
    repair = "it can't be enlarged later: for a large pool make the next group with a metadata area of 64 MiB"
    return Finding(ERROR if spare < 10 else WARNING, subject, text, repair)
