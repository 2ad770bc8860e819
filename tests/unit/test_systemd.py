"""The units of deploy/systemd: systemd takes them, and they say what keeps volumes in service."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from csi.cli import snode

PROJECT = Path(__file__).parents[2]
UNITS = PROJECT / "deploy" / "systemd"
_PROGRAM = "/opt/snode/bin/snode"
DRIVERS = ("snode-controller.service", "snode-node.service", "snode-docker.service")
#: A service with one of these has mounts of its own, which nobody else sees, or does not see folders of the pools.
_OWN_MOUNTS = ("Private", "Protect", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "BindPaths", "RootDir")
#: With one of these it has no devices but those that are named.
_NO_DEVICES = ("DeviceAllow", "DevicePolicy", "ProtectClock", "PrivateDevices")


def _settings(name: str) -> list[tuple[str, str]]:
    lines = (UNITS / name).read_text().splitlines()
    return [(key, value) for key, equal, value in (line.partition("=") for line in lines if line[:1] != "#") if equal]


def test_systemd_takes_them(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    assert analyze, "systemd-analyze is missing: apt-get install systemd"
    for unit in UNITS.iterdir():
        # The program where it is now, since systemd wants it to exist.
        text = unit.read_text().replace(_PROGRAM, str(Path(sys.executable).with_name("snode")))
        (tmp_path / unit.name).write_text(text)
    made = sorted(tmp_path.iterdir())
    done = subprocess.run([analyze, "verify", "--man=no", *map(str, made)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "snode" in line]
    assert (done.returncode, ours) == (0, []), done.stderr
    (tmp_path / "bad.service").write_text("[Service]\nExecStart=/bin/true\nTaskMax=infinity\n")
    done = subprocess.run(
        [analyze, "verify", str(tmp_path / "bad.service")], capture_output=True, text=True, check=False
    )
    assert "'TaskMax'" in done.stderr, "it does not see what is wrong"


@pytest.mark.parametrize("name", DRIVERS)
def test_a_driver_is_kept_up_and_has_what_it_needs(name: str) -> None:
    settings = dict(_settings(name))
    assert settings["Restart"] == "always" and settings["StartLimitIntervalSec"] == "0"
    assert settings["OOMScoreAdjust"] == "-900"
    # Requests under way get 25 s, and those that are stuck two more.
    assert int(settings["TimeoutStopSec"]) > 27
    # The socket's folder outlives the other services that use it.
    assert (settings["RuntimeDirectory"], settings["RuntimeDirectoryPreserve"]) == ("snode", "yes")
    assert settings["StateDirectoryMode"] == "0700"
    assert [key for key in settings if key.startswith(_NO_DEVICES)] == []
    assert [key for key in settings if key.startswith(_OWN_MOUNTS)] == []
    program, *words = shlex.split(settings["ExecStart"])
    assert program == _PROGRAM
    done = CliRunner().invoke(snode, [*words, "--help"])
    assert done.exit_code == 0, done.output


def test_tgtd_is_never_the_one_that_is_killed_or_cut_short() -> None:
    settings = dict(_settings("snode-tgtd.service"))
    assert settings["OOMScoreAdjust"] == "-1000"
    assert settings["TasksMax"] == "infinity" and int(settings["LimitNOFILE"]) >= 1 << 20
    assert settings["Restart"] == "always" and settings["StartLimitIntervalSec"] == "0"
    # A share of memory counts as far as the slice above has one.
    assert settings["Slice"] == "snode.slice"
    assert dict(_settings("snode.slice"))["MemoryMin"] == settings["MemoryMin"]


def test_nothing_but_the_controller_gives_tgtd_its_targets() -> None:
    keys = [key for key, _ in _settings("snode-tgtd.service")]
    assert [key for key in keys if key.startswith("Exec")] == ["ExecStart"]
    assert ("Conflicts", "tgt.service") in _settings("snode-tgtd.service")
