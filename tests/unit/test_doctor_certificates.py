"""What the doctor says of certificates."""

from pathlib import Path

import pytest

from csi import certs
from csi.doctor_host import Finding
from tests.unit.test_doctor import FILES, Machine

_TLS = '[tls]\nca = "{0}/ca.pem"\ncert = "{0}/{1}.pem"\nkey = "{0}/{1}.key"\n'
_DOCKER = '[docker]\ncontroller = "tcp://192.0.2.1:9750"\n[node]\nname = "cnode1"\n'


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    certs.init(tmp_path / "ca")
    return tmp_path / "ca"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root")


def told(machine: Machine, ca: Path, name: str, *, listen: bool = False, docker: bool = False) -> list[Finding]:
    text = ('listen = "tcp://192.0.2.1:9750"\n' if listen else "") + FILES + _TLS.format(ca, name)
    found = machine.examine(text + (_DOCKER if docker else ""))
    return [finding for finding in found if finding.subject == "certificate"]


def test_a_certificate_that_holds_is_shown(machine: Machine, ca: Path) -> None:
    certs.issue(ca, "cnode1", roles=["node", "volumes"], days=60)
    (found,) = told(machine, ca, "cnode1", docker=True)
    assert found.level == "ok"
    assert "cnode1's (node:cnode1, volumes) and holds for 59 days more" in found.text


def test_its_coming_end_is_a_warning(machine: Machine, ca: Path) -> None:
    certs.issue(ca, "cnode1", days=20)
    (found,) = told(machine, ca, "cnode1")
    assert found.level == "warning" and "ends in 19 days" in found.text
    assert found.repair.startswith("issue it again: snode certs issue")


@pytest.mark.parametrize(
    ("name", "roles", "options", "repair"),
    [
        ("cnode1", ["node"], {"listen": True}, "snode certs issue NAME --role server --address ADDRESS"),
        ("cnode1", ["node"], {"docker": True}, "snode certs issue cnode1 --role node --role volumes"),
        ("cnode1", ["volumes"], {"docker": True}, "snode certs issue cnode1 --role node --role volumes"),
        ("cnode2", ["node", "volumes"], {"docker": True}, "snode certs issue cnode1 --role node --role volumes"),
    ],
)
def test_one_that_is_not_for_its_use_is_an_error(
    machine: Machine, ca: Path, name: str, roles: list[str], options: dict[str, bool], repair: str
) -> None:
    certs.issue(ca, name, roles=roles)
    (found,) = told(machine, ca, name, **options)
    assert (found.level, found.repair) == ("error", repair)


def test_both_cas_may_stand_in_one_file(machine: Machine, ca: Path, tmp_path: Path) -> None:
    certs.issue(ca, "cnode1")
    other = tmp_path / "other"
    certs.init(other)
    own = (ca / "ca.pem").read_bytes()
    (ca / "ca.pem").write_bytes((other / "ca.pem").read_bytes() + own)
    (found,) = told(machine, ca, "cnode1")
    assert found.level == "ok"
    (ca / "ca.pem").write_bytes((other / "ca.pem").read_bytes())
    (found,) = told(machine, ca, "cnode1")
    assert found.level == "error" and "was not signed by" in found.text
