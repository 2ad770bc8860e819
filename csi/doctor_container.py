"""What `snode doctor` says in a container that runs the host's tools: whether it has the host's folders and network."""

from collections.abc import Iterator
from pathlib import Path

from csi.config import Config, FilesPool
from csi.connectors.node_records import DATABASE_FOLDERS
from csi.doctor_host import ERROR, OK, Finding, Host

_REPAIR = "mount the host's folder there: a hostPath volume (Kubernetes), --volume={0}:{0} (Docker, Nomad)"
_NETWORK_REPAIR = 'hostNetwork: true (Kubernetes), network_mode = "host" (Nomad), --network=host (Docker)'


def network_findings(host: Host) -> Iterator[Finding]:
    """Whether we are in the host's network, where alone the kernel's iSCSI answers."""
    ours, theirs = (host.root / "proc" / process / "ns/net" for process in ("self", "1"))
    try:
        same = ours.readlink() == theirs.readlink()
    except OSError:
        return  # that the host's processes can't be seen is told elsewhere
    if same:
        yield Finding(OK, "host's network", "is ours")
    else:
        text = "the container has a network of its own: iSCSI sessions that are stuck can't be brought back from there"
        yield Finding(ERROR, "host's network", text, _NETWORK_REPAIR)


class HostFolders:
    """The folders that the driver and the host's tools must see alike, at the same path."""

    def __init__(self, config: Config, host: Host, *, controller: bool, node: bool) -> None:
        self._config = config
        self._host = host
        self._controller = controller
        self._node = node

    def findings(self) -> Iterator[Finding]:
        """What is missing here, or is the container's own and not the host's."""
        wanted = dict(self._wanted())
        faults = [fault for path, why in wanted.items() if (fault := self._fault(path, why))]
        yield from faults
        if not faults:
            yield Finding(OK, "host's folders", ", ".join(sorted(map(str, wanted))))

    def _wanted(self) -> Iterator[tuple[Path, str]]:
        """Folders, and what each is for."""
        config = self._config
        yield Path("/dev"), "disks that appear after the container's start are seen there only"
        yield config.state_dir, "records would go with the container"
        exports = {pool.export for pool in config.pools.values()}
        if self._controller and "tgt" in exports:
            yield config.controller.tgt_socket.parent, "the host's tgtd answers there"
        for name, pool in config.pools.items():
            if isinstance(pool, FilesPool) and (self._controller or pool.export == "none"):
                yield pool.directory, f"volumes of pool {name} would go with the container"
        if self._node:
            yield from self._wanted_on_a_node()

    def _wanted_on_a_node(self) -> Iterator[tuple[Path, str]]:
        node, endpoint = self._config.node, self._config.endpoint
        for folder in {node.initiator_file.parent, *DATABASE_FOLDERS}:
            if self._host.path(folder).exists():
                yield folder, "the host's iscsid keeps its records there"
        for folder in node.target_roots:
            yield folder, "volumes are mounted there"
        if node.kubelet_registry is not None:
            yield node.kubelet_registry, "kubelet looks for drivers there"
            if endpoint.socket is not None:
                yield endpoint.socket.parent, "kubelet calls the driver there"

    def _fault(self, path: Path, why: str) -> Finding | None:
        """None when it is the host's; a folder that is not there yet is judged by the one that it will be made in."""
        seen = path
        while not self._host.path(seen).exists() and seen != seen.parent:
            seen = seen.parent
        if seen.exists() and seen.samefile(self._host.path(seen)):
            return None
        fault = "is not the host's" if seen.exists() else "is missing in the container"
        return Finding(ERROR, "host's folders", f"{path} {fault}: {why}", _REPAIR.format(path))
