from dataclasses import fields
from pathlib import Path

import pytest

from csi import config
from csi.config import Config, ConfigError, FilesPool, LvmPool, LvmThinPool, load
from csi.rpc.endpoint import Endpoint, TlsFiles
from csi.settings import SECTIONS, SETTINGS, settings_of
from tests.tools import config_reference

PROJECT = Path(__file__).parents[2]
NO_ENVIRONMENT: dict[str, str] = {}


def _load(tmp_path: Path, text: str, **more: object) -> Config:
    file = tmp_path / "snode.toml"
    file.write_text(text)
    environment = more.get("environment", NO_ENVIRONMENT)
    flags = more.get("flags", {})
    assert isinstance(environment, dict)
    assert isinstance(flags, dict)
    return load(file, environment=environment, flags=flags)


def _problems(tmp_path: Path, text: str, **more: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text, **more)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


# -- what there is ---------------------------------------------------------------------------------------------------


def test_without_settings_volumes_are_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "absent.toml")
    found = load(None, environment=NO_ENVIRONMENT)
    assert found.pools == {"default": FilesPool(directory=Path("/var/lib/snode/volumes"))}
    assert found.controller.default_pool == "default"
    assert found.endpoint == Endpoint(socket=Path("/run/snode/csi.sock"))
    assert found.node.name
    assert found.tls is None


def test_the_default_file_is_read_if_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "snode.toml").write_text('driver_name = "csi.example.org"')
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "snode.toml")
    assert load(None, environment=NO_ENVIRONMENT).driver_name == "csi.example.org"


@pytest.mark.parametrize("name", ["files", "lvm"])
def test_the_examples_are_valid(name: str) -> None:
    environment = {"CSI_ENDPOINT": "unix:///run/x/csi.sock"}
    found = load(PROJECT / "deploy" / "config" / f"{name}.toml", environment=environment)
    assert found.endpoint == Endpoint(socket=Path("/run/x/csi.sock"))
    assert found.controller.default_pool in found.pools


FULL = """\
state_dir = "/srv/snode"
endpoint = "tcp://192.0.2.1:9000"
driver_name = "csi.example.org"
log_level = "debug"
log_format = "json"
[tls]
ca = "/etc/snode/ca.pem"
cert = "/etc/snode/cert.pem"
key = "/etc/snode/key.pem"
[controller]
default_pool = "fast"
portals = ["192.0.2.1:3260", "[2001:db8::1]:3260"]
tgt_socket = "/run/tgtd/socket.1"
max_exports = 50
[node]
name = "node-a"
initiator_file = "/host/etc/iscsi/initiatorname.iscsi"
target_roots = ["/var/lib/kubelet"]
replacement_timeout = 30
digests = "crc32c"
max_volumes = 20
[pools.fast]
type = "lvm"
vg = "vg0"
layout = "raid10"
stripes = 2
mirrors = 1
devices = ["/dev/sdb", "/dev/disk/by-id/wwn-0x5-part1"]
[pools.thin]
type = "lvm-thin"
vg = "vg1"
thin_pool = "thin"
overcommit_ratio = 3
data_watermark_percent = 80
metadata_watermark_percent = 60
[pools.local]
type = "files"
directory = "/srv/volumes"
overcommit_ratio = 1.5
"""


def test_every_setting_can_be_given_in_the_file(tmp_path: Path) -> None:
    found = _load(tmp_path, FULL)
    assert (found.state_dir, found.driver_name) == (Path("/srv/snode"), "csi.example.org")
    assert (found.log_level, found.log_format) == ("debug", "json")
    assert str(found.endpoint) == "tcp://192.0.2.1:9000"
    assert found.tls is not None
    assert found.tls.key == Path("/etc/snode/key.pem")
    assert found.controller.portals == ("192.0.2.1:3260", "[2001:db8::1]:3260")
    assert (found.controller.default_pool, found.controller.max_exports) == ("fast", 50)
    assert found.node.target_roots == (Path("/var/lib/kubelet"),)
    assert (found.node.replacement_timeout, found.node.digests, found.node.max_volumes) == (30, "crc32c", 20)
    assert found.pools["fast"] == LvmPool(
        vg="vg0",
        layout="raid10",
        stripes=2,
        mirrors=1,
        devices=(Path("/dev/sdb"), Path("/dev/disk/by-id/wwn-0x5-part1")),
    )
    assert found.pools["thin"] == LvmThinPool(
        vg="vg1",
        thin_pool="thin",
        overcommit_ratio=3.0,
        data_watermark_percent=80,
        metadata_watermark_percent=60,
    )
    assert found.pools["local"] == FilesPool(directory=Path("/srv/volumes"), overcommit_ratio=1.5)
    assert {name: pool.export for name, pool in found.pools.items()} == {"fast": "tgt", "thin": "tgt", "local": "none"}


