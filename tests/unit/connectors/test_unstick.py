"""Lost sessions are freed for iscsid, and nobody else's; with the kernel's answer, or without one."""

from pathlib import Path

import pytest
import structlog

from csi.connectors.unstick import KernelStop, Unstick
from csi.deadline import Deadline
from csi.errors import Unavailable
from tests.fakes.iscsi import FakeIscsi

V = "v-" + "a" * 26
OTHER = "v-" + "b" * 26
FOREIGN = "iqn.2001-04.com.example:disk"


class Kernel:
    """Notes what it is asked, and can refuse."""

    def __init__(self) -> None:
        self.stopped: list[int] = []
        self.refuses = False

    def __call__(self, number: int) -> None:
        if self.refuses:
            raise Unavailable("no")
        self.stopped.append(number)


def set_connection(node: FakeIscsi, number: int, state: str) -> None:
    """What sysfs says of the connection of a session."""
    name = f"connection{number}:0"
    folder = node.sessions[number].folder / name / "iscsi_connection" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_text(f"{state}\n")


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def unstick(node: FakeIscsi, kernel: Kernel) -> Unstick:
    return Unstick(sysfs=node.sysfs, stop=kernel)


def lose(node: FakeIscsi) -> None:
    """Every session, and every connection is failed."""
    node.set_state("FAILED", "blocked")
    for number in node.sessions:
        set_connection(node, number, "failed")


def test_a_session_that_stays_lost_is_freed(
    node: FakeIscsi, kernel: Kernel, unstick: Unstick, deadline: Deadline
) -> None:
    node.connector().connect(node.publish(V), deadline)
    unstick.turn(deadline)
    lose(node)
    unstick.turn(deadline)
    assert kernel.stopped == []  # iscsid may be about to do it
    unstick.turn(deadline)
    unstick.turn(deadline)
    assert kernel.stopped == [1, 1]
    node.set_state("LOGGED_IN", "running")
    set_connection(node, 1, "up")
    unstick.turn(deadline)
    assert kernel.stopped == [1, 1]


def test_a_session_that_comes_back_while_others_are_freed_is_left_alone(
    node: FakeIscsi, kernel: Kernel, deadline: Deadline
) -> None:
    """The kernel would stop its new connection, and iscsid would not be told."""
    for volume_id in (V, OTHER):
        node.connector().connect(node.publish(volume_id), deadline)

    def stop(number: int) -> None:
        kernel(number)
        (other,) = {1, 2} - {number}
        set_connection(node, other, "up")

    unstick = Unstick(sysfs=node.sysfs, stop=stop)
    lose(node)
    for _ in range(2):
        unstick.turn(deadline)
    assert len(kernel.stopped) == 1


def test_a_login_under_way_is_left_alone(node: FakeIscsi, kernel: Kernel, unstick: Unstick, deadline: Deadline) -> None:
    node.connector().connect(node.publish(V), deadline)
    lose(node)
    unstick.turn(deadline)
    set_connection(node, 1, "bound")
    unstick.turn(deadline)
    set_connection(node, 1, "failed")
    unstick.turn(deadline)
    assert kernel.stopped == []


def test_sessions_of_others_are_left_alone(
    node: FakeIscsi, kernel: Kernel, unstick: Unstick, deadline: Deadline
) -> None:
    node.make_session(FOREIGN)
    lose(node)
    for _ in range(3):
        unstick.turn(deadline)
    assert kernel.stopped == []


def test_trouble_is_told_once_and_tried_on(
    node: FakeIscsi, kernel: Kernel, unstick: Unstick, deadline: Deadline
) -> None:
    node.connector().connect(node.publish(V), deadline)
    lose(node)
    kernel.refuses = True
    with structlog.testing.capture_logs() as events:
        for _ in range(4):
            unstick.turn(deadline)
        kernel.refuses = False
        for _ in range(4):
            unstick.turn(deadline)
    assert kernel.stopped == [1] * 4
    assert [event["log_level"] for event in events] == ["warning", "info"]


def test_a_kernel_without_iscsi_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"handle is not there; load the kernel module iscsi_tcp"):
        KernelStop(tmp_path)(7)
