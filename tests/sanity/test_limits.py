"""What the driver may cost: time to start, memory and processes when idle."""

import time
from pathlib import Path

import pytest

from tests.driver import Driver
from tests.leftovers import all_below
from tests.sanity.test_kill import CONFIG, Life

START_CPU_SECONDS = 0.5
IDLE_MIB = 60
#: A good look at what the service needs is repeated after 10 s: long enough to see one.
IDLE_SECONDS = 13


def test_the_start_takes_little_of_the_processor(tmp_path: Path) -> None:
    driver = Driver(tmp_path, CONFIG.format(folder=tmp_path))
    seconds = []
    for _ in range(3):
        driver.start()
        seconds.append(driver.cpu_seconds())
        driver.stop()
    print(f"CPU seconds from start to Probe: {seconds}")
    assert min(seconds) < START_CPU_SECONDS


@pytest.mark.timeout(180)
def test_an_idle_service_is_small_and_starts_no_process(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    with Driver(tmp_path, CONFIG.format(folder=tmp_path)) as driver:
        for request in Life(driver, tmp_path).requests():
            request()
        commands = _commands(driver)
        assert commands > 5  # the log shows them
        time.sleep(IDLE_SECONDS)
        print(f"idle after a volume's life: {driver.resident_mib():.1f} MiB")
        assert driver.resident_mib() < IDLE_MIB
        assert _commands(driver) == commands, driver.log()[-2000:]
    assert all_below(tmp_path) == []


def _commands(driver: Driver) -> int:
    return sum("argv=" in line for line in driver.log().splitlines())