def test_environment_wins_over_the_file_and_flags_over_both(tmp_path: Path) -> None:
    environment = {
        "CSI_ENDPOINT": "unix:///run/env.sock",
        "SNODE_STATE_DIR": "/env",
        "SNODE_LOG_LEVEL": "warning",
        "SNODE_CONTROLLER_PORTALS": "192.0.2.7:3260, 192.0.2.8:3260",
        "SNODE_NODE_MAX_VOLUMES": "3",
        "SNODE_NODE_TARGET_ROOTS": "/a,/b",
        "SNODE_NODE_NAME": "",
    }
    flags = {"log_level": "error", "node.name": "flagged", "state_dir": None}
    found = _load(tmp_path, FULL, environment=environment, flags=flags)
    assert str(found.endpoint) == "unix:///run/env.sock"
    assert found.state_dir == Path("/env")
    assert found.log_level == "error"
    assert found.controller.portals == ("192.0.2.7:3260", "192.0.2.8:3260")
    assert found.node.max_volumes == 3
    assert found.node.target_roots == (Path("/a"), Path("/b"))
    assert found.node.name == "flagged"


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('statedir = "/x"', "snode.toml: statedir: unknown setting; did you mean state_dir?"),
        ("[controler]", "snode.toml: controler: unknown setting; did you mean controller?"),
        ("[controller]\nportal = []", "snode.toml: controller.portal: unknown setting; did you mean controller.port"),
        ("[node]\nzzz = 1", "snode.toml: node.zzz: unknown setting; known here: name, initiator_file"),
        ("node = 1", "snode.toml: node: is a table, written [node]"),
        ("state_dir = 1", "snode.toml: state_dir: must be a text in quotes, not 1"),
        ('state_dir = "relative"', "snode.toml: state_dir: 'relative' is not an absolute path"),
        ('state_dir = "/a/../b"', "snode.toml: state_dir: '/a/../b' is not an absolute path"),
        ('endpoint = "/run/csi.sock"', "snode.toml: endpoint: write unix:///path/to/csi.sock or tcp://address:port"),
        ('endpoint = "tcp://192.0.2.1:1"', "snode.toml: tls.ca: required; an endpoint on TCP is served with"),
        ('[tls]\nca = "/ca"', "snode.toml: tls.key: required; the three go together"),
        ('driver_name = "a_b"', "snode.toml: driver_name: 'a_b' is not a domain name"),
        ('[node]\nkubelet_drivers = ["a.b", "a_b"]', "snode.toml: node.kubelet_drivers: 'a_b' is not a domain name"),
        ('log_level = "inf"', "snode.toml: log_level: 'inf' is none of debug, info, warning, error; did you mean"),
        ("[node]\nmax_volumes = -1", "snode.toml: node.max_volumes: -1 is not between 0 and"),
        ("[node]\nmax_volumes = true", "snode.toml: node.max_volumes: must be a number, not True"),
        ('[node]\nname = "Node A"', "snode.toml: node.name: 'Node A' is not a node name"),
        ('[node]\ntarget_roots = "/a"', "snode.toml: node.target_roots: must be a list of texts"),
        ('[node]\ntarget_roots = ["a"]', "snode.toml: node.target_roots: 'a' is not an absolute path"),
        ('[controller]\nportals = ["192.0.2.1"]', "snode.toml: controller.portals: portal '192.0.2.1' is not"),
        ('[controller]\nportals = ["host:3260"]', "snode.toml: controller.portals: portal 'host:3260' is not"),
        ('[controller]\ndefault_pool = "x"', "snode.toml: controller.default_pool: there is no pool 'x' (known"),
        ("[pools.Fast]", "snode.toml: pools.Fast: a pool's name has 1 to 32 lower-case letters"),
        ("pools.x = 1", "snode.toml: pools.x: is a table, written [pools.x]"),
        ("[pools.x]", "snode.toml: pools.x.type: None is none of files, lvm, lvm-thin"),
        ('[pools.x]\ntype = "files"', "snode.toml: pools.x.directory: required for a pool of type files"),
        ('[pools.x]\ntype = "files"\nvg = "a"\ndirectory = "/a"', "snode.toml: pools.x.vg: unknown setting"),
        ('[pools.x]\ntype = "lvm"', "snode.toml: pools.x.vg: required for a pool of type lvm"),
        ('[pools.x]\ntype = "lvm"\nvg = "a/b"', "snode.toml: pools.x.vg: 'a/b' is not a name that LVM allows"),
        ('[pools.x]\ntype = "lvm"\nvg = "-a"', "snode.toml: pools.x.vg: '-a' is not a name that LVM allows"),
        ('[pools.x]\ntype = "lvm"\nvg = "a"\nlayout = "raid"', "snode.toml: pools.x.layout: 'raid' is none of linear"),
        ('[pools.x]\ntype = "lvm"\nvg = "a"\ndevices = ["/etc"]', "snode.toml: pools.x.devices: '/etc' is not"),
        ('[pools.x]\ntype = "lvm"\nvg = "a"', "snode.toml: controller.portals: required, since pool x"),
        ('[pools.x]\ntype = "lvm"\nvg = "a"\nexport = "none"', "snode.toml: pools.x.export: only pools of type files"),
        (
            '[pools.x]\ntype = "files"\ndirectory = "/a"\novercommit_ratio = nan',
            "snode.toml: pools.x.overcommit_ratio: nan is not between 0.1 and 1000",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, problem: str) -> None:
    problems = _problems(tmp_path, text)
    assert any(line.startswith(problem) for line in problems), problems


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = 'statedir = "x"\nlog_level = 7\n[node]\nname = "A"\n[pools.x]\ntype = "lvm"\nstripes = "2"\n'
    problems = _problems(tmp_path, text, environment={"SNODE_LOG_FORMAT": "yaml"}, flags={"endpoint": "x"})
    assert len(problems) == 7, problems
    for word in ("statedir", "log_level", "node.name", "x.vg", "x.stripes", "SNODE_LOG_FORMAT", "flag --endpoint"):
        assert any(word in problem for problem in problems), word


