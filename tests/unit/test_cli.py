import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner, Result

from csi import __version__, cli
from csi.claims import claim_tgtd
from csi.rpc.endpoint import Endpoint
from tests.rpc.service import create, mount
from tests.rpc.test_server import Running, running
from tests.rpc.use_cases import NODE_ID


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command sets up the logging of its process, which here is the tests'."""
    yield
    structlog.reset_defaults()


COMMANDS = ("controller", "node", "all", "demo", "volumes", "volumes list", "volumes show", "doctor")


def _run(*argv: str, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "csi", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", **(environment or {})},
    )


def _invoke(*argv: str) -> Result:
    return CliRunner().invoke(cli.snode, argv)


def test_version() -> None:
    result = _run("--version")
    assert (result.returncode, result.stdout) == (0, f"snode, version {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str) -> None:
    result = _invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"snode {command}" in result.output


def test_help_names_settings_with_variable_and_default() -> None:
    output = " ".join(_invoke("all", "--help").output.split())
    assert "[CSI_ENDPOINT; default: unix:///run/snode/csi.sock]" in output
    assert "[SNODE_STATE_DIR; default: /var/lib/snode]" in output


def test_help_imports_nothing_heavy() -> None:
    script = "import sys, csi.cli; print([m for m in ('grpc', 'cryptography', 'google.protobuf') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("argv", [["frobnicate"], ["all", "--no-such-flag"], ["volumes", "show"]])
def test_wrong_usage_is_2(argv: list[str]) -> None:
    assert _run(*argv).returncode == 2


def test_wrong_settings_are_2_and_all_told(tmp_path: Path) -> None:
    file = tmp_path / "snode.toml"
    file.write_text('statedir = "x"\nlog_level = "x"\n')
    result = _run("all", "--config", str(file))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"snode: {file}: statedir: unknown setting; did you mean state_dir?",
        f"snode: {file}: log_level: 'x' is none of debug, info, warning, error",
    ]


def test_a_combination_that_lvm_does_not_have_is_2(tmp_path: Path) -> None:
    file = tmp_path / "snode.toml"
    file.write_text(
        f'state_dir = "{tmp_path}/state"\n[controller]\nportals = ["192.0.2.1:3260"]\n'
        '[pools.x]\ntype = "lvm"\nvg = "vg0"\nlayout = "linear"\nmirrors = 2\n'
    )
    result = _run("controller", "--config", str(file), "--endpoint", f"unix://{tmp_path}/csi.sock")
    assert result.returncode == 2
    assert f"{file}: pools.x.mirrors: 2: layout linear takes none" in result.stderr


def test_a_start_that_fails_is_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = _run("controller", "--state-dir", f"{tmp_path}/file/state", "--endpoint", f"unix://{tmp_path}/csi.sock")
    assert result.returncode == 1
    assert "state_dir" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"SNODE_TEST": "1", "SNODE_CRASH_AT": "abc"}, 1, "SNODE_CRASH_AT: 'abc' is not a whole number"),
        ({"SNODE_CRASH_AT": "3"}, 2, "SNODE_CRASH_AT: for tests only"),
        ({"SNODE_FOO_BAR": "3"}, 2, "SNODE_FOO_BAR: unknown setting"),
    ],
)
def test_a_wrong_variable_is_a_sentence(tmp_path: Path, environment: dict[str, str], code: int, words: str) -> None:
    argv = ["all", "--state-dir", f"{tmp_path}/state", "--endpoint", f"unix://{tmp_path}/csi.sock"]
    result = _run(*argv, environment=environment)
    assert result.returncode == code
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_tls_file_is_a_sentence(tmp_path: Path) -> None:
    files = {f"SNODE_TLS_{key}": f"{tmp_path}/{key}.pem" for key in ("CA", "CERT", "KEY")}
    environment = {**files, "CSI_ENDPOINT": "tcp://127.0.0.1:1"}
    for argv in (["volumes", "list"], ["controller", "--state-dir", f"{tmp_path}/state"]):
        result = _run(*argv, environment=environment)
        assert result.returncode == 1
        assert re.fullmatch(rf".*tls: can't read {tmp_path}/\w+\.pem: No such file or directory\n", result.stderr)


def test_a_second_controller_on_a_tgtd_is_1(tmp_path: Path) -> None:
    file = tmp_path / "snode.toml"
    file.write_text(
        f'state_dir = "{tmp_path}/state"\n[controller]\nportals = ["192.0.2.1:3260"]\n'
        f'tgt_socket = "{tmp_path}/tgtd"\n[pools.x]\ntype = "files"\ndirectory = "{tmp_path}/pool"\nexport = "tgt"\n'
    )
    lock = f"/run/snode-tgt-{str(tmp_path / 'tgtd').strip('/').replace('-', '--').replace('/', '-')}.lock"
    try:
        claim_tgtd(tmp_path / "tgtd")
        result = _run("controller", "--config", str(file), "--endpoint", f"unix://{tmp_path}/csi.sock")
        assert result.returncode == 1
        assert result.stderr.startswith(f"snode: {lock}: another controller has the tgtd at {tmp_path}/tgtd")
    finally:
        Path(lock).unlink()


