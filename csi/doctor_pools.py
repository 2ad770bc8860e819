"""What `snode doctor` says of the pools."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from csi.config import Config, FilesPool, LvmPool, LvmThinPool
from csi.deadline import Deadline
from csi.doctor_host import ERROR, OK, WARNING, Finding, Host
from csi.errors import DriverError

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
        for name, pool in self._config.pools.items():
            if isinstance(pool, FilesPool):
                yield from self._files_pool(name, pool)
            else:
                yield from self._lvm_pool(name, pool)

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
        subject = f"pool {name}"
        report = self._vg(pool)
        if isinstance(report, str):
            yield Finding(ERROR, subject, report, f"vgcreate --metadatasize 64m {pool.vg} DISK...")
            return
        size, free = int(report["vg_mda_size"]), int(report["vg_mda_free"])
        spare = 100 * free // max(size, 1)
        if size < _SMALL_METADATA_BYTES:
            text = (
                f"volume group {pool.vg}: metadata area of {size >> 10} KiB, {spare} % free; about 450 bytes a volume"
            )
            repair = "it can't be enlarged later: for a large pool make the group anew with vgcreate --metadatasize 64m"
            yield Finding(ERROR if spare < 10 else WARNING, subject, text, repair)
        else:
            yield Finding(OK, subject, f"volume group {pool.vg}: metadata area of {size >> 20} MiB, {spare} % free")
        if report.get("vg_autoactivation") == "enabled":
            text = f"volume group {pool.vg} is activated at boot, before the driver's filter is in place"
            yield Finding(WARNING, subject, text, f"vgchange --setautoactivation n {pool.vg}")
        if isinstance(pool, LvmThinPool):
            yield from self._thin_pool(subject, pool)

    def _vg(self, pool: LvmPool | LvmThinPool) -> "dict[str, str] | str":
        """A row of `vgs`, or a sentence that says why there is none."""
        options = "vg_name,vg_mda_size,vg_mda_free,vg_autoactivation"
        rows = self._report("vgs", "vg", options, pool.vg, pool.devices)
        if isinstance(rows, str):
            return rows
        return rows[0] if rows else f"volume group {pool.vg} does not exist"

    def _thin_pool(self, subject: str, pool: LvmThinPool) -> Iterator[Finding]:
        rows = self._report("lvs", "lv", "lv_name,segtype", f"{pool.vg}/{pool.thin_pool}", pool.devices)
        if isinstance(rows, str) or not rows or rows[0]["segtype"] != "thin-pool":
            text = f"{pool.vg}/{pool.thin_pool} is not a thin pool"
            repair = f"lvcreate --type thin-pool --poolmetadatasize 1g -l 90%FREE -n {pool.thin_pool} {pool.vg}"
            yield Finding(ERROR, subject, text, repair)
        else:
            yield Finding(OK, subject, f"thin pool {pool.vg}/{pool.thin_pool}")

    def _report(
        self, command: str, section: str, options: str, name: str, devices: tuple[Path, ...]
    ) -> "list[dict[str, str]] | str":
        accepted = ",".join(f'"a|^{device}$|"' for device in devices)
        only = f'filter=[{accepted},"r|.*|"] ' if devices else ""
        config = f'devices{{{only}scan_lvs=0 hints="none"}} backup{{backup=0 archive=0}}'
        argv = ["lvm", command, f"--config={config}", "--reportformat=json", "--units=b", "--nosuffix"]
        argv += [f"--options={options}", "--", name]
        try:
            result = self._host.runner.run(argv, deadline=self._deadline, read_only=True, ok=None)
        except DriverError as error:
            return str(error)
        if result.returncode != 0:
            words = "; ".join(line.strip() for line in result.stderr.splitlines() if line.strip())
            return words or f"lvm {command} {name} failed"
        rows: list[dict[str, str]] = json.loads(result.stdout)["report"][0][section]
        return rows
