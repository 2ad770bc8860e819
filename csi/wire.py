"""From settings to a running driver: the only place that names concrete classes.

What a process does not need is not imported: a service has to start within half a second and idle in 60 MiB.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from csi import log
from csi.backends.base import Backend
from csi.background import Background, Readiness, end_signals
from csi.claims import claim_state_folder, claim_tgtd
from csi.config import AnyPool, Config, FilesPool
from csi.connectors.base import Connector
from csi.crash import boundary_from
from csi.errors import DriverError, Unavailable
from csi.exports.base import Export
from csi.locks import VolumeLocks
from csi.records import RecordStore
from csi.rpc.access import caller_of
from csi.rpc.method import Calls
from csi.rpc.server import Registration, Server, leave
from csi.run import HOST_ROOT, Boundary, Runner, SubprocessRunner, host_problem, no_boundary

if TYPE_CHECKING:
    from csi.docker.api import ApiServer
    from csi.rpc.kubelet import KubeletRegistration
    from csi.staging import Staging
    from csi.volumes import Volumes

#: Seconds between the rounds of background work, and between looks at what Probe answers.
TEND_SECONDS = 2.0
#: How long one of Docker's requests may take; mkfs of a large volume included.
DOCKER_SECONDS = 120.0
LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Driver:
    """The parts of one process; what it does not serve is None."""

    calls: Calls
    runner: SubprocessRunner
    boundary: Boundary
    readiness: Readiness
    volumes: "Volumes | None"
    staging: "Staging | None"


def serve(config: Config, *, roles: frozenset[str], docker: bool = False) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code. Raises DriverError when it can't start.

    docker: serve Docker's volume plugin API too.

    The signals only end the wait; everything else happens here, in the main thread.
    """
    ending = end_signals()
    log.set_up(level=config.log_level, json=config.log_format == "json")
    if config.tools == "host" and (problem := host_problem()):
        raise Unavailable(problem)
    claim_state_folder(config.state_dir, roles)
    if "controller" in roles and any(pool.export == "tgt" for pool in config.pools.values()):
        # The host's tgtd is claimed on the host: another container, or the host itself, may have a controller too.
        folder = HOST_ROOT / "run" if config.tools == "host" else Path("/run")
        claim_tgtd(config.controller.tgt_socket, folder=folder)
    driver = build(config, roles=roles, boundary=boundary_from(os.environ))
    server = Server(
        config.endpoint,
        calls=driver.calls,
        registrations=list(registrations(driver, config)),
        tls=config.tls,
        listen=config.listen,
    )
    server.start()  # sets the umask for a moment, so before there are other threads
    kubelets = _register_with_kubelet(config) if "node" in roles else []
    background = start_background(driver)
    plugin = _start_docker(config, background) if docker else None
    if config.health:
        from csi.health import Health

        background.every(TEND_SECONDS, "health", Health(config).turn)
    os.read(ending, 1)
    log.get_logger("wire").info("stopping")
    for kubelet in kubelets:
        kubelet.stop()
    if plugin is not None:
        plugin.shutdown()
    background.stop(wait_seconds=0.0)
    clean = server.stop(end_children=driver.runner.end_read_only)
    background.stop()
    leave(clean)
    return 0


def build(config: Config, *, roles: frozenset[str], boundary: Boundary = no_boundary) -> Driver:
    """Make the parts for these roles ("controller", "node"). Starts no thread and no process."""
    runner = SubprocessRunner(boundary=boundary, host_tools=config.tools == "host")
    locks = VolumeLocks(config.state_dir / "locks")
    volumes = _volumes(config, runner, locks, boundary) if "controller" in roles else None
    staging = _staging(config, runner, locks, roles, boundary) if "node" in roles else None
    return Driver(
        calls=Calls(caller_of=caller_of),
        runner=runner,
        boundary=boundary,
        readiness=Readiness([part.problems for part in (volumes, staging) if part is not None]),
        volumes=volumes,
        staging=staging,
    )


