"""The command `snode failover`, as it starts and ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_PORTALS = '[controller]\nportals = ["192.0.2.1:3260"]\n'
_KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
users: [{name: u, user: {token: t}}]
"""


def start(tmp_path: Path, settings: str) -> "subprocess.Popen[str]":
    file = tmp_path / "snode.toml"
    file.write_text(f'state_dir = "{tmp_path}/state"\n{settings}')
    argv = [sys.executable, "-m", "csi", "failover", "--config", str(file)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", "controller.portals: empty, so no sessions can be seen"),
        (_PORTALS, "no way to the Kubernetes API"),
        (_PORTALS + '[failover]\nkubeconfig = "/nowhere"', "set failover.kubeconfig"),
        (_PORTALS + '[failover]\nmode = "observ"', "did you mean observe?"),
    ],
)
def test_it_says_what_it_needs(settings: str, words: str, tmp_path: Path) -> None:
    out, _ = start(tmp_path, settings).communicate(timeout=60)
    assert words in out


def test_it_waits_for_the_api_and_ends_cleanly(tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text(_KUBECONFIG)
    settings = f'{_PORTALS}[failover]\nkubeconfig = "{tmp_path}/kubeconfig"\n'
    with start(tmp_path, settings) as process:
        assert process.stdout
        said = ""
        while "no decision can be made now" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        other, _ = start(tmp_path, settings).communicate(timeout=60)
        assert "another failover works in this state folder" in other
        time.sleep(3)  # a second round, of which the same is not said again
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(20) == 0
    assert "stopping" in rest and "no decision" not in rest
