"""The real driver as a process of its own, for tests and benchmarks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import grpc

from csi.deadline import Deadline, wait_until
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc as rpc

PROJECT = Path(__file__).resolve().parent.parent


class Driver:
    """`snode ROLE --config FILE`, with its socket and state in one folder. A context manager."""

    def __init__(
        self, folder: Path, config: str, *, role: str = "all", environment: Mapping[str, str] | None = None
    ) -> None:
        """config: TOML without state_dir and endpoint, which are set to lie in `folder`."""
        self.folder = folder
        self.socket = folder / "run" / "csi.sock"
        self.endpoint = f"unix://{self.socket}"
        self._role = role
        self._config = folder / "snode.toml"
        self._config.write_text(f'state_dir = "{folder}/state"\nlog_level = "debug"\n{config}')
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> "Driver":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *, environment: Mapping[str, str] | None = None) -> float:
        """Start and wait until Probe says ready; returns the seconds that took."""
        began = time.monotonic()
        with (self.folder / "driver.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "csi", self._role, "--config", str(self._config)],
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_environment(), **self._environment, **(environment or {}), "CSI_ENDPOINT": self.endpoint},
            )
        options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 100)]
        self._channel = grpc.insecure_channel(self.endpoint, options=options)
        self.identity = rpc.IdentityStub(self._channel)
        self.controller = rpc.ControllerStub(self._channel)
        self.node = rpc.NodeStub(self._channel)
        wait_until(self._ready, Deadline.after(30), what="the driver to be ready", most=0.02)
        return time.monotonic() - began

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the driver ended with {self._process.returncode}:\n{self.log()[-3000:]}")
        try:
            return bool(self.identity.Probe(pb.ProbeRequest(), timeout=2).ready.value)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            raise

    def stop(self) -> int:
        """End it as a service manager does; returns its exit code."""
        return self._end(signal.SIGTERM)

    def kill9(self) -> None:
        """End it as a power cut does."""
        self._end(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it ended by itself."""
        assert self._process is not None
        code = self._process.wait(60)
        self._forget()
        return code

    @property
    def pid(self) -> int:
        """The process id while it runs."""
        assert self._process is not None
        return self._process.pid

    def resident_mib(self) -> float:
        """Its resident memory in MiB."""
        (line,) = [line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if "VmRSS:" in line]
        return int(line.split()[1]) / 1024

    def cpu_seconds(self) -> float:
        """What it and the commands that it ran took of the processor so far: unlike wall time, others' load counts
        for little in it."""
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")

    def log(self) -> str:
        """All that it ever logged."""
        return (self.folder / "driver.log").read_text(errors="replace")

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(60)
        self._forget()
        return code

    def _forget(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._process = self._channel = None


def _environment() -> dict[str, str]:
    """Ours, without what other tests are set by, and with the switch that lets a test kill the driver at a step."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SNODE_")} | {"SNODE_TEST": "1"}
