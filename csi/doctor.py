"""`snode doctor`: what this machine lacks for its roles, and the repair for each fault. Changes nothing."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from csi.claims import folder_problem
from csi.config import Config, LvmPool, LvmThinPool
from csi.deadline import Deadline
from csi.doctor_container import HostFolders, network_findings
from csi.doctor_host import ERROR, OK, WARNING, Finding, Host, told
from csi.doctor_pools import Pools
from csi.doctor_portals import portal_findings
from csi.errors import DriverError
from csi.model import NodeId
from csi.run import HOST_ROOT, SubprocessRunner, host_problem

_SECONDS = 20.0

#: Which Debian package has a tool; other distributions call most of them the same.
_PACKAGES = {
    "losetup": "mount", "mount": "mount", "umount": "mount",
    "wipefs": "util-linux", "mkfs.ext4": "e2fsprogs", "e2fsck": "e2fsprogs", "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs", "xfs_growfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs",
    "btrfs": "btrfs-progs", "modprobe": "kmod", "lvm": "lvm2", "tgtd": "tgt", "iscsiadm": "open-iscsi",
    "thin_check": "thin-provisioning-tools",
}  # fmt: skip
_NODE_TOOLS = ("mount", "umount", "wipefs", "mkfs.ext4", "e2fsck", "resize2fs")
#: Missing ones cost a filesystem, not the node.
_OPTIONAL_NODE_TOOLS = {"mkfs.xfs": "xfs", "xfs_growfs": "xfs", "mkfs.btrfs": "btrfs", "btrfs": "btrfs"}
#: What says that a module is there when it is built into the kernel.
_SIGNS = {
    "loop": ("dev/loop-control", "sys/module/loop"),
    "dm_mod": ("dev/mapper/control", "sys/class/misc/device-mapper"),
}


def examine(config: Config, *, role: str | None = None, host: Host | None = None) -> list[Finding]:
    """Look at everything that a role ("controller", "node", "all"; None = all) needs on this machine."""
    return list(_Doctor(config, role or "all", host or _host(config)).findings())


def _host(config: Config) -> Host:
    """This machine; from a container that runs the host's tools, the host."""
    if config.tools == "host":
        return Host(runner=SubprocessRunner(host_tools=True), root=HOST_ROOT)
    return Host()


