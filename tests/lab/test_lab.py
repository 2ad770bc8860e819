"""The lab itself: guests boot, lose power, keep their disks, and lose their network."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import CommandFailed, Disk, Guest, GuestGone, Lab, LabError, scratch
from .conftest import Say, seconds
from .kernel import PROJECT

pytestmark = pytest.mark.lab
_OUTSIDE = Path("/proc/self/ns/net").readlink()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Guest]]:
    """Two guests that run, for tests that leave them as they were."""
    with Lab() as lab:
        lab.guest("one")
        lab.guest("two")
        lab.boot_all()
        yield lab.guests


def test_three_guests_boot_side_by_side(lab: Lab, say: Say) -> None:
    for name in ("snode", "cnode1", "cnode2"):
        lab.guest(name)
    began = time.monotonic()
    lab.boot_all()
    say(f"kernel {lab.kernel.release}: 3 guests booted in {seconds(began)}")
    assert lab.each(lab.guests, lambda guest: guest.sh("hostname")) == ["snode", "cnode1", "cnode2"]
    assert len(set(lab.each(lab.guests, lambda guest: guest.sh("cat /proc/sys/kernel/random/boot_id")))) == 3
    trips = []
    for _ in range(50):
        began = time.monotonic()
        lab.guests[0].sh(["true"])
        trips.append((time.monotonic() - began) * 1000)
    say(f"round trip of `true`: median {sorted(trips)[25]:.1f} ms, worst {max(trips):.1f} ms")
    began = time.monotonic()
    lab.each(lab.guests, Guest.off)
    say(f"3 guests switched off in {seconds(began)}")


def test_commands_answer_with_code_and_output(pair: list[Guest]) -> None:
    one = pair[0]
    assert one.run("echo out; echo err >&2; exit 3") == (3, "out\nerr\n")
    assert one.sh(["printf", "%s", "a b $HOME"]) == "a b $HOME"
    assert one.sh("wc -c", stdin="x" * 600_000) == "600000"
    assert len(one.sh("seq 500000")) == 3388894
    assert one.run(["no-such-program"])[0] == 127
    assert one.run("sleep 60", timeout=0.2) == (124, "")
    with pytest.raises(CommandFailed, match="one: false"):
        one.sh("false")


def test_many_commands_run_at_once(pair: list[Guest], say: Say) -> None:
    began = time.monotonic()
    commands = [f"sleep .5; echo {number} {'x' * 900}" for number in range(20)]
    answers = pair[0].lab.each([pair[0]] * 20, lambda guest: guest.sh(commands.pop()))
    assert {int(answer.split()[0]) for answer in answers} == set(range(20))
    say(f"20 x `sleep .5` at once: {seconds(began)}")
    assert time.monotonic() - began < 9  # one after the other they take over 10


def test_command_ends_before_the_daemon_it_left(pair: list[Guest]) -> None:
    assert pair[0].run("(sleep 2; echo late; touch /run/late) & echo now", timeout=1) == (0, "now\n")
    pair[0].sh("while [ ! -e /run/late ]; do sleep .1; done")


def test_spawned_command_streams_and_takes_signals(pair: list[Guest]) -> None:
    seen: list[str] = []
    writer = pair[0].spawn(
        "trap 'echo bye; exit 5' TERM; echo hello; while :; do sleep .05; done", name="w", on_line=seen.append
    )
    assert writer.wait_for("hel") == "hello"
    assert writer.rc is None
    writer.signal(signal.SIGTERM)
    assert writer.wait(5) == 5
    assert (seen[0], seen[-1]) == ("hello\n", "bye\n")
    pair[0].spawn(["echo", "logged"], name="x").wait(5)
    assert (pair[0].lab.logs / "one.x.log").read_text() == "logged\n"


def test_files_are_written_and_read(pair: list[Guest]) -> None:
    pair[0].write("/etc/deep/er/file", "text\n", mode=0o600)
    assert pair[0].read("/etc/deep/er/file") == "text\n"
    assert pair[0].sh("stat -c %a /etc/deep/er/file") == "600"
    (pair[0].lab.share / "from-host").write_text("shared")
    assert pair[1].read("/host/from-host") == "shared"


def test_project_and_its_python_run_in_a_guest(pair: list[Guest]) -> None:
    code = "import grpc, sys; print(sys.prefix)"
    assert pair[0].sh([str(PROJECT / ".venv/bin/python"), "-c", code]) == str(PROJECT / ".venv")


def test_power_cut_leaves_no_process_and_keeps_the_disk(lab: Lab, say: Say) -> None:
    guest = lab.guest("snode", disks=[Disk("64M")])
    lab.boot_all()
    guest.sh("mkfs.ext4 -q /dev/ubda && mount /dev/ubda /mnt && echo kept > /mnt/synced && sync -f /mnt")
    guest.sh("echo lost > /mnt/unsynced; echo lost > /etc/file")
    loops = [guest.spawn("while :; do mkdir /run/loop; rmdir /run/loop; done", name=f"loop{n}") for n in range(5)]
    began = time.monotonic()
    killed = guest.kill9()
    say(f"power cut of {len(killed)} processes: {seconds(began)}")
    assert not [pid for pid in killed if scratch.session_of(pid) is not None]
    assert not guest.alive
    assert not Path("/run/loop").exists()
    with pytest.raises(GuestGone):
        loops[0].wait(1)
    with pytest.raises(GuestGone):
        guest.sh("true")
    began = time.monotonic()
    guest.boot()
    say(f"booted again in {seconds(began)}")
    assert guest.sh("mount /dev/ubda /mnt && ls /mnt").split() == ["lost+found", "synced"]
    assert guest.run(["ls", "/etc/file"])[0] == 2
    assert guest.read("/mnt/synced") == "kept\n"


def test_commands_in_flight_tell_of_a_power_cut(lab: Lab) -> None:
    guest = lab.guest("one")
    guest.boot()
    command = guest.spawn("sleep 100", name="sleep")
    guest.spawn("sleep .3; echo o > /proc/sysrq-trigger; poweroff -ff", name="crash")
    with pytest.raises(GuestGone):
        command.wait(20)


def reaches(one: Guest, two: Guest, tries: int = 5) -> bool:
    """Whether an answer comes; several tries, since a busy machine may hold up one frame for long."""
    return one.run(["ping", f"-c{tries}", "-i.3", "-W1", two.ip])[0] == 0


def test_network_is_cut_and_healed(pair: list[Guest]) -> None:
    one, two = pair
    assert reaches(one, two)
    two.cut()
    assert not reaches(one, two, 3)
    assert two.sh("echo still here") == "still here"
    two.heal()
    assert reaches(one, two)


def test_network_is_delayed_and_lossy(pair: list[Guest]) -> None:
    one, two = pair
    two.delay(200)
    assert round_trip_ms(one, two) > 190
    two.delay(loss_percent=100)
    assert not reaches(one, two, 3)
    two.delay()
    assert round_trip_ms(one, two) < 100


def round_trip_ms(one: Guest, two: Guest) -> float:
    out = one.sh(["ping", "-c3", "-i.2", two.ip])
    return float(out.rsplit("= ", 1)[1].split("/")[0])


LISTENER = """
import socket
server = socket.create_server(("", 7000)); print("ready", flush=True)
while True:
    client = server.accept()[0]
    while data := client.recv(100): client.send(data)
