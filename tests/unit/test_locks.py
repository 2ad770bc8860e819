"""Locks against threads and against other processes."""

import os
import threading
from pathlib import Path

import pytest

from csi.deadline import Deadline
from csi.errors import Busy, Timeout, Unavailable
from csi.locks import ResourceLock, Slots, VolumeLocks


def test_second_holder_of_a_volume_is_refused_at_once(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path / "locks")
    with locks.hold("v-a"):
        with pytest.raises(Busy, match="v-a"), locks.hold("v-a"):
            pass
        with locks.hold("v-b"):
            pass
    with locks.hold("v-a"):
        pass


def test_a_request_waits_for_a_look_of_the_background(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path / "locks")
    looking, done = threading.Event(), threading.Event()

    def look() -> None:
        with locks.hold("v-a", background=True):
            looking.set()
            done.wait(5)

    thread = threading.Thread(target=look)
    thread.start()
    looking.wait(5)
    threading.Timer(0.05, done.set).start()
    with locks.hold("v-a"), pytest.raises(Busy), locks.hold("v-a", background=True):
        pass
    thread.join()


def test_another_process_is_kept_out_until_the_holder_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "locks"
    ready_read, ready_write = os.pipe()
    end_read, end_write = os.pipe()
    child = os.fork()
    if child == 0:
        with VolumeLocks(path).hold("v-a"):
            os.write(ready_write, b"1")
            os.close(end_write)
            os.read(end_read, 1)
            os._exit(0)
    os.read(ready_read, 1)
    locks = VolumeLocks(path)
    with pytest.raises(Busy, match="another process"), locks.hold("v-a"):
        pass
    with locks.hold("v-b"):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    with locks.hold("v-a"):
        pass
    assert path.stat().st_size == 0


def test_a_release_is_seen_while_a_forked_child_has_a_copy_of_the_descriptor(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path / "locks")
    end_read, end_write = os.pipe()
    with locks.hold("v-a"):
        child = os.fork()
        if child == 0:  # what another thread's child is between fork and exec
            os.close(end_write)
            os.read(end_read, 1)
            os._exit(0)
    with locks.hold("v-a"):
        pass
    os.close(end_write)
    os.waitpid(child, 0)


def test_a_state_folder_that_takes_no_lock_is_unavailable(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "locks", tmp_path):  # what a lost and a read-only filesystem look like
        with pytest.raises(Unavailable, match="can't be opened"), VolumeLocks(path).hold("v-a"):
            pass


def test_resource_lock_waits_no_longer_than_the_deadline() -> None:
    lock = ResourceLock("pool fast")
    with lock.hold(Deadline.after(1)), pytest.raises(Timeout, match="pool fast"), lock.hold(Deadline.after(0.05)):
        pass


def test_resource_lock_is_handed_over() -> None:
    lock = ResourceLock("pool fast")
    order: list[int] = []

    def work(number: int) -> None:
        with lock.hold(Deadline.after(5)):
            order.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == list(range(8))


def test_slots_refuse_when_all_are_taken() -> None:
    slots = Slots(1)
    with slots.take(), pytest.raises(Unavailable), slots.take():
        pass
    with slots.take():
        pass
