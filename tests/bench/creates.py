"""CreateVolume beside bare lvcreate: alone, a hundred at once, and with a thousand volumes there.

.venv/bin/python -m tests.bench.creates [REPETITIONS [AT_ONCE]]
"""

import shlex
import sys
import time
from statistics import median

from csi.backends import lvm_tags
from csi.model import volume_id_of
from csi.pb import csi_pb2 as pb
from tests.bench.hand import lvcreate, timed
from tests.bench.page import Section, Table, Target, milliseconds
from tests.bench.relays import Relays
from tests.lab import Guest, Lab
from tests.lab.cluster import MIB, Cluster, capability

SIZE_BYTES = 16 * MIB
MANY = 1000

TEXT = """
A volume of 16 MiB in a thick pool. *Bare* is the very command that the driver runs, flags and tags included, started
by a shell: it zeroes the volume's start and wipes old signatures as well. The driver's time is the RPC's, without the
{relays} ms that the lab's relays take of each. At once: {at_once} RPCs of as many clients, all under way together,
beside a shell's loop of {at_once} bare commands; a repetition of each in turns, {rounds} in all. With {many} there: the
group has {many} volumes of the driver (their metadata restored with vgcfgrestore, not active, as after a boot).
"""
WHERE = """{rpc:.0f} ms are {command:.0f} ms for the same lvcreate and {rest:.0f} ms for all else: the record of the \
creation on disk before and gone after it (three syncs), a process started from Python, a look at the new device, gRPC \
and the log. All of it runs on the guest's one CPU, where udev works on the new device at the same time."""
WHERE_AT_ONCE = """on the guest's one CPU nothing can go on beside the lvcreate of another volume, so each volume \
costs what it costs alone: {rest:.0f} ms more than the bare command's {command:.0f} ms."""


class Creates:
    """Both ways on one SNODE; names are never used twice."""

    def __init__(self, cluster: Cluster, relays: Relays) -> None:
        self._cluster, self._relays = cluster, relays
        self._snode = cluster.snode.guest
        self._serial = 0

    def driver(self, count: int) -> float:
        """Seconds of so many CreateVolume at once, without the lab's relays."""
        requests = [
            pb.CreateVolumeRequest(
                name=f"driver{self._next()}",
                capacity_range=pb.CapacityRange(required_bytes=SIZE_BYTES),
                volume_capabilities=[capability()],
            )
            for _ in range(count)
        ]
        create = self._cluster.snode.stubs["controller"].CreateVolume
        began = time.monotonic()
        calls = [create.future(request, timeout=300) for request in requests]
        for call in calls:
            call.result()
        return time.monotonic() - began - self._relays.seconds(self._cluster.snode)

    def bare(self, count: int) -> float:
        """Seconds of a loop of so many lvcreate."""
        argv = lvcreate(self._snode, "NAME", SIZE_BYTES)
        line = shlex.join(argv).replace("NAME", "$lv")
        names = " ".join(f"bare{self._next()}" for _ in range(count))
        self._snode.write("/tmp/loop.sh", f"for lv in {names}; do {line} || return; done\n")
        return timed(self._snode, [("all", "source /tmp/loop.sh")])["all"]

    def clear(self) -> None:
        """Remove all that was made here; the driver's as if an administrator had done it."""
        self._snode.sh("lvs --noheadings -o vg_name,lv_name --separator / vg0 | xargs -r lvremove -qq -y --", 300)

    def alone(self, repetitions: int) -> tuple[list[float], list[float]]:
        """Seconds of one at a time, in turns."""
        pairs = [(self.driver(1), self.bare(1)) for _ in range(repetitions)]
        return [driver for driver, _ in pairs], [bare for _, bare in pairs]

    def _next(self) -> int:
        self._serial += 1
        return self._serial


def fill(snode: Guest, count: int) -> None:
    """Add volumes of the driver to the group `vg0`, an extent each, by restoring metadata that has them."""
    text = snode.sh("vgcfgbackup -q -f /tmp/vg0 vg0 >/dev/null && cat /tmp/vg0")
    free = int(snode.sh("pvs --noheadings -o pv_pe_alloc_count"))
    volumes = "".join(_lv(f"filler {number}", free + number) for number in range(count))
    if "logical_volumes {" not in text:
        head, brace, tail = text.rpartition("}\n# Generated") if "}\n# Generated" in text else text.rpartition("}")
        text = f"{head}\n\tlogical_volumes {{\n\t}}\n{brace}{tail}"
    head, marker, tail = text.partition("logical_volumes {\n")
    snode.write("/tmp/filled", head + marker + volumes + tail)
    snode.sh("vgcfgrestore -q -f /tmp/filled vg0")
    assert int(snode.sh("vgs --noheadings -o lv_count vg0")) >= count