def registrations(driver: Driver, config: Config) -> Iterable[Registration]:
    """The servicers of a driver, ready to be added to a server."""
    from csi.pb import csi_pb2_grpc
    from csi.services.identity import Identity

    identity = Identity(
        calls=driver.calls,
        name=config.driver_name,
        readiness=driver.readiness,
    )
    yield partial(csi_pb2_grpc.add_IdentityServicer_to_server, identity)
    if driver.volumes is not None:
        from csi.services.controller import Controller

        controller = Controller(calls=driver.calls, volumes=driver.volumes)
        yield partial(csi_pb2_grpc.add_ControllerServicer_to_server, controller)
    if driver.staging is not None:
        from csi.services.node import Node

        yield partial(csi_pb2_grpc.add_NodeServicer_to_server, Node(calls=driver.calls, staging=driver.staging))


def start_background(driver: Driver) -> Background:
    """Start the threads that tend volumes and look after readiness."""
    background = Background()
    background.every(LOOK_SECONDS, "readiness", driver.readiness.look, longest_seconds=20.0)
    if driver.volumes is not None:
        # Threads of their own: a disk that hangs stops the work on its pool, and nothing else.
        # At once after a restart of tgtd: until its targets are back the nodes' I/O waits.
        background.every(TEND_SECONDS, "exports", driver.volumes.reconcile, early=driver.volumes.export_restarted)
        for pool in driver.volumes.pool_names:
            background.every(TEND_SECONDS, f"pool {pool}", partial(driver.volumes.tend_pool, pool))
    if driver.staging is not None:
        background.every(TEND_SECONDS, "staging", driver.staging.tend)
        from csi.connectors.unstick import Unstick

        # A thread of its own: a sweep may wait for the very disks whose sessions this brings back.
        background.every(TEND_SECONDS, "sessions", Unstick(boundary=driver.boundary).turn)
    return background


def _register_with_kubelet(config: Config) -> "list[KubeletRegistration]":
    """Tell kubelet of us, by the name of each SNODE's driver: we attach the volumes of all of them."""
    if config.node.kubelet_registry is None:
        return []
    from csi.rpc.kubelet import KubeletRegistration

    names = config.node.kubelet_drivers or (config.driver_name,)
    made = [KubeletRegistration(config.node.kubelet_registry, name=name, endpoint=config.endpoint) for name in names]
    for registration in made:
        registration.start()
    return made


# -- Docker ------------------------------------------------------------------------------------------------------


def _start_docker(config: Config, background: Background) -> "ApiServer":
    """Serve Docker, as a client of the driver that this process serves itself, and of its SNODE if it is elsewhere."""
    from csi.client import Client
    from csi.docker.api import Api, ApiServer
    from csi.docker.containers import is_shown
    from csi.docker.plugin import Plugin
    from csi.rpc import unix_socket

    own = Client(config.endpoint, tls=config.tls, timeout_seconds=DOCKER_SECONDS)
    remote = config.docker.controller
    plugin = Plugin(
        controller=Client(remote, tls=config.tls, timeout_seconds=DOCKER_SECONDS) if remote else own,
        node=own,
        records=RecordStore(config.state_dir / "docker" / "uses"),
        folder=config.state_dir / "docker",
        boot=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        is_shown=is_shown,
    )
    unix_socket.claim(config.docker.socket)
    server = ApiServer(config.docker.socket, Api(plugin))
    server.start()
    background.every(TEND_SECONDS, "docker", lambda _deadline: plugin.tend())
    log.get_logger("wire").info("serving Docker", socket=str(config.docker.socket))
    return server


# -- SNODE -------------------------------------------------------------------------------------------------------