class _Doctor:
    def __init__(self, config: Config, role: str, host: Host) -> None:
        self._config = config
        self._host = host
        self._deadline = Deadline.after(_SECONDS)
        self._controller = role in ("controller", "all")
        self._node = role in ("node", "all")
        self._exported = any(pool.export == "tgt" for pool in config.pools.values())
        # A node alone can't know its SNODEs' pools, so iSCSI is always looked at there.
        self._initiator = self._node and (self._exported or role == "node")
        self._local = any(pool.export == "none" for pool in config.pools.values()) and role == "all"

    def findings(self) -> Iterator[Finding]:
        pools = ", ".join(sorted(self._config.pools))
        yield Finding(OK, "settings", f"valid; endpoint {self._config.endpoint}, pools: {pools}")
        if self._host.uid != 0:
            yield Finding(ERROR, "user", "not root; devices, mounts and tgtd obey root alone", "run it with sudo")
        yield from self._state_dir()
        if self._config.tools == "host":
            problem = host_problem()
            yield from told(ERROR, "host's tools", [problem] if problem else [])
            if not problem:
                yield Finding(OK, "host's tools", "are run among the host's mounts")
                yield from HostFolders(
                    self._config, self._host, controller=self._controller, node=self._node
                ).findings()
                if self._initiator:
                    yield from network_findings(self._host)
        yield from self._certificates()
        yield from self._tools()
        yield from self._modules()
        if self._controller:
            yield from Pools(self._config, self._host, self._deadline).findings()
            if self._exported:
                yield from self._tgtd()
        if self._node:
            yield from self._node_id()
            if self._initiator:
                yield from self._iscsi()
            yield from self._propagation()

    # -- files -------------------------------------------------------------------------------------------------------

    def _state_dir(self) -> Iterator[Finding]:
        folder = self._config.state_dir
        if not folder.exists():
            yield Finding(OK, "state_dir", f"{folder} does not exist yet; the driver makes it")
            return
        if not folder.is_dir():
            yield Finding(ERROR, "state_dir", f"{folder} is not a folder", "set another state_dir, or move it away")
            return
        text, repair = folder_problem(folder, uid=0)
        if text:
            yield Finding(ERROR, "state_dir", f"{text}; the driver refuses it", repair)
        elif folder.stat().st_mode & 0o077:
            mode = f"{folder.stat().st_mode & 0o777:04o}"
            text = f"{folder} has mode {mode}; its records hold secrets"
            yield Finding(ERROR, "state_dir", text, f"chmod 0700 {folder}")
        else:
            yield Finding(OK, "state_dir", f"{folder} is for root alone")

    def _certificates(self) -> Iterator[Finding]:
        tls = self._config.tls
        if tls is None:
            return
        from csi.certs import problems, read

        found = problems(
            tls,
            server=self._config.endpoint.socket is None or self._config.listen is not None,
            docker_node=self._config.node.name if self._config.docker.controller else "",
        )
        for is_error, problem in found:
            yield from told(ERROR if is_error else WARNING, "certificate", [problem])
        if not found:
            certificate = read(tls.cert)
            text = f"{tls.cert} is {certificate.name}'s ({', '.join(certificate.roles)})"
            yield Finding(OK, "certificate", f"{text} and holds for {certificate.days_left()} days more")

    def _tools(self) -> Iterator[Finding]:
        needed = set(_NODE_TOOLS) if self._node else set()
        optional = dict(_OPTIONAL_NODE_TOOLS) if self._node else {}
        pools = self._config.pools.values()
        if self._local:
            needed.add("losetup")
        if self._initiator:
            needed.add("iscsiadm")
        if self._controller and any(isinstance(pool, LvmPool | LvmThinPool) for pool in pools):
            needed.add("lvm")
        if self._controller and any(isinstance(pool, LvmThinPool) for pool in pools):
            needed.add("thin_check")
        if self._controller and self._exported:
            needed.add("tgtd")
        missing = [tool for tool in sorted(needed) if not self._host.has(tool)]
        for tool in missing:
            yield Finding(ERROR, "tools", f"{tool} is missing", f"apt-get install {_PACKAGES[tool]}")
        for tool, fs_type in optional.items():
            if not self._host.has(tool):
                text = f"{tool} is missing: volumes with fs_type {fs_type} are refused"
                yield Finding(WARNING, "tools", text, f"apt-get install {_PACKAGES[tool]}")
        if not missing:
            yield Finding(OK, "tools", ", ".join(sorted(needed)) or "none needed")

    # -- kernel ------------------------------------------------------------------------------------------------------

    def _modules(self) -> Iterator[Finding]:
        needed = set()
        pools = self._config.pools.values()
        if self._local:
            needed.add("loop")
        if self._controller and any(isinstance(pool, LvmPool | LvmThinPool) for pool in pools):
            needed.add("dm_mod")
        if self._controller and any(isinstance(pool, LvmThinPool) for pool in pools):
            needed.add("dm_thin_pool")
        if self._controller and any(isinstance(pool, LvmPool) and pool.layout.startswith("raid") for pool in pools):
            needed.add("dm_raid")
        for module in sorted(needed):
            how = self._module(module)
            if how:
                yield Finding(OK, "kernel module", f"{module} {how}")
            else:
                repair = (
                    f"install the kernel's full module package, then modprobe {module} (for a container: on the host)"
                )
                yield Finding(ERROR, "kernel module", f"{module} is not loaded and modprobe does not find it", repair)

    def _module(self, name: str) -> str:
        """How a module is there, or "" when it is not."""
        signs = (*_SIGNS.get(name, ()), f"sys/module/{name}")
        if any((self._host.root / sign).exists() for sign in signs):
            return "is loaded"
        builtin = self._host.root / "lib/modules" / self._host.release / "modules.builtin"
        if builtin.exists() and re.search(rf"/{name.replace('_', '[-_]')}\.ko$", builtin.read_text(), re.MULTILINE):
            return "is part of the kernel"
        argv = ["modprobe", "--dry-run", "--quiet", name]
        try:
            found = self._host.runner.run(argv, deadline=self._deadline, read_only=True, ok=None)
        except DriverError:
            return ""
        return "can be loaded" if found.returncode == 0 else ""

    # -- daemons -----------------------------------------------------------------------------------------------------

    def _tgtd(self) -> Iterator[Finding]:
        from csi.exports.tgt import TgtExport

        socket = self._config.controller.tgt_socket
        export = TgtExport(socket, portals=self._config.controller.portals, runner=self._host.runner)
        yield from self._told("tgtd", export.problems, f"answers at {socket} and is ready")
        yield from portal_findings(self._config.controller.portals)

    def _iscsi(self) -> Iterator[Finding]:
        from csi.connectors.iscsi import IscsiConnector

        connector = IscsiConnector(self._host.runner, initiator_file=self._config.node.initiator_file)
        yield from self._told("iscsi", connector.problems, "initiator name, iscsid and kernel module are ready")

    def _told(self, subject: str, check: Callable[[Deadline], list[str]], well: str) -> Iterator[Finding]:
        try:
            problems = check(self._deadline)
        except DriverError as error:
            problems = [str(error)]
        yield from told(ERROR, subject, problems)
        if not problems:
            yield Finding(OK, subject, well)

    def _node_id(self) -> Iterator[Finding]:
        """CSI carries 192 bytes. The key is left to the driver: all keys are of one length."""
        from csi.connectors.initiator import initiator_name

        try:
            initiator = initiator_name(self._config.node.initiator_file)
        except DriverError:
            initiator = ""  # told by the check of iSCSI, where it is needed
        node_id = NodeId(self._config.node.name, public_key="-" * 43, initiator=initiator)
        yield from told(ERROR, "node id", [node_id.problem()] if node_id.problem() else [])

    def _propagation(self) -> Iterator[Finding]:
        """Mounts made below the roots must reach the host and its containers, else a container writes beside them.

        With the host's tools they are made on the host, and must be seen from here.
        """
        host = self._config.tools == "host"
        wanted = "HostToContainer" if host else "Bidirectional"
        ours = self._mounts("self", tags=("shared:", "master:") if host else ("shared:",))
        first = self._mounts("1", tags=("shared:",))
        for root in self._config.node.target_roots or (Path("/"),):
            level = ERROR if self._config.node.target_roots else WARNING
            if not root.exists():
                yield Finding(level, "mounts", f"{root} does not exist", "correct node.target_roots")
                continue
            group = _peer_group(ours, root)
            if not group:
                text = f"mounts below {root} are private: containers and the host do not see them"
                repair = f"on the host: mount --make-rshared {root}; in a pod: mountPropagation: {wanted}"
                yield Finding(level, "mounts", text, repair)
            elif first and group not in first.values():
                text = f"mounts below {root} are shared, but not with the host's first process"
                yield Finding(level, "mounts", text, f"mount the host's folder with mountPropagation: {wanted}")
            else:
                yield Finding(OK, "mounts", f"mounts below {root} are seen by the host and its containers")

    def _mounts(self, pid: str, *, tags: tuple[str, ...]) -> dict[Path, str]:
        """Mount points of a process, with their peer group ("" = private)."""
        try:
            text = (self._host.root / "proc" / pid / "mountinfo").read_text(errors="surrogateescape")
        except OSError:
            return {}
        mounts = {}
        for line in text.splitlines():
            before, _, _ = line.partition(" - ")
            fields = before.split()
            group = next((tag.partition(":")[2] for tag in fields[6:] if tag.startswith(tags)), "")
            mounts[Path(fields[4])] = group
        return mounts


def _peer_group(mounts: dict[Path, str], path: Path) -> str:
    """The peer group of the mount that a path lies on."""
    for folder in (path, *path.parents):
        if folder in mounts:
            return mounts[folder]
    return ""
