import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.connectors.initiator import initiator_name
from csi.connectors.iscsi import IscsiConnector
from csi.deadline import Deadline
from csi.errors import Unavailable
from tests.fakes.iscsi import FakeIscsi
from tests.fakes.runner import FakeRunner

SOCKET = "SNODE_TEST_ISCSID"


@pytest.fixture
def iscsid() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + SOCKET)
        listener.listen()
        yield


def problems(node: FakeIscsi, deadline: Deadline) -> list[str]:
    return IscsiConnector(
        node.runner, sysfs=node.sysfs, initiator_file=node.initiator_file, iscsid_socket=SOCKET
    ).problems(deadline)


def test_all_is_well(node: FakeIscsi, deadline: Deadline, iscsid: None) -> None:
    assert problems(node, deadline) == []
    assert node.runner.calls == [], "an idle service starts no process"


def test_everything_is_missing(node: FakeIscsi, deadline: Deadline) -> None:
    node.runner = FakeRunner({})
    (node.sysfs / "class/iscsi_transport/tcp").rmdir()
    node.initiator_file.unlink()
    program, daemon, module, name = problems(node, deadline)
    assert "install the package open-iscsi" in program
    assert "systemctl enable --now iscsid" in daemon
    assert "modprobe iscsi_tcp" in module
    assert "iscsi-iname" in name
    assert all(problem.partition(" -> ")[2] for problem in (program, daemon, module, name))


def test_module_that_can_be_loaded_is_fine(node: FakeIscsi, deadline: Deadline, iscsid: None) -> None:
    (node.sysfs / "class/iscsi_transport/tcp").rmdir()
    code = 0
    node.runner.programs["modprobe"] = lambda argv, _: (code, "", "")
    connector = IscsiConnector(node.runner, sysfs=node.sysfs, initiator_file=node.initiator_file, iscsid_socket=SOCKET)
    assert connector.problems(deadline) == []
    code = 1
    assert connector.problems(deadline) == []
    assert node.runner.count("modprobe") == 1, "an idle service starts no process"
    (module,) = problems(node, deadline)
    assert "module package" in module


@pytest.mark.parametrize(
    "name",
    [
        "iqn.1993-08.org.debian:01:222222222222",
        "iqn.2004-01.com.example:default",
        "iqn.2004-01.com.example:Template".lower(),
        "iqn.1994-05.com.redhat:localhost",
    ],
)
def test_name_of_an_image(node: FakeIscsi, deadline: Deadline, iscsid: None, name: str) -> None:
    node.initiator_file.write_text(f"InitiatorName={name}\n")
    (problem,) = problems(node, deadline)
    assert "not unique" in problem and "iscsi-iname" in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 lines"),
        ("GenerateName=yes\n", "0 lines"),
        ("#InitiatorName=iqn.2004-01.com.x:y\n", "0 lines"),
        ("InitiatorName=iqn.2004-01.com.x:y\nInitiatorName=iqn.2004-01.com.x:z\n", "2 lines"),
        ("InitiatorName=host1\n", "not an iSCSI name"),
        ("InitiatorName=iqn.2004-01.com.x:y,z\n", "not an iSCSI name"),
        ("InitiatorName=iqn.2004-01.com.x:" + "y" * 230 + "\n", "not an iSCSI name"),
    ],
)
def test_unusable_names(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "initiatorname.iscsi"
    path.write_text(text)
    with pytest.raises(Unavailable, match=f"{path}.*{words}"):
        initiator_name(path)


def test_usable_name(tmp_path: Path) -> None:
    path = tmp_path / "initiatorname.iscsi"
    path.write_text("## a comment\n  InitiatorName = iqn.1993-08.org.debian:01:d680fb2fb0aa \n")
    assert initiator_name(path) == "iqn.1993-08.org.debian:01:d680fb2fb0aa"
