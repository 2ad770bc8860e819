"""The CA and what it issues."""

import datetime
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from csi import certs
from csi.cli import snode
from csi.errors import Conflict, Invalid, NotFound, Unavailable


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    certs.init(tmp_path / "tls")
    return tmp_path / "tls"


def test_a_folder_has_one_ca(ca: Path) -> None:
    with pytest.raises(Conflict, match=r"ca\.pem: this folder has a CA already"):
        certs.init(ca)


def test_keys_are_for_root_alone(ca: Path) -> None:
    certs.issue(ca, "cnode1")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in ca.iterdir()}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "cnode1.pem": 0o644, "cnode1.key": 0o600}
    assert stat.S_IMODE(ca.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("name", "roles", "addresses", "words"),
    [
        ("../x", ["node"], [], "not a name"),
        ("ca", ["node"], [], "not a name"),
        ("Cnode1", ["node"], [], "not a name"),
        ("cnode1", ["root"], [], "role 'root' does not exist"),
        ("cnode1", [], [], "at least one role"),
        ("snode1", ["server"], [], "go together"),
        ("cnode1", ["node"], ["192.0.2.1"], "go together"),
        ("snode1", ["server"], ["a b"], "neither a host name nor an IP address"),
    ],
)
def test_bad_requests_leave_nothing(ca: Path, name: str, roles: list[str], addresses: list[str], words: str) -> None:
    with pytest.raises(Invalid, match=words):
        certs.issue(ca, name, roles=roles, addresses=addresses)
    assert {path.name for path in ca.iterdir()} == {"ca.pem", "ca.key"}


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_days_have_bounds(ca: Path, days: int) -> None:
    with pytest.raises(Invalid, match="1 to 3650 days"):
        certs.issue(ca, "cnode1", days=days)


def test_without_a_ca_the_next_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="snode certs init --folder"):
        certs.issue(tmp_path, "cnode1")


def test_nothing_outlives_its_ca(tmp_path: Path) -> None:
    ca = certs.init(tmp_path, days=10)
    assert certs.issue(tmp_path, "cnode1", days=365).not_after == ca.not_after


def test_what_is_wrong_is_told(ca: Path, tmp_path: Path) -> None:
    certs.issue(ca, "cnode1", days=100)
    certs.issue(ca, "snode1", roles=["server"], addresses=["192.0.2.1", "snode1"])
    node, server = certs.files_of(ca, "cnode1"), certs.files_of(ca, "snode1")
    assert certs.problems(node, server=False) == []
    assert certs.problems(server, server=True) == []
    assert [(error, "is no server's" in text) for error, text in certs.problems(node, server=True)] == [(True, True)]
    now = datetime.datetime.now(datetime.UTC)
    (soon,) = certs.problems(node, server=False, now=now + datetime.timedelta(days=80))
    assert soon[0] is False and "ends in 1" in soon[1] and "-> issue it again" in soon[1]
    (over,) = certs.problems(node, server=False, now=now + datetime.timedelta(days=101))
    assert over[0] is True and "is over since" in over[1]
    node.key.chmod(0o640)
    assert "-> chmod 0600" in certs.problems(node, server=False)[0][1]
    node.key.write_bytes(server.key.read_bytes())
    assert any("is not the key of" in text for _, text in certs.problems(node, server=False))
    node.key.write_text("nonsense")
    assert "is no key in PEM form" in certs.problems(node, server=False)[0][1]
    other = tmp_path / "other"
    certs.init(other)
    server.ca.write_bytes((other / "ca.pem").read_bytes())
    assert any("was not signed by" in text for _, text in certs.problems(server, server=True))
    server.ca.unlink()
    assert "can't be read" in certs.problems(server, server=True)[0][1]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("x")
    with pytest.raises(Unavailable, match="is no certificate in PEM form"):
        certs.read(tmp_path / "x.pem")


def test_the_commands(tmp_path: Path) -> None:
    run = CliRunner().invoke
    folder = str(tmp_path / "tls")
    assert run(snode, ["certs", "init", "--folder", folder]).exit_code == 0
    done = run(snode, ["certs", "issue", "snode1", "--folder", folder, "--role", "server", "--address", "192.0.2.1"])
    assert done.exit_code == 0 and f'key = "{folder}/snode1.key"' in done.output
    assert run(snode, ["certs", "issue", "cnode1", "--folder", folder]).exit_code == 0
    done = run(snode, ["certs", "show", f"{folder}/cnode1.pem", f"{folder}/ca.pem"])
    assert "cnode1: node:cnode1; until" in done.output and "no role (a CA" in done.output
    done = run(snode, ["certs", "show", "--json", f"{folder}/snode1.pem"])
    assert '"addresses": [\n      "192.0.2.1"' in done.output
