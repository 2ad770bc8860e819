"""What the lab's relays take of each RPC: an empty one from the host, less one from inside of the guest."""

import time
from statistics import median

import grpc

from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc as rpc
from tests.lab.cluster import Machine
from tests.lab.kernel import PROJECT

_CALLS = 30


class Relays:
    """Measures once for each machine."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}

    def seconds(self, machine: Machine) -> float:
        """The relays' share of one RPC."""
        through, inside = self._measured(machine)
        return max(0.0, through - inside)

    def text(self, machine: Machine) -> str:
        """The same in ms."""
        return f"{self.seconds(machine) * 1000:.1f}"

    def sentence(self, machine: Machine) -> str:
        """What was measured."""
        through, inside = self._measured(machine)
        return f"an empty RPC takes {through * 1000:.1f} ms through them and {inside * 1000:.1f} ms within the guest"

    def _measured(self, machine: Machine) -> tuple[float, float]:
        name = machine.guest.name
        if name not in self._known:
            through = empty_call(machine.stubs["identity"])
            argv = ["env", "-C", str(PROJECT), str(PROJECT / ".venv/bin/python"), "-m", "tests.bench.relays"]
            assert machine.driver
            self._known[name] = through, float(machine.guest.sh([*argv, machine.driver.socket]))
        return self._known[name]


def empty_call(identity: rpc.IdentityStub) -> float:
    """Median seconds of a Probe."""
    found = []
    for _ in range(_CALLS):
        began = time.monotonic()
        identity.Probe(pb.ProbeRequest(), timeout=30)
        found.append(time.monotonic() - began)
    return median(found)


if __name__ == "__main__":
    import sys

    print(empty_call(rpc.IdentityStub(grpc.insecure_channel(f"unix://{sys.argv[1]}"))))
