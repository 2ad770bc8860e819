"""Time budgets end waits, and the stop flag does too."""

import threading
import time

import pytest

from csi.deadline import Deadline, wait_until
from csi.errors import Timeout, Unavailable


def test_check_raises_timeout_when_time_is_up() -> None:
    with pytest.raises(Timeout, match="format the device"):
        Deadline.after(0).check("format the device")


def test_check_raises_unavailable_when_the_service_stops() -> None:
    stop = threading.Event()
    deadline = Deadline.after(60, stop=stop)
    deadline.check("go on")
    stop.set()
    with pytest.raises(Unavailable, match="stopping"):
        deadline.check("go on")


def test_within_takes_the_earlier_end_and_keeps_the_stop_flag() -> None:
    stop = threading.Event()
    deadline = Deadline.after(60, stop=stop).within(1)
    assert deadline.remaining() <= 1
    assert Deadline.after(1).within(60).remaining() <= 1
    stop.set()
    assert deadline.stopping


def test_wait_until_returns_what_the_look_finds() -> None:
    found = iter([None, "", "sdb"])
    assert wait_until(lambda: next(found), Deadline.after(5), what="a device") == "sdb"


def test_wait_until_ends_at_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(Timeout, match="a device"):
        wait_until(lambda: None, Deadline.after(0.1), what="a device")
    assert 0.1 <= time.monotonic() - began < 2


def test_sleep_ends_when_the_service_stops() -> None:
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    began = time.monotonic()
    Deadline.after(30, stop=stop).sleep(30)
    assert time.monotonic() - began < 5
