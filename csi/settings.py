"""Every setting of the driver, described once: the parser, the flags, the environment and the reference page use it."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from csi.errors import Invalid
from csi.model import NODE_NAME, POOL_NAME, parse_portal
from csi.rpc.endpoint import parse_endpoint

POOL_TYPES = ("files", "lvm", "lvm-thin")
LAYOUTS = ("linear", "striped", "raid1", "raid5", "raid6", "raid10")
EXPORTS = ("tgt", "none")
_LVM_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,39}")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DRIVER_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")


class Kind(Enum):
    """What a value is; the value is what the reference page calls it."""

    TEXT = "text"
    CHOICE = "one of"
    PATH = "absolute path"
    PATHS = "list of absolute paths"
    TEXTS = "list of texts"
    COUNT = "number"
    RATIO = "decimal number"
    PERCENT = "percent"


@dataclass(frozen=True)
class Setting:
    """One setting. `section` is "" for the top level and "pools" for the tables [pools.NAME]."""

    section: str
    key: str
    kind: Kind
    default: Any
    help: str
    flag: str = ""  # the command line's option, "" = none
    variable: str = ""  # the environment variable, "" = none (pools)
    choices: tuple[str, ...] = ()
    least: float = 0
    most: float = 1_000_000
    required: bool = False
    pool_types: tuple[str, ...] = ()
    check: Callable[[Any], str] = field(default=lambda _value: "")

    @property
    def name(self) -> str:
        """`section.key` as messages and the reference page write it."""
        section = "pools.NAME" if self.section == "pools" else self.section
        return f"{section}.{self.key}" if section else self.key


def _matches(pattern: "re.Pattern[str]", what: str) -> Callable[[Any], str]:
    return lambda value: "" if not value or pattern.fullmatch(value) else f"{value!r} is not {what}"


def _endpoint(value: str) -> str:
    try:
        parse_endpoint(value)
    except Invalid as error:
        return str(error).partition(": ")[2]
    return ""


def _remote(value: str) -> str:
    if value and not value.startswith("tcp://"):
        return f"{value!r} is not of the form tcp://address:port"
    return _endpoint(value) if value else ""


def _driver_names(value: tuple[str, ...]) -> str:
    faulty = next((name for name in value if not _DRIVER_NAME.fullmatch(name)), "")
    return f"{faulty!r} is not a domain name of at most 63 characters" if faulty else ""


def _address(value: str) -> str:
    return _portals((value,)) if value else ""


def _portals(value: tuple[str, ...]) -> str:
    for portal in value:
        try:
            parse_portal(portal)
        except Invalid as error:
            return str(error)
    return ""


def _device_paths(value: tuple[Path, ...]) -> str:
    for path in value:
        if not re.fullmatch(r"/dev/[A-Za-z0-9/_.:+@=,-]+", str(path)):
            return f"'{path}' is not a plain device path below /dev"
    return ""


def _variable(section: str, key: str) -> str:
    return "_".join(("SNODE", *(part.upper() for part in (section, key) if part)))


def _setting(section: str, key: str, kind: Kind, default: Any, help: str, **more: Any) -> Setting:
    if section != "pools":
        more.setdefault("variable", _variable(section, key))
    return Setting(section, key, kind, default, help, **more)


_LVM = ("lvm", "lvm-thin")
_DEVICES = "the disks of the volume group; LVM commands of the driver see only these ([] = those that LVM reports)"

SETTINGS: tuple[Setting, ...] = (
    _setting("", "state_dir", Kind.PATH, Path("/var/lib/snode"), "folder of the driver's records", flag="--state-dir"),
    _setting(
        "", "endpoint", Kind.TEXT, "unix:///run/snode/csi.sock",
        "where CSI is served: unix:///path or tcp://address:port (mutual TLS)",
        flag="--endpoint", variable="CSI_ENDPOINT", check=_endpoint,
    ),
    _setting(
        "", "listen", Kind.TEXT, "",
        "where CSI is served as well, tcp://address:port (mutual TLS), for Docker on other machines", check=_remote,
    ),
    _setting(
        "", "driver_name", Kind.TEXT, "csi.snode.io", "the name that orchestrators know the driver by",
        check=_matches(_DRIVER_NAME, "a domain name of at most 63 characters"),
    ),
    _setting(
        "", "log_level", Kind.CHOICE, "info", "least severity that is logged",
        flag="--log-level", choices=("debug", "info", "warning", "error"),
    ),
    _setting(
        "", "log_format", Kind.CHOICE, "text", "for people or for machines",
        flag="--log-format", choices=("text", "json"),
    ),
    _setting(
        "", "health", Kind.TEXT, "",
        "where probes may ask over HTTP, GET /readyz and /livez, ADDRESS:PORT such as 127.0.0.1:9809; empty = nowhere",
        check=_address,
    ),
    _setting(
        "", "tools", Kind.CHOICE, "own",
        "whose LVM, iscsiadm, mkfs and mount are run: own, or in a container the host's (needs its process namespace)",
        choices=("own", "host"),
    ),
    _setting("tls", "ca", Kind.PATH, None, "PEM file: who may call over TCP"),
    _setting("tls", "cert", Kind.PATH, None, "PEM file: our certificate"),
    _setting("tls", "key", Kind.PATH, None, "PEM file: our key"),
    _setting(
        "controller", "default_pool", Kind.TEXT, "",
        "pool of volumes whose StorageClass names none; the only pool if there is just one",
        check=_matches(POOL_NAME, "a pool's name"),
    ),
    _setting(
        "controller", "portals", Kind.TEXTS, (), "addresses of this machine at which tgtd serves, ADDRESS:PORT",
        check=_portals,
    ),
    _setting(
        "controller", "tgt_socket", Kind.PATH, Path("/var/run/tgtd/socket.0"), "tgtd's management socket"
    ),
    _setting(
        "controller", "max_exports", Kind.COUNT, 1000,
        "most volumes exported at once; each costs tgtd up to 16 threads", least=1, most=30_000,
    ),
    _setting(
        "node", "name", Kind.TEXT, "", "this node's name (the host name if empty)",
        flag="--node-name", check=_matches(NODE_NAME, "a node name (lower-case letters, digits, - and .)"),
    ),
    _setting(
        "node", "initiator_file", Kind.PATH, Path("/etc/iscsi/initiatorname.iscsi"), "where open-iscsi keeps its name"
    ),
    _setting(
        "node", "target_roots", Kind.PATHS, (),
        "folders that mounts may be made in ([] = anywhere but system folders); for Kubernetes [\"/var/lib/kubelet\"]",
    ),
    _setting(
        "node", "replacement_timeout", Kind.COUNT, 120,
        "seconds that I/O waits for a lost iSCSI session to return", least=1, most=86_400,
    ),
    _setting(
        "node", "digests", Kind.CHOICE, "default",
        "crc32c: checksums over all that iSCSI sends, which find what TCP's own miss, for some CPU time; default: as "
        "iscsid.conf has it (none, unless it was changed)",
        choices=("default", "crc32c"),
    ),
    _setting(
        "node", "kubelet_registry", Kind.PATH, None,
        "kubelet's folder of plugins, /var/lib/kubelet/plugins_registry, to be registered there without a sidecar",
    ),
    _setting(
        "node", "kubelet_drivers", Kind.TEXTS, (),
        "the names that kubelet is told, of the drivers of several SNODEs ([] = driver_name)", check=_driver_names,
    ),
    _setting("node", "max_volumes", Kind.COUNT, 0, "most volumes on this node (0 = the orchestrator decides)"),
    _setting(
        "docker", "socket", Kind.PATH, Path("/run/docker/plugins/snode.sock"),
        "where `snode docker` serves; Docker knows the driver by the file's name, snode",
    ),
    _setting(
        "docker", "controller", Kind.TEXT, "",
        "the SNODE's endpoint, tcp://address:port; empty = the pools of this machine itself", check=_remote,
    ),
    _setting(
        "failover", "mode", Kind.CHOICE, "act",
        "observe: decide and tell (log, Events), and do nothing", choices=("act", "observe"),
    ),
    _setting(
        "failover", "after", Kind.COUNT, 15,
        "seconds without a live session of a node, before it may be given up; sessions ping every 5 s",
        least=10, most=3600,
    ),
    _setting(
        "failover", "lease", Kind.COUNT, 25,
        "seconds that its Lease is not renewed, before it may be given up; kubelet renews every 10 s",
        least=15, most=3600,
    ),
    _setting(
        "failover", "most_percent", Kind.PERCENT, 34,
        "most nodes that may be given up at once, in percent of all; one always may, and above it none is",
        least=1, most=100,
    ),
    _setting(
        "failover", "namespace", Kind.TEXT, "",
        "where its Leases are, the same for all SNODEs; empty = the pod's own (default outside of a pod)",
        check=_matches(_NAMESPACE, "a namespace's name"),
    ),
    _setting(
        "failover", "kubeconfig", Kind.PATH, None,
        "how the API server is reached from outside of a pod; in a pod, by its service account",
    ),
    _setting(
        "failover", "metrics", Kind.TEXT, "",
        "where Prometheus may read /metrics, ADDRESS:PORT; empty = nowhere", check=_address,
    ),
    _setting(
        "pools", "type", Kind.CHOICE, None, "how volumes are made", choices=POOL_TYPES, required=True,
        pool_types=POOL_TYPES,
    ),
    _setting(
        "pools", "export", Kind.CHOICE, None,
        "how nodes reach the volumes: tgt (iSCSI), or none (files on this machine); files: none, lvm and lvm-thin: tgt",
        choices=EXPORTS, pool_types=POOL_TYPES,
    ),
    _setting("pools", "directory", Kind.PATH, None, "folder of the volume files", required=True, pool_types=("files",)),
    _setting(
        "pools", "overcommit_ratio", Kind.RATIO, 1.0,
        "how often the space may be promised (1 = only what is there)", least=0.1, most=1000,
        pool_types=("files", "lvm-thin"),
    ),
    _setting(
        "pools", "vg", Kind.TEXT, None, "the volume group", required=True, pool_types=_LVM,
        check=_matches(_LVM_NAME, "a name that LVM allows, of at most 40 characters"),
    ),
    _setting(
        "pools", "layout", Kind.CHOICE, "linear", "how a volume lies on the disks", choices=LAYOUTS, pool_types=("lvm",)
    ),
    _setting(
        "pools", "stripes", Kind.COUNT, 0,
        "data stripes of striped, raid5, raid6 and raid10 (0 = the least: 2, of raid6 3)", most=128, pool_types=("lvm",)
    ),
    _setting(
        "pools", "mirrors", Kind.COUNT, 0, "further copies of raid1 and raid10 (0 = one)", most=9, pool_types=("lvm",)
    ),
    _setting(
        "pools", "thin_pool", Kind.TEXT, None, "the thin pool's logical volume", required=True,
        pool_types=("lvm-thin",), check=_matches(_LVM_NAME, "a name that LVM allows, of at most 40 characters"),
    ),
    _setting(
        "pools", "data_watermark_percent", Kind.PERCENT, 90,
        "nothing is made or grown above this use of the data space", least=1, most=100, pool_types=("lvm-thin",),
    ),
    _setting(
        "pools", "metadata_watermark_percent", Kind.PERCENT, 70, "the same for the thin pool's metadata",
        least=1, most=100, pool_types=("lvm-thin",),
    ),
    _setting("pools", "devices", Kind.PATHS, (), _DEVICES, pool_types=_LVM, check=_device_paths),
)  # fmt: skip

SECTIONS = ("tls", "controller", "node", "docker", "failover", "pools")


def settings_of(section: str, *, pool_type: str = "") -> list[Setting]:
    """The settings of a section; of [pools.NAME], those that a pool type has ("" = every one)."""
    return [
        setting
        for setting in SETTINGS
        if setting.section == section and (not pool_type or pool_type in setting.pool_types)
    ]


def from_text(setting: Setting, raw: object) -> Any:
    """A value from a flag or the environment; lists are separated by commas. Raises ValueError."""
    text = str(raw)
    if setting.kind in (Kind.TEXTS, Kind.PATHS):
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        return tuple(Path(part) for part in parts) if setting.kind is Kind.PATHS else parts
    if setting.kind is Kind.PATH:
        return Path(text)
    if setting.kind in (Kind.COUNT, Kind.PERCENT):
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(f"{text!r} is not a whole number")
        return int(text)
    if setting.kind is Kind.RATIO:
        return float(text)
    return text


def from_toml(setting: Setting, raw: Any) -> Any:
    """A value from the file, whose type must be right. Raises ValueError."""
    kinds: dict[Kind, tuple[type[Any], ...]] = {Kind.COUNT: (int,), Kind.PERCENT: (int,), Kind.RATIO: (int, float)}
    if setting.kind in (Kind.TEXTS, Kind.PATHS):
        if not isinstance(raw, list) or not all(isinstance(part, str) for part in raw):
            raise ValueError('must be a list of texts, such as ["a", "b"]')
        return tuple(Path(part) for part in raw) if setting.kind is Kind.PATHS else tuple(raw)
    allowed = kinds.get(setting.kind, (str,))
    if not isinstance(raw, allowed) or isinstance(raw, bool):
        raise ValueError(f"must be a {'text in quotes' if allowed == (str,) else setting.kind.value}, not {raw!r}")
    if setting.kind is Kind.PATH:
        return Path(raw)
    return float(raw) if setting.kind is Kind.RATIO else raw


def check_value(setting: Setting, value: Any) -> None:
    """Raise ValueError when a value of the right kind is not allowed."""
    if setting.choices and value not in setting.choices:
        near = difflib.get_close_matches(value, setting.choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{value!r} is none of {', '.join(setting.choices)}{hint}")
    for path in value if setting.kind is Kind.PATHS else (value,) if setting.kind is Kind.PATH else ():
        if not path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise ValueError(f"'{path}' is not an absolute path")
    if setting.kind in (Kind.COUNT, Kind.PERCENT, Kind.RATIO) and not setting.least <= value <= setting.most:
        raise ValueError(f"{value} is not between {setting.least:g} and {setting.most:g}")
    complaint = setting.check(value)
    if complaint:
        raise ValueError(complaint)
