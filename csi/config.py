"""Settings: a TOML file, then the environment, then flags; each later one wins. All problems are told at once.

Own small validation instead of a library: the service has to start within half a second and idle in 60 MiB.
"""

import difflib
import itertools
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csi.errors import DriverError, Invalid
from csi.model import NODE_NAME, POOL_NAME
from csi.rpc.endpoint import Endpoint, TlsFiles, parse_endpoint
from csi.settings import SECTIONS, SETTINGS, Setting, check_value, from_text, from_toml, settings_of

if TYPE_CHECKING:
    from csi.backends.lvm_space import Space

DEFAULT_FILE = Path("/etc/snode/snode.toml")


class ConfigError(DriverError):
    """The settings are not usable; `problems` has a line for each fault, with its source and key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class FilesPool:
    """[pools.NAME] of type files: sparse files in a folder."""

    directory: Path
    overcommit_ratio: float = 1.0
    export: str = "none"


@dataclass(frozen=True)
class LvmPool:
    """[pools.NAME] of type lvm: thick logical volumes."""

    vg: str
    layout: str = "linear"
    stripes: int = 0
    mirrors: int = 0
    devices: tuple[Path, ...] = ()
    export: str = "tgt"

    def space(self) -> "Space":
        """How its volumes lie on the disks. Raises Invalid for a combination that does not exist."""
        from csi.backends.lvm_thick import Thick

        return Thick(self.layout, stripes=self.stripes, mirrors=self.mirrors)


@dataclass(frozen=True)
class LvmThinPool:
    """[pools.NAME] of type lvm-thin: thin logical volumes."""

    vg: str
    thin_pool: str
    overcommit_ratio: float = 1.0
    data_watermark_percent: int = 90
    metadata_watermark_percent: int = 70
    devices: tuple[Path, ...] = ()
    export: str = "tgt"

    def space(self) -> "Space":
        """Where its volumes' blocks come from."""
        from csi.backends.lvm_thin import Thin

        return Thin(
            self.thin_pool,
            overcommit_ratio=self.overcommit_ratio,
            data_watermark_percent=self.data_watermark_percent,
            metadata_watermark_percent=self.metadata_watermark_percent,
        )