def test_a_file_that_is_no_toml_and_a_missing_one_are_told(tmp_path: Path) -> None:
    assert _problems(tmp_path, "a = [")[0].startswith("snode.toml: not valid TOML: ")
    with pytest.raises(ConfigError, match=r"absent\.toml: can't be read: No such file"):
        load(tmp_path / "absent.toml", environment=NO_ENVIRONMENT)


def test_a_misspelt_variable_is_told_and_foreign_ones_are_left_alone(tmp_path: Path) -> None:
    problems = _problems(tmp_path, "", environment={"SNODE_CONTROLER_PORTALS": "x"})
    assert problems == [
        "environment variable SNODE_CONTROLER_PORTALS: unknown setting; did you mean SNODE_CONTROLLER_PORTALS?"
    ]
    assert _problems(tmp_path, "", environment={"SNODE_QQQ": "x"}) == [
        "environment variable SNODE_QQQ: unknown setting; unset it"
    ]
    names = (
        "SNODE_PORT", "SNODE_SERVICE_HOST", "SNODE_SERVICE_PORT", "SNODE_SERVICE_PORT_CSI", "SNODE_CONTROLLER_PORT",
        "SNODE_CONTROLLER_SERVICE_HOST", "SNODE_PORT_80_TCP", "SNODE_PORT_80_TCP_ADDR", "SNODE_TEST",
    )  # fmt: skip
    _load(tmp_path, "", environment=dict.fromkeys(names, "x"))


