import pytest

from csi.connectors.portal import Portal
from csi.deadline import Deadline
from csi.errors import Invalid, Unavailable


@pytest.mark.parametrize(
    ("text", "portal", "argument", "folder"),
    [
        ("10.0.0.1:3260", Portal("10.0.0.1", 3260), "10.0.0.1:3260,1", "10.0.0.1,3260,1"),
        ("[FD00:0::1]:3261", Portal("fd00::1", 3261), "[fd00::1]:3261,1", "fd00::1,3261,1"),
    ],
)
def test_forms(text: str, portal: Portal, argument: str, folder: str) -> None:
    found = Portal.parse(text)
    assert (found, found.argument, found.folder) == (portal, argument, folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.1",
        "10.0.0.300:3260",
        "localhost:3260",
        "[fe80::1%eth0]:3260",
        "[10.0.0.1]:3260",
        ":3260",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "fd00::1:3260",
        "[10.0.0.1:3260",
        "a b",
        "x\n",
        "[zz::1]:3260",
        "a;b",
    ],
)
def test_not_a_portal(text: str) -> None:
    with pytest.raises(Invalid, match="portal"):
        Portal.parse(text)


def test_closed_port_is_told() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 does not answer"):
        Portal("127.0.0.1", 1).try_connect(Deadline.after(5))