#: The environment variables that Kubernetes (and Docker's links) make of a Service with our name.
_SERVICE = re.compile(
    r"SNODE_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)

AnyPool = FilesPool | LvmPool | LvmThinPool
_POOL_CLASSES: dict[str, type[AnyPool]] = {"files": FilesPool, "lvm": LvmPool, "lvm-thin": LvmThinPool}
_POOL_EXPORTS = {"files": "none", "lvm": "tgt", "lvm-thin": "tgt"}


@dataclass(frozen=True)
class ControllerConfig:
    """[controller]"""

    default_pool: str
    portals: tuple[str, ...]
    tgt_socket: Path
    max_exports: int


@dataclass(frozen=True)
class NodeConfig:
    """[node]"""

    name: str
    initiator_file: Path
    target_roots: tuple[Path, ...]
    kubelet_registry: Path | None
    kubelet_drivers: tuple[str, ...]
    replacement_timeout: int
    digests: str
    max_volumes: int


@dataclass(frozen=True)
class DockerConfig:
    """[docker]"""

    socket: Path
    controller: Endpoint | None


@dataclass(frozen=True)
class FailoverConfig:
    """[failover]"""

    mode: str
    after: int
    lease: int
    most_percent: int
    namespace: str
    kubeconfig: Path | None
    metrics: str


@dataclass(frozen=True)
class Config:
    """All settings, valid together."""

    state_dir: Path
    endpoint: Endpoint
    listen: Endpoint | None
    driver_name: str
    log_level: str
    log_format: str
    health: str
    tools: str
    controller: ControllerConfig
    node: NodeConfig
    docker: DockerConfig
    failover: FailoverConfig
    tls: TlsFiles | None = None
    pools: Mapping[str, AnyPool] = field(default_factory=dict)


def load(
    file: Path | None, *, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Config:
    """Read the settings. file: None = the default file if it exists. flags: by `section.key` or `key`, strings.

    Raises ConfigError with every problem of every source.
    """
    if file is None:
        file = DEFAULT_FILE if DEFAULT_FILE.exists() else None
    reader = _Reader(os.environ if environment is None else environment, flags or {})
    document = reader.document(file) if file else {}
    return reader.config(document, source=str(file) if file else "defaults")


class _Reader:
    """Collects values and problems; `config` raises them all."""

    def __init__(self, environment: Mapping[str, str], flags: Mapping[str, Any]) -> None:
        self._environment = environment
        self._flags = flags
        self._problems: list[str] = []

    def document(self, file: Path) -> dict[str, Any]:
        try:
            return tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError([f"{file}: can't be read: {error.strerror}"]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError([f"{file}: not valid TOML: {error}"]) from error

    def config(self, document: dict[str, Any], *, source: str) -> Config:
        self._check_variables()
        self._check_keys(document, [*(s.key for s in settings_of("")), *SECTIONS], source=source, prefix="")
        top = self._section("", document, source)
        tls, controller, node, docker, failover = (
            self._section(name, self._table(document, name, source), source)
            for name in ("tls", "controller", "node", "docker", "failover")
        )
        pools = self._pools(self._table(document, "pools", source), source)
        if not pools and not document.get("pools"):
            # The embedded default: a driver without any settings keeps volumes in files.
            pools = {"default": FilesPool(directory=(top["state_dir"] or Path("/")) / "volumes")}
        self._relate(top, tls, controller, node, pools, source)
        node["name"] = node["name"] or self._host_name()
        if self._problems:
            raise ConfigError(self._problems)
        return Config(
            **{
                **top,
                "endpoint": parse_endpoint(top["endpoint"]),
                "listen": parse_endpoint(top["listen"]) if top["listen"] else None,
            },
            tls=TlsFiles(**tls) if tls["ca"] else None,
            controller=ControllerConfig(**{**controller, "default_pool": _default_pool(controller, pools)}),
            node=NodeConfig(**node),
            docker=DockerConfig(
                docker["socket"], parse_endpoint(docker["controller"]) if docker["controller"] else None
            ),
            failover=FailoverConfig(**failover),
            pools=pools,
        )

    # -- one section ---------------------------------------------------------------------------------------------

    def _table(self, document: dict[str, Any], name: str, source: str) -> dict[str, Any]:
        table = document.get(name, {})
        if isinstance(table, dict):
            return table
        self._problems.append(f"{source}: {name}: is a table, written [{name}]")
        return {}

    def _check_keys(self, table: dict[str, Any], known: list[str], *, source: str, prefix: str) -> None:
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
                self._problems.append(f"{source}: {prefix}{key}: unknown setting; {hint}")

    def _section(self, section: str, table: dict[str, Any], source: str) -> dict[str, Any]:
        settings = settings_of(section)
        if section:
            self._check_keys(table, [s.key for s in settings], source=source, prefix=f"{section}.")
        return {setting.key: self._value(setting, table, source) for setting in settings}

    def _value(self, setting: Setting, table: dict[str, Any], source: str) -> Any:
        """The value of a setting from its strongest source; the default when there is none or it is faulty."""
        given = self._flags.get(setting.name)
        if given is not None:
            return self._accept(setting, given, f"flag {setting.flag}", text=True)
        if setting.variable and self._environment.get(setting.variable):
            return self._accept(setting, self._environment[setting.variable], setting.variable, text=True)
        if setting.key in table:
            return self._accept(setting, table[setting.key], f"{source}: {setting.name}", text=False)
        return setting.default

    def _accept(self, setting: Setting, raw: Any, where: str, *, text: bool) -> Any:
        try:
            value = from_text(setting, raw) if text else from_toml(setting, raw)
            check_value(setting, value)
        except ValueError as error:
            self._problems.append(f"{where}: {error}")
            return setting.default
        return value

    # -- pools ---------------------------------------------------------------------------------------------------

    def _pools(self, tables: dict[str, Any], source: str) -> dict[str, AnyPool]:
        pools: dict[str, AnyPool] = {}
        for name, table in tables.items():
            where = f"{source}: pools.{name}"
            if not isinstance(table, dict):
                self._problems.append(f"{where}: is a table, written [pools.{name}]")
            elif not POOL_NAME.fullmatch(name):
                self._problems.append(f"{where}: a pool's name has 1 to 32 lower-case letters, digits and -")
            else:
                pool = self._pool(table, source, where)
                if pool is not None:
                    pools[name] = pool
        return pools

    def _pool(self, table: dict[str, Any], source: str, where: str) -> AnyPool | None:
        count = len(self._problems)
        kind = table.get("type")
        if kind not in _POOL_CLASSES:
            self._problems.append(f"{where}.type: {kind!r} is none of {', '.join(_POOL_CLASSES)}")
            return None
        settings = settings_of("pools", pool_type=str(kind))
        self._check_keys(table, [s.key for s in settings], source=source, prefix=f"{where.partition(': ')[2]}.")
        fields = {}
        for setting in settings:
            if setting.key in table:
                fields[setting.key] = self._accept(setting, table[setting.key], f"{where}.{setting.key}", text=False)
            elif setting.required:
                self._problems.append(f"{where}.{setting.key}: required for a pool of type {kind} ({setting.help})")
            else:
                fields[setting.key] = setting.default
        if len(self._problems) > count:
            return None
        del fields["type"]
        fields["export"] = fields["export"] or _POOL_EXPORTS[str(kind)]
        return _POOL_CLASSES[str(kind)](**fields)

    # -- what must fit together ----------------------------------------------------------------------------------

    def _relate(
        self,
        top: dict[str, Any],
        tls: dict[str, Any],
        controller: dict[str, Any],
        node: dict[str, Any],
        pools: dict[str, AnyPool],
        source: str,
    ) -> None:
        missing = [key for key, value in tls.items() if value is None]
        tcp = str(top["endpoint"]).startswith("tcp:") or bool(top["listen"])
        if missing and (tcp or len(missing) < len(tls)):
            why = "an endpoint on TCP is served with mutual TLS only" if tcp else "the three go together"
            self._problems += [f"{source}: tls.{key}: required; {why}" for key in missing]
        if node["kubelet_registry"] and not str(top["endpoint"]).startswith("unix:"):
            self._problems.append(f"{source}: node.kubelet_registry: kubelet calls a unix socket only; set endpoint")
        default = controller["default_pool"]
        if default and default not in pools:
            known = ", ".join(sorted(pools)) or "none"
            self._problems.append(f"{source}: controller.default_pool: there is no pool {default!r} (known: {known})")
        exported = sorted(name for name, pool in pools.items() if pool.export == "tgt")
        if exported and not controller["portals"]:
            self._problems.append(
                f"{source}: controller.portals: required, since pool {exported[0]} is exported by iSCSI; write the "
                'address of this machine that nodes reach, such as portals = ["192.0.2.10:3260"]'
            )
        for name, pool in pools.items():
            self._relate_pool(f"{source}: pools.{name}", pool)
        for (name, pool), (other_name, other) in itertools.combinations(pools.items(), 2):
            self._relate_pools(f"{source}: pools.{other_name}", other, name, pool)

    def _relate_pool(self, where: str, pool: AnyPool) -> None:
        if pool.export == "none" and not isinstance(pool, FilesPool):
            self._problems.append(f'{where}.export: only pools of type files go without an export; use export = "tgt"')

        if isinstance(pool, LvmPool):
            try:
                pool.space()
            except Invalid as error:
                key, _, complaint = str(error).partition(" ")
                self._problems.append(f"{where}.{key}: {complaint}")

    def _relate_pools(self, where: str, pool: AnyPool, name: str, earlier: AnyPool) -> None:
        """Two pools must not take each other's files or space into their account."""
        if isinstance(pool, FilesPool) and isinstance(earlier, FilesPool):
            folder, other = (Path(os.path.realpath(each.directory)) for each in (pool, earlier))
            if folder.is_relative_to(other) or other.is_relative_to(folder):
                self._problems.append(
                    f"{where}.directory: {pool.directory} and {earlier.directory} of pool {name} are one folder, or "
                    "one is in the other; give each pool its own"
                )
        if (
            isinstance(pool, LvmThinPool)
            and isinstance(earlier, LvmThinPool)
            and (pool.vg, pool.thin_pool) == (earlier.vg, earlier.thin_pool)
        ):
            self._problems.append(
                f"{where}.thin_pool: {pool.vg}/{pool.thin_pool} is pool {name} already; name another thin pool"
            )

    def _check_variables(self) -> None:
        """Refuse unknown variables, like unknown keys; not those that Kubernetes makes of a Service (SNODE_PORT)."""
        known = [setting.variable for setting in SETTINGS if setting.variable.startswith("SNODE_")]
        test = self._environment.get("SNODE_TEST") == "1"
        for name in self._environment:
            if not name.startswith("SNODE_") or name in known or name == "SNODE_TEST" or _SERVICE.fullmatch(name):
                continue
            if name in ("SNODE_CRASH_AT", "SNODE_CRASH_LOG"):
                if not test:
                    self._problems.append(f"environment variable {name}: for tests only, with SNODE_TEST=1; unset it")
                continue
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else "unset it"
            self._problems.append(f"environment variable {name}: unknown setting; {hint}")

    def _host_name(self) -> str:
        name = socket.gethostname().lower()
        if not NODE_NAME.fullmatch(name):
            self._problems.append(f"node.name: the host name {name!r} can't be a node name; set one")
        return name


def _default_pool(controller: dict[str, Any], pools: dict[str, AnyPool]) -> str:
    if controller["default_pool"] or len(pools) != 1:
        return str(controller["default_pool"])
    return next(iter(pools))
