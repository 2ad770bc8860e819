"""The network's faults: a portal that answers nothing, a cut under a writer, bits that turn over on the way."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from csi.pb import csi_pb2 as pb
from tests.lab import roles
from tests.lab.cluster import Cluster, Machine, refused
from tests.lab.conftest import Say, seconds
from tests.lab.oracle import Oracle

from . import initiator
from .flipper import Flipper, first_record, last_record_of_a_page

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Code = grpc.StatusCode


@contextmanager
def setting(cluster: Cluster, machine: Machine, old: str, new: str) -> Iterator[None]:
    """Run the driver of a machine with another text in its settings meanwhile."""
    before = machine.config
    assert before.count(old) == 1
    assert machine.driver is not None
    machine.driver.stop()
    machine.config = before.replace(old, new)
    try:
        cluster.start_driver(machine)
        yield
    finally:
        machine.config = before
        machine.driver.kill9()  # restored after the test


# -- a portal that answers nothing -----------------------------------------------------------------------------------


_HANGS = pytest.param("tgtd hangs", 12, marks=pytest.mark.soak)


@pytest.mark.parametrize(("fault", "timeout"), [("portal cut off", 6), _HANGS])
def test_a_stage_ends_in_time_while_nobody_answers(cluster: Cluster, say: Say, fault: str, timeout: int) -> None:
    """While tgtd hangs its port takes connections, since the kernel does that alone."""
    snode, cnode = cluster.snode, cluster.cnodes[0]
    volume_id = cluster.create()
    context = cluster.publish(volume_id, cnode)
    assert snode.daemon is not None
    if fault == "portal cut off":
        snode.guest.cut()
    else:
        snode.daemon.signal(signal.SIGSTOP)
    began = time.monotonic()
    error = refused(lambda: cluster.stage(volume_id, cnode, context, timeout=timeout))
    say(f"{fault}: refused after {seconds(began)} of {timeout} s")
    assert (initiator.sessions(cnode.guest), initiator.records(cnode.guest)) == ([], [])
    assert error is not None
    assert error.code() is Code.UNAVAILABLE
    assert roles.portal(snode.guest) in str(error.details())
    assert "tgtd" in str(error.details()) and "on the SNODE" in str(error.details())
    snode.guest.heal()
    snode.daemon.signal(signal.SIGCONT)
    cluster.stage(volume_id, cnode, context)
    cluster.detach(volume_id, cnode)
    cluster.delete(volume_id)


# -- a cut under a writer --------------------------------------------------------------------------------------------


class Written:
    """A volume on a CNODE with a writer."""

    def __init__(self, cluster: Cluster, cnode: Machine) -> None:
        self._cluster, self.cnode, self.guest = cluster, cnode, cnode.guest
        self.oracle = Oracle(cnode.guest.name)
        self.volume_id = cluster.create(cnode.guest.name)
        self._context = cluster.publish(self.volume_id, cnode)
        self.attach()
        self.writer = self.oracle.write(self.guest, self._path)
        self.oracle.wait_for(20)

    def attach(self) -> None:
        """Stage and mount, again after `leave`."""
        self._cluster.stage(self.volume_id, self.cnode, self._context)
        self._path = f"{self._cluster.mount(self.volume_id, self.cnode)}/records"

    def leave(self) -> None:
        """Unmount and unstage."""
        self._cluster.leave(self.volume_id, self.cnode, timeout=30)

    def health(self) -> list[str]:
        """NodeGetVolumeHealth: the reasons."""
        request = pb.NodeGetVolumeHealthRequest(volume_id=self.volume_id)
        found = self.cnode.stubs["node"].NodeGetVolumeHealth(request, timeout=10).volume_health
        assert found.volume_id == self.volume_id
        for entry in found.health_statuses:
            assert entry.status == pb.INACCESSIBLE
            assert self.volume_id in entry.message and "tgtd runs on the SNODE" in entry.message
        return [entry.reason for entry in found.health_statuses]

    def goes_on(self) -> None:
        """The writer goes on where it waited, and nothing is lost."""
        self.oracle.wait_for_more(20)
        assert self.oracle.errors == []
        assert self.health() == []
        self.judge()

    def has_given_up(self, *, within_seconds: float) -> None:
        """The writer had an error, the volume can be taken away all the same, and nothing of it is left."""
        end = time.monotonic() + within_seconds
        while self.guest.run("grep -qs offline /sys/block/sd*/device/state")[0]:
            assert time.monotonic() < end, f"still waiting for its session after {within_seconds} s"
            time.sleep(0.1)
        assert self.health() == ["SessionGivenUp"]
        self.leave()
        assert (initiator.sessions(self.guest), initiator.records(self.guest)) == ([], [])
        assert [line.split(": ")[1] for line in self.oracle.errors] == ["5 Input/output error"]

    def judge(self) -> None:
        """Nothing that was acknowledged is lost."""
        self.oracle.judge(self.guest, self._path)

    def end(self) -> None:
        """End the writer, and the volume."""
        self.writer.signal(signal.SIGKILL)
        self.writer.wait(30)
        self._cluster.detach(self.volume_id, self.cnode)
        self._cluster.delete(self.volume_id)


@pytest.mark.soak
def test_a_cut_is_survived_up_to_replacement_timeout_and_no_longer(cluster: Cluster, say: Say) -> None:
    with setting(cluster, cluster.cnodes[1], "[node]\n", "[node]\nreplacement_timeout = 2\n"):
        patient, hasty = (Written(cluster, cnode) for cnode in cluster.cnodes)
        assert patient.health() == hasty.health() == []
        began = time.monotonic()
        cluster.snode.guest.cut()
        hasty.has_given_up(within_seconds=40)
        say(f"given up and unstaged {seconds(began)} after the cut, with replacement_timeout = 2")
        assert (initiator.states(patient.guest), patient.health()) == (["FAILED"], ["SessionLost"])
        cluster.snode.guest.heal()
        began = time.monotonic()
        patient.goes_on()
        say(f"the patient writer goes on {seconds(began)} after the end of the cut")
        hasty.attach()
        hasty.judge()
        patient.end()
        hasty.end()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_cuts_of_30_and_300_seconds(cluster: Cluster, say: Say) -> None:
    volume = Written(cluster, cluster.cnodes[0])
    cluster.snode.guest.cut()
    time.sleep(30)
    cluster.snode.guest.heal()
    began = time.monotonic()
    volume.goes_on()
    say(f"goes on {seconds(began)} after a cut of 30 s")
    began = time.monotonic()
    cluster.snode.guest.cut()
    volume.has_given_up(within_seconds=200)
    say(f"given up and unstaged {seconds(began)} after the cut, with replacement_timeout = 120")
    time.sleep(max(0.0, began + 300 - time.monotonic()))
    cluster.snode.guest.heal()
    volume.attach()
    volume.judge()
    volume.end()


# -- bits that turn over ---------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_digests_find_the_bit_that_turned_over_on_the_way(cluster: Cluster, say: Say) -> None:
    snode, cnode = cluster.snode, cluster.cnodes[0]
    flipper = Flipper(cluster.lab, snode.guest.ip, roles.PORT)
    with (
        setting(cluster, snode, roles.portal(snode.guest), flipper.portal),
        setting(cluster, cnode, "[node]\n", '[node]\ndigests = "crc32c"\n'),
    ):
        volume = Written(cluster, cnode)
        flipper.spoil_to_target(last_record_of_a_page)
        flipper.wait_until_spoiled()
        began = time.monotonic()
        volume.oracle.wait_for_more(20)
        say(f"spoiled on the way to the SNODE: written all the same {seconds(began)} later")
        volume.writer.signal(signal.SIGKILL)
        volume.writer.wait(30)
        volume.leave()
        volume.attach()
        volume.judge()
        cnode.guest.sh("echo 3 > /proc/sys/vm/drop_caches")
        flipper.spoil_to_node(first_record)
        began = time.monotonic()
        volume.judge()
        flipper.wait_until_spoiled(0)
        say(f"spoiled on the way to the CNODE: read all the same {seconds(began)} later")
        digests = cnode.guest.run("cat /sys/class/iscsi_connection/*/{header,data}_digest")[1].split()
        assert digests == ["1", "1"]
        volume.end()
    flipper.close()