def test_the_crash_switch_is_for_tests_only(tmp_path: Path) -> None:
    switch = {"SNODE_CRASH_AT": "1", "SNODE_CRASH_LOG": "/x"}
    assert len(_problems(tmp_path, "", environment=switch)) == 2
    _load(tmp_path, "", environment={**switch, "SNODE_TEST": "1"})


_PORTALS = '[controller]\nportals = ["192.0.2.1:3260"]\n'


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ('layout = "striped"\nstripes = 1', "stripes: 1: layout striped takes at least 2"),
        ('layout = "raid5"\nstripes = 1', "stripes: 1: layout raid5 takes at least 2"),
        ('layout = "raid6"\nstripes = 2', "stripes: 2: layout raid6 takes at least 3"),
        ('layout = "raid10"\nstripes = 1', "stripes: 1: layout raid10 takes at least 2"),
        ("stripes = 2", "stripes: 2: layout linear takes none"),
        ('layout = "raid1"\nstripes = 2', "stripes: 2: layout raid1 takes none"),
        ("mirrors = 1", "mirrors: 1: layout linear takes none"),
        ('layout = "raid5"\nmirrors = 1', "mirrors: 1: layout raid5 takes none"),
    ],
)
def test_a_layout_that_lvm_does_not_have_is_told_with_its_key(tmp_path: Path, keys: str, problem: str) -> None:
    text = f'{_PORTALS}[pools.x]\ntype = "lvm"\nvg = "vg0"\n{keys}\n'
    assert _problems(tmp_path, text) == [f"snode.toml: pools.x.{problem}"]


def test_pools_do_not_share_a_folder_or_a_thin_pool(tmp_path: Path) -> None:
    def files(name: str, folder: str) -> str:
        return f'[pools.{name}]\ntype = "files"\ndirectory = "{tmp_path}/{folder}"\n'

    def thin(name: str, vg: str, pool: str) -> str:
        return f'[pools.{name}]\ntype = "lvm-thin"\nvg = "{vg}"\nthin_pool = "{pool}"\n'

    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other in ("a", "a/b", "link", "link/b"):
        (problem,) = _problems(tmp_path, files("one", "a") + files("two", other))
        assert problem.startswith(f"snode.toml: pools.two.directory: {other} and a of pool one are one folder"), problem
    assert _problems(tmp_path, files("one", "a/b") + files("two", "a"))
    _load(tmp_path, files("one", "a") + files("two", "ab"))
    (problem,) = _problems(tmp_path, _PORTALS + thin("one", "vg0", "tp") + thin("two", "vg0", "tp"))
    assert problem == "snode.toml: pools.two.thin_pool: vg0/tp is pool one already; name another thin pool"
    _load(tmp_path, _PORTALS + thin("one", "vg0", "tp") + thin("two", "vg0", "tq") + thin("three", "vg1", "tp"))


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_reference_page_is_the_tables() -> None:
    page = (PROJECT / "docs" / "reference" / "configuration.md").read_text()
    assert page == config_reference.page(), f"run: {config_reference.__doc__}"


def test_the_table_and_the_classes_have_the_same_settings() -> None:
    classes = {"tls": TlsFiles, "controller": config.ControllerConfig, "node": config.NodeConfig}
    for section, kind in classes.items():
        assert {s.key for s in settings_of(section)} == {field.name for field in fields(kind)}, section
    top = {field.name for field in fields(Config)} - set(SECTIONS)
    assert {setting.key for setting in settings_of("")} == top
    for name, pool in (("files", FilesPool), ("lvm", LvmPool), ("lvm-thin", LvmThinPool)):
        keys = {setting.key for setting in settings_of("pools", pool_type=name)} - {"type"}
        assert keys == {field.name for field in fields(pool)}, name


def test_variables_are_named_by_one_rule() -> None:
    for setting in SETTINGS:
        if setting.section == "pools":
            assert not setting.variable
        elif setting.key != "endpoint":
            assert setting.variable == "SNODE_" + setting.name.upper().replace(".", "_")
    assert len({setting.name + str(setting.pool_types) for setting in SETTINGS}) == len(SETTINGS)