def test_no_driver_is_1(tmp_path: Path) -> None:
    result = _run("volumes", "list", environment={"CSI_ENDPOINT": f"unix://{tmp_path}/csi.sock"})
    assert result.returncode == 1
    assert "nothing answers there; is the driver running" in result.stderr


# -- volumes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Running, str]]:
    endpoint = Endpoint(socket=tmp_path / "csi.sock")
    with running(endpoint) as server:
        yield server, str(endpoint)


def _fill(server: Running) -> list[str]:
    from csi.deadline import Deadline
    from csi.services.values import capability

    ids = []
    for name, size in (("pvc-1", 10 << 30), ("line\nbreak", 1536 << 20)):
        request = create(name)
        ids.append(
            server.volumes.create(
                name=request.name,
                required_bytes=size,
                limit_bytes=0,
                capabilities=[],
                parameters={"pool": "fast"},
                requisite=[],
                deadline=Deadline.after(1),
            ).volume_id
        )
    server.volumes.publish(
        ids[0], node_id=NODE_ID, capability=capability(mount()), readonly=False, deadline=Deadline.after(1)
    )
    return ids


def test_list_shows_a_table(server: tuple[Running, str]) -> None:
    ids = _fill(server[0])
    result = _invoke("volumes", "list", "--endpoint", server[1])
    assert result.exit_code == 0
    head, *lines = result.output.splitlines()
    assert head.split() == ["VOLUME", "NAME", "POOL", "SIZE", "PUBLISHED", "TO"]
    rows = {line.split()[0]: line for line in lines}
    assert set(rows) == set(ids)
    assert rows[ids[0]].split()[1:] == ["pvc-1", "fast", "10", "GiB", "node-a"]
    assert rows[ids[1]].split()[1:] == ["line\\nbreak", "fast", "1.5", "GiB", "-"]


def test_list_and_show_speak_json(server: tuple[Running, str]) -> None:
    ids = _fill(server[0])
    listed = json.loads(_invoke("volumes", "list", "--json", "--endpoint", server[1]).output)
    assert [volume["volume_id"] for volume in listed] == sorted(ids)
    shown = json.loads(_invoke("volumes", "show", ids[0], "--json", "--endpoint", server[1]).output)
    assert shown == {
        "volume_id": ids[0],
        "name": "pvc-1",
        "pool": "fast",
        "size_bytes": 10 << 30,
        "nodes": ["node-a"],
        "reachable_from": [],
        "fs_type": "",
        "takeover": "",
    }


def test_list_goes_through_all_pages(server: tuple[Running, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = _fill(server[0])
    monkeypatch.setattr("csi.client._PAGE", 1)
    listed = json.loads(_invoke("volumes", "list", "--json", "--endpoint", server[1]).output)
    assert [volume["volume_id"] for volume in listed] == sorted(ids)


def test_show_for_people(server: tuple[Running, str]) -> None:
    ids = _fill(server[0])
    output = _invoke("volumes", "show", ids[0], "--endpoint", server[1]).output
    assert "10 GiB (10737418240 bytes)" in output
    assert "every node" in output


def test_show_of_a_missing_volume_is_1(server: tuple[Running, str]) -> None:
    result = _run("volumes", "show", "v-nope", "--endpoint", server[1])
    assert result.returncode == 1
    assert "volume_id 'v-nope'" in result.stderr


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_prints_findings_and_its_exit_code_is_theirs(tmp_path: Path) -> None:
    file = tmp_path / "snode.toml"
    file.write_text(f'state_dir = "{tmp_path}/state"\n[pools.p]\ntype = "files"\ndirectory = "{tmp_path}/pool"\n')
    result = _invoke("doctor", "--config", str(file), "--json")
    findings = json.loads(result.output)
    assert result.exit_code == (1 if any(f["level"] == "error" for f in findings) else 0)
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o755)
    result = _invoke("doctor", "--config", str(file))
    assert result.exit_code == 1
    assert f"        -> chmod 0700 {tmp_path}/state" in result.output


# -- start -----------------------------------------------------------------------------------------------------------


def test_the_command_line_is_quick() -> None:
    began = time.monotonic()
    assert _run("--help").returncode == 0
    assert time.monotonic() - began < 2  # 0.15 s alone; the machine may be busy