def _lv(name: str, extent: int) -> str:
    volume_id = volume_id_of(name)
    uuid = f"{extent:032}"
    dashed = "-".join([uuid[:6], *(uuid[at : at + 4] for at in range(6, 26, 4)), uuid[26:]])
    tags = ", ".join(
        f'"{tag}"' for tag in lvm_tags.encode(pool="thick", name=name, parameters={}, nonce=f"{extent:016x}")
    )
    return f"""
		{volume_id} {{
			id = "{dashed}"
			status = ["READ", "WRITE", "VISIBLE"]
			flags = ["ACTIVATION_SKIP"]
			tags = [{tags}]
			creation_time = 1700000000
			creation_host = "snode"
			segment_count = 1
			segment1 {{
				start_extent = 0
				extent_count = 1
				type = "striped"
				stripe_count = 1
				stripes = ["pv0", {extent}]
			}}
		}}
"""


def section(cluster: Cluster, relays: Relays, repetitions: int, at_once: int) -> Section:
    """Run all three."""
    creates, rounds = Creates(cluster, relays), 2
    creates.alone(2)  # the first of each loads what the others find loaded
    driver, bare = creates.alone(repetitions)
    rates = [(creates.driver(at_once), creates.bare(at_once)) for _ in range(rounds)]
    creates.clear()
    fill(cluster.snode.guest, MANY)
    creates.driver(1)
    many_driver, many_bare = creates.alone(repetitions)
    all_driver, all_bare = median(pair[0] for pair in rates), median(pair[1] for pair in rates)
    rest = (median(driver) - median(bare)) * 1000
    where = {"rpc": median(driver) * 1000, "command": median(bare) * 1000, "rest": rest}
    many_where = {
        "rpc": median(many_driver) * 1000,
        "command": median(many_bare) * 1000,
        "rest": (median(many_driver) - median(many_bare)) * 1000,
    }
    rows = [
        ("alone, ms", milliseconds(driver), milliseconds(bare), f"{median(driver) / median(bare):.2f}"),
        (f"{at_once} at once, s", f"{all_driver:.1f}", f"{all_bare:.1f}", f"{all_driver / all_bare:.2f}"),
        (
            f"alone with {MANY} there, ms",
            milliseconds(many_driver),
            milliseconds(many_bare),
            f"{median(many_driver) / median(many_bare):.2f}",
        ),
    ]
    targets = [
        Target(
            "CreateVolume alone, beside bare lvcreate", median(driver) / median(bare), 1.1, where=WHERE.format(**where)
        ),
        Target(
            f"rate of {at_once} CreateVolume at once, beside a loop of bare lvcreate",
            all_bare / all_driver,
            0.95,
            at_least=True,
            where=WHERE_AT_ONCE.format(
                command=all_bare / at_once * 1000, rest=(all_driver - all_bare) / at_once * 1000
            ),
        ),
        Target(
            f"CreateVolume with {MANY} volumes there, beside bare lvcreate",
            median(many_driver) / median(many_bare),
            1.15,
            where=WHERE.format(**many_where),
        ),
    ]
    text = TEXT.format(relays=relays.text(cluster.snode), at_once=at_once, rounds=rounds, many=MANY)
    return Section(
        "CreateVolume beside lvcreate",
        f".venv/bin/python -m tests.bench.creates {repetitions} {at_once}",
        text,
        [Table(("", "driver", "bare", "driver / bare"), rows)],
        targets,
    )


def new_cluster(lab: Lab) -> Cluster:
    """A SNODE with room for all of it."""
    return Cluster(lab, cnodes=0, pool_size="12G", log_level="info")


def main(repetitions: int = 15, at_once: int = 100) -> None:
    """Print it."""
    with Lab() as lab:
        cluster = new_cluster(lab)
        found = section(cluster, Relays(), repetitions, at_once)
        print(found, *(target.row() for target in found.targets), sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
