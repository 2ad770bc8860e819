"""`make lab`: the three commands that it proposes, and what it says of a wrong one."""

import subprocess
import sys

import pytest

from .kernel import PROJECT
from .shell import _TRY

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


#: What leads astray: an unknown word, an open quotation, a node that was lost and is back, one that can't stage.
_WRONG = (
    "sing", "help zzz", 'write "a cnode2', "boot cnode1",
    "write old cnode1", "kill cnode1", "boot cnode1", "delete old",
    "cnode1 rm -rf /var/lib/kubelet/staging; touch /var/lib/kubelet/staging",
    "write bad cnode1", "cnode1 rm /var/lib/kubelet/staging", "delete bad",
)  # fmt: skip


def _lab(*lines: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "tests.lab"]
    done = subprocess.run(
        argv, cwd=PROJECT, input="\n".join(lines), text=True, capture_output=True, timeout=280, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_proposed_commands_and_wrong_ones() -> None:
    proposed = [line[2:].split("  ")[0].strip() for line in _TRY.splitlines() if line.startswith("  ")]
    assert len(proposed) == 3
    code, out = _lab(*proposed, "lose data cnode1", "write more", "sing", "help", "delete data", "volumes")
    assert "acknowledged records are there" in out
    assert "snode.name=" in out  # the tags that lvs was asked for
    assert "error: cnode1 has no power: `boot cnode1`" in out
    assert "error: name a volume and a CNODE, such as `data cnode1`" in out
    assert "error: no command 'sing'; `help` lists them" in out
    assert "heal MACHINE: give it its network back." in out
    assert "data" not in out.split("lab> volumes")[1]  # deleted
    assert out.endswith("all of it is gone\n")
    assert code == 1, "a wrong command in a program's input shows in the exit code"


@pytest.mark.soak
def test_what_leads_astray() -> None:
    code, out = _lab(*_WRONG)
    assert "error: no command 'zzz'; `help` lists them" in out
    assert "No closing quotation" in out
    # The volume whose stage failed, and the one whose node lost its power and came back, can be deleted.
    assert "is not a folder" in out.split("lab> write bad cnode1")[1].split("lab> ")[0]
    for name in ("bad", "old"):
        assert "DeleteVolume" in out.split(f"lab> delete {name}")[1].split("lab> ")[0], out
    assert out.endswith("all of it is gone\n") and code == 1
