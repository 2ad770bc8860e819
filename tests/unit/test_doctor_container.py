"""The doctor in a container, which is this process with another folder for the host's root."""

import os
import socket
from pathlib import Path

import pytest

from csi.config import load
from csi.doctor import examine
from csi.doctor_container import HostFolders, network_findings
from csi.doctor_host import Finding, Host
from csi.doctor_portals import portal_findings
from tests.fakes.runner import FakeRunner

#: The same files under another name, as a container with all of the host's folders sees them.
SAME = Path("/proc/self/root")


def _findings(tmp_path: Path, text: str, *, root: Path, role: str) -> list[Finding]:
    file = tmp_path / "snode.toml"
    file.write_text(f'tools = "host"\nstate_dir = "{tmp_path}/state"\n{text}')
    config = load(file, environment={})
    host = Host(runner=FakeRunner({}), root=root)
    return list(HostFolders(config, host, controller=role != "node", node=role != "controller").findings())


def _faults(findings: list[Finding]) -> dict[str, str]:
    assert all(f.repair.startswith("mount the host's folder there") for f in findings if f.level == "error")
    return {f.text.split()[0]: f.text for f in findings if f.level == "error"}


def _settings(tmp_path: Path) -> str:
    return (
        f'[controller]\nportals = ["127.0.0.1:3260"]\ntgt_socket = "{tmp_path}/tgtd/socket.0"\n'
        f'[node]\ntarget_roots = ["{tmp_path}/kubelet"]\nkubelet_registry = "{tmp_path}/registry"\n'
        f'initiator_file = "{tmp_path}/iscsi/initiatorname.iscsi"\n'
        f'[pools.local]\ntype = "files"\ndirectory = "{tmp_path}/local"\n'
        f'[pools.files]\ntype = "files"\ndirectory = "{tmp_path}/files"\nexport = "tgt"\n'
    )


def test_a_container_with_all_folders_of_the_host_has_no_fault(tmp_path: Path) -> None:
    (finding,) = _findings(tmp_path, _settings(tmp_path), root=SAME, role="all")
    assert finding.level == "ok"
    assert {"/dev", f"{tmp_path}/state", f"{tmp_path}/kubelet"} <= set(finding.text.split(", "))


@pytest.mark.parametrize(
    ("role", "folders"),
    [
        ("controller", {"state", "tgtd", "local", "files"}),
        ("node", {"state", "kubelet", "registry", "iscsi", "local"}),
    ],
)
def test_each_folder_that_is_the_containers_own_is_told(tmp_path: Path, role: str, folders: set[str]) -> None:
    host = tmp_path / "host"
    for name in ("state", "tgtd", "local", "files", "kubelet", "registry", "iscsi"):
        (tmp_path / name).mkdir()
        (host / tmp_path.relative_to("/") / name).mkdir(parents=True)
    (host / "dev").mkdir()
    (host / "run/snode").mkdir(parents=True)
    settings = f'endpoint = "unix://{tmp_path}/csi.sock"\n{_settings(tmp_path)}'
    faults = _faults(_findings(tmp_path, settings, root=host, role=role))
    wanted = {"/dev", *(f"{tmp_path}/{name}" for name in folders)}
    if role == "node":
        wanted.add(str(tmp_path))  # of the endpoint
    assert set(faults) == wanted
    assert "not the host's: records would go with the container" in faults[f"{tmp_path}/state"]


def test_a_folder_that_the_container_lacks_is_told(tmp_path: Path) -> None:
    host = tmp_path / "host"
    (host / tmp_path.relative_to("/") / "state").mkdir(parents=True)
    faults = _faults(_findings(tmp_path, "", root=host, role="controller"))
    assert "is missing in the container" in faults[f"{tmp_path}/state"]


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    faults = _faults(_findings(tmp_path, "", root=tmp_path / "host", role="controller"))
    assert {"/dev", f"{tmp_path}/state"} <= set(faults)
    assert _findings(tmp_path, "", root=SAME, role="controller")[0].level == "ok"


def test_links_lead_where_the_host_says(tmp_path: Path) -> None:
    """On the host /var/run is a link to /run: its own, not the container's."""
    (tmp_path / "run/tgtd").mkdir(parents=True)
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    (tmp_path / "var/again").symlink_to("../var/run")
    host = Host(runner=FakeRunner({}), root=tmp_path)
    for path in ("/var/run/tgtd", "/var/again/tgtd", "/run/../run/tgtd"):
        assert host.path(Path(path)) == tmp_path / "run/tgtd"
    (tmp_path / "ring").symlink_to("/ring")
    assert host.path(Path("/ring/x")).name == "x"
    assert not os.path.lexists(host.path(Path("/absent/x")))


@pytest.mark.parametrize(("ours", "level"), [("net:[1]", "ok"), ("net:[2]", "error")])
def test_a_network_that_is_not_the_hosts_is_told(tmp_path: Path, ours: str, level: str) -> None:
    for process, name in (("self", ours), ("1", "net:[1]")):
        (tmp_path / "proc" / process / "ns").mkdir(parents=True)
        (tmp_path / "proc" / process / "ns/net").symlink_to(name)
    (finding,) = network_findings(Host(runner=FakeRunner({}), root=tmp_path))
    assert finding.level == level
    assert level == "ok" or finding.repair.startswith("hostNetwork: true")


def test_the_doctor_looks_at_a_container_when_tools_are_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.doctor.host_problem", lambda: "")  # the tests' own machine may be a container
    file = tmp_path / "snode.toml"
    file.write_text(f'tools = "host"\nstate_dir = "{tmp_path}/state"\n')
    host = Host(runner=FakeRunner({}), root=tmp_path)
    found = examine(load(file, environment={}), role="controller", host=host)
    assert "host's folders" in {finding.subject for finding in found if finding.level == "error"}
    file.write_text(f'state_dir = "{tmp_path}/state"\n')
    found = examine(load(file, environment={}), role="controller", host=host)
    assert "host's folders" not in {finding.subject for finding in found}


# -- portals ---------------------------------------------------------------------------------------------------------


def _portal(portal: str) -> Finding:
    (finding,) = portal_findings([portal])
    return finding


@pytest.mark.parametrize(("address", "text"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_a_portal_at_which_somebody_listens(address: str, text: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((address, 0))
        server.listen()
        portal = f"{text}:{server.getsockname()[1]}"
        assert _portal(portal).level == "ok"
    finding = _portal(portal)
    assert (finding.level, finding.text) == ("error", f"{portal}: nobody listens there (Connection refused)")


def test_a_portal_of_another_machine_is_a_warning() -> None:
    finding = _portal("192.0.2.10:3260")
    assert (finding.level, finding.text) == ("warning", "192.0.2.10:3260: this machine has no such address")