def _volumes(config: Config, runner: Runner, locks: VolumeLocks, boundary: Boundary) -> "Volumes":
    from csi.publications import Publications
    from csi.volumes import Pool, Volumes

    exports = _exports(config, runner, boundary)
    pools = {
        name: Pool(
            backend=_backend(name, pool, config.state_dir / "pools" / name, runner, boundary),
            export=exports[pool.export],
            local_to=config.node.name if pool.export == "none" else "",
        )
        for name, pool in config.pools.items()
    }
    publications = Publications(RecordStore(config.state_dir / "publications", boundary=boundary))
    return Volumes(
        pools,
        default_pool=config.controller.default_pool,
        publications=publications,
        locks=locks,
        max_per_node=config.node.max_volumes,
    )


def _exports(config: Config, runner: Runner, boundary: Boundary) -> Mapping[str, Export]:
    """One export of each kind that a pool uses: there is one tgtd."""
    used = {pool.export for pool in config.pools.values()}
    exports: dict[str, Export] = {}
    if "none" in used:
        from csi.exports.none import NoExport

        exports["none"] = NoExport()
    if "tgt" in used:
        from csi.exports.tgt import TgtExport

        exports["tgt"] = TgtExport(
            config.controller.tgt_socket,
            portals=config.controller.portals,
            runner=runner,
            max_exports=config.controller.max_exports,
            boundary=boundary,
        )
    return exports


def _backend(name: str, pool: AnyPool, state: Path, runner: Runner, boundary: Boundary) -> Backend:
    if isinstance(pool, FilesPool):
        from csi.backends.files import FilesBackend

        return FilesBackend(
            name,
            directory=pool.directory,
            state=state,
            overcommit_ratio=pool.overcommit_ratio,
            boundary=boundary,
        )
    from csi.backends.lvm import LvmBackend

    return LvmBackend(
        name,
        vg=pool.vg,
        space=pool.space(),
        devices=pool.devices,
        state=state,
        runner=runner,
        boundary=boundary,
    )


# -- CNODE -------------------------------------------------------------------------------------------------------


def _staging(
    config: Config, runner: Runner, locks: VolumeLocks, roles: frozenset[str], boundary: Boundary
) -> "Staging":
    from csi.fs.format import Filesystems
    from csi.fs.mounts import Mounts
    from csi.sealing import NodeKey
    from csi.staging import Staging

    records = RecordStore(config.state_dir / "node", boundary=boundary)
    return Staging(
        _connectors(config, runner, roles, boundary),
        filesystems=Filesystems(runner),
        mounts=Mounts(runner, root=HOST_ROOT if config.tools == "host" else Path("/"), boundary=boundary),
        records=records,
        locks=locks,
        key=NodeKey.load(records),
        name=config.node.name,
        read_initiator=_initiator_reader(config.node.initiator_file),
        target_roots=config.node.target_roots,
        max_volumes=config.node.max_volumes,
    )


def _connectors(config: Config, runner: Runner, roles: frozenset[str], boundary: Boundary) -> list[Connector]:
    """What this node can attach. A node alone can't know the pools of its SNODEs: iSCSI is always for it."""
    from csi.connectors.loop import LoopConnector

    exported = any(pool.export == "tgt" for pool in config.pools.values())
    roots = [pool.directory for pool in config.pools.values() if isinstance(pool, FilesPool) and pool.export == "none"]
    connectors: list[Connector] = [LoopConnector(runner, roots=roots)] if roots else []
    if exported or "controller" not in roles:
        connectors.append(_iscsi(config, runner, boundary))
    return connectors


def _iscsi(config: Config, runner: Runner, boundary: Boundary) -> Connector:
    from csi.connectors.iscsi import IscsiConnector

    return IscsiConnector(
        runner,
        initiator_file=config.node.initiator_file,
        replacement_seconds=config.node.replacement_timeout,
        digests=config.node.digests == "crc32c",
        boundary=boundary,
    )


def _initiator_reader(path: Path) -> Callable[[], str]:
    """Reads the initiator's name each time: open-iscsi may be installed, or renamed, while we run."""

    def read() -> str:
        from csi.connectors.initiator import initiator_name

        try:
            return initiator_name(path)
        except DriverError:
            return ""  # Probe says what is wrong; a node with local volumes only needs none

    return read