"""
GREETER = """
import socket
server = socket.create_server(("", 7001)); print("ready", flush=True)
while True: server.accept()[0].send(b"hi")
"""
TALKER = """
import socket, sys, time
client = socket.create_connection((sys.argv[1], 7000)); print("ready", flush=True)
try:
    while True: client.send(b"x"); assert client.recv(100); time.sleep(.02)
except ConnectionResetError: print("reset", flush=True)
"""


def test_connection_is_reset_and_a_new_one_works(pair: list[Guest], say: Say) -> None:
    one, two = pair
    server = two.spawn(["python3", "-c", LISTENER], name="listener")
    server.wait_for("ready")
    talker = one.spawn(["python3", "-c", TALKER, two.ip], name="talker")
    talker.wait_for("ready")
    began = time.monotonic()
    assert one.reset(7000) == 1
    say(f"connection reset after {seconds(began)}")
    talker.wait_for("reset", 5)
    server.signal(signal.SIGKILL)


def test_paused_guest_comes_back(pair: list[Guest]) -> None:
    pair[1].pause()
    assert not reaches(pair[0], pair[1], 3)
    pair[1].resume()
    assert pair[1].sh("echo back") == "back"


def test_host_program_and_socket_reach_a_guest(pair: list[Guest]) -> None:
    server = pair[0].spawn(["python3", "-c", GREETER], name="server")
    server.wait_for("ready")
    lab = pair[0].lab
    with lab.connect(pair[0].ip, 7001) as direct:
        assert direct.recv(10) == b"hi"
    with socket.socket(socket.AF_UNIX) as relayed:
        relayed.connect(str(lab.forward(pair[0].ip, 7001)))
        assert relayed.recv(10) == b"hi"
    assert lab.popen(["ping", "-c5", "-i.3", "-W1", pair[0].ip], stdout=subprocess.DEVNULL).wait(10) == 0
    assert Path("/proc/thread-self/ns/net").readlink() == _OUTSIDE, "this process stays outside"
    server.signal(signal.SIGKILL)


def test_second_boot_of_a_running_guest_is_refused(pair: list[Guest]) -> None:
    with pytest.raises(LabError, match="runs already"):
        pair[0].boot()


def test_boot_that_fails_says_why(lab: Lab) -> None:
    guest = lab.guest("tiny", memory="24M")
    with pytest.raises(LabError, match="tiny did not boot"):
        guest.boot(15)
    assert not scratch.processes(lab.folder)
