"""Volumes in a real Kubernetes: every way to ask for one, to use it, to grow it, and to be told what is wrong."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.utils import parse_quantity

from tests.lab import kubernetes_objects as objects
from tests.lab.conftest import Say, seconds
from tests.lab.kubernetes import NAMESPACE, Kubernetes
from tests.lab.kubernetes_control import until
from tests.lab.kubernetes_look import leftovers
from tests.lab.kubernetes_objects import claim, claim_spec, pod, storage_class
from tests.lab.oracle import Oracle

from . import readme

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test but those that share objects: all is deleted, and of no volume anything is left anywhere."""
    yield
    if "ways" not in request.fixturenames:
        empty(request.getfixturevalue("kubernetes"))


def empty(kubernetes: Kubernetes) -> None:
    kubernetes.clear()
    until("nothing is left", lambda: not leftovers(kubernetes), 60)


def test_a_claim_becomes_a_volume_that_a_pod_writes(kubernetes: Kubernetes, say: Say) -> None:
    began = time.monotonic()
    kubernetes.create(claim("now", claim_spec("at-once")), claim("later"))
    kubernetes.volume_of("now")
    say(f"claim bound after {seconds(began)}")
    assert kubernetes.core.read_namespaced_persistent_volume_claim("later", "default").status.phase == "Pending"
    for name in ("now", "later"):
        kubernetes.create(pod(name, f"echo hello > {objects.DATA}/file; sync; cat {objects.DATA}/file", volume=name))
    for name in ("now", "later"):
        kubernetes.wait_pod(name)
        kubernetes.wait_log(name, "hello")
    say(f"two pods have written after {seconds(began)}")
    began = time.monotonic()
    empty(kubernetes)
    say(f"both gone after {seconds(began)}")


# -- every way to use a volume, side by side -------------------------------------------------------------------------

_TOUCH = f"echo x > {objects.DATA}/file; sync"
_SHOW = "busybox grep ' /data ' /proc/mounts"


@pytest.fixture(scope="module")
def ways(kubernetes: Kubernetes) -> Iterator[Kubernetes]:
    """A pod for each way, all started at once."""
    classes = {"options": "options", "xfs": "xfs", "thin": "snode-thin", "raid1": "snode-raid1", "files": "snode-files"}
    for name, storage in classes.items():
        size = "320Mi" if name == "xfs" else "48Mi"
        kubernetes.create(claim(name, claim_spec(storage, size=size)), pod(name, f"{_TOUCH}; {_SHOW}", volume=name))
    device = objects.DEVICE
    raw = f"busybox stat -c %F {device}; dd if=/dev/zero of={device} bs=1M count=4 conv=fsync; echo written"
    who = {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000}
    own = {"ephemeral": {"volumeClaimTemplate": {"spec": claim_spec()}}}
    kubernetes.create(
        claim("block", claim_spec(block=True)),
        pod("block", raw, volume="block", block=True),
        claim("group"),
        pod("group", f"{_TOUCH}; busybox stat -c 'group %g' {objects.DATA}/file", volume="group", security=who),
        claim("part"),
        pod("part", _TOUCH, volume="part", sub_path="a/b"),
        pod("own", _TOUCH, volume=own),
        claim("alone", claim_spec(mode="ReadWriteOncePod")),
        pod("alone", _TOUCH, volume="alone"),
    )
    yield kubernetes
    empty(kubernetes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("thin", " ext4 "),
        ("raid1", " ext4 "),
        ("files", " ext4 "),
        ("xfs", " xfs "),
        ("options", "noatime"),
        ("block", "block special file\nwritten"),
        ("group", "group 2000"),
    ],
)
def test_a_pod_sees_what_was_asked_for(ways: Kubernetes, name: str, words: str) -> None:
    ways.wait_pod(name)
    log = ways.wait_log(name, words.splitlines()[-1])
    assert words.splitlines()[0] in log


def test_the_volumes_of_classes_are_in_their_pools(ways: Kubernetes) -> None:
    wanted = {"thin": ("thin", "thin"), "raid1": ("raid1", ""), "xfs": ("linear", "")}
    ids = {name: ways.volume_of(name).spec.csi.volume_handle for name in wanted}
    columns = "lvs --noheadings --separator=: -o lv_name,segtype,pool_lv"
    lines = [line.strip().split(":") for line in ways.snode.sh(columns).splitlines()]
    found = {name: (kind, pool) for name, kind, pool in lines}
    assert {name: found[volume_id] for name, volume_id in ids.items()} == wanted
    in_files = ways.volume_of("files").spec.csi.volume_handle
    assert in_files not in found
    assert in_files in ways.snode.sh("ls /var/lib/snode/volumes")


def test_a_part_of_a_volume(ways: Kubernetes) -> None:
    made = ways.wait_pod("part")
    assert ways.node(made.spec.node_name).sh(f"cat {volume_path(ways, made, 'part')}/a/b/file") == "x"


def test_a_volume_that_lives_with_its_pod(ways: Kubernetes) -> None:
    ways.wait_pod("own")
    ways.volume_of("own-volume")
    ways.delete("pod", "own")
    until("its claim is gone", lambda: "own-volume" not in ways.names(ways.claims()), 30)


def test_a_second_pod_is_kept_from_a_volume_for_one(ways: Kubernetes) -> None:
    ways.wait_pod("alone")
    ways.create(pod("second", _TOUCH, volume="alone"))
    ways.wait_event("second", "ReadWriteOncePod")
    ways.delete("pod", "alone")
    ways.wait_pod("second")


def test_a_second_node_is_kept_from_a_volume_for_one(ways: Kubernetes) -> None:
    first = ways.wait_pod("group").spec.node_name
    other = next(cnode.name for cnode in ways.cnodes if cnode.name != first)
    ways.create(pod("elsewhere", _TOUCH, volume="group", node=other))
    ways.wait_event("elsewhere", "already used by pod(s) group")
    ways.delete("pod", "group")
    ways.wait_pod("elsewhere")


def volume_path(kubernetes: Kubernetes, made: Any, claim: str) -> str:
    """Where a pod's volume is mounted on its node."""
    name = kubernetes.volume_of(claim).metadata.name
    return f"/var/lib/kubelet/pods/{made.metadata.uid}/volumes/kubernetes.io~csi/{name}/mount"


# -- kept, shared, grown, many ---------------------------------------------------------------------------------------


def test_a_kept_volume_is_read_by_many_nodes_and_then_deleted(kubernetes: Kubernetes) -> None:
    kubernetes.create(claim("first", claim_spec("kept")), pod("first", _TOUCH, volume="first"))
    kubernetes.wait_pod("first")
    volume = kubernetes.volume_of("first")
    kubernetes.delete("pod", "first")
    kubernetes.delete("pvc", "first")
    name, volume_id = volume.metadata.name, volume.spec.csi.volume_handle
    until("it is released", lambda: kubernetes.core.read_persistent_volume(name).status.phase == "Released", 30)
    kubernetes.delete("pv", name)
    assert volume_id in kubernetes.snode.sh("lvs --noheadings -o lv_name vg0"), "Retain keeps the volume"

    mode = "ReadOnlyMany"
    kubernetes.create(
        objects.static_volume("again", claim="again", volume_id=volume_id, size="48Mi", mode=mode, readonly=True),
        claim("again", claim_spec("", mode=mode)),
    )
    script = f"cat {objects.DATA}/file; if touch {objects.DATA}/other; then echo WRITTEN; fi; {_SHOW}"
    readers = [f"reader-{cnode.name}" for cnode in kubernetes.cnodes]
    for reader, cnode in zip(readers, kubernetes.cnodes, strict=True):
        kubernetes.create(pod(reader, script, volume="again", node=cnode.name, readonly=True))
    for reader in readers:
        made = kubernetes.wait_pod(reader)
        log = kubernetes.wait_log(reader, " /data ")
        assert " ro," in log
        assert "WRITTEN" not in log
        # And not by the grace of the container's mount alone.
        device = f"findmnt -no SOURCE {volume_path(kubernetes, made, 'again')}"
        assert kubernetes.node(made.spec.node_name).sh(f"cat /sys/block/$(basename $({device}))/ro") == "1"
    kubernetes.delete("pod", *readers)
    kubernetes.delete("pvc", "again")
    until(
        "Delete deletes the volume",
        lambda: "again" not in kubernetes.names(kubernetes.core.list_persistent_volume()),
        60,
    )


def test_a_volume_grows_under_its_writer(kubernetes: Kubernetes, say: Say) -> None:
    kubernetes.create(claim("grows"), objects.writer("grows", volume="grows"))
    made = kubernetes.wait_pod("grows")
    oracle = Oracle("grows")
    kubernetes.follow(made, oracle)
    oracle.wait_for(20, 180)
    began = time.monotonic()
    size = {"spec": {"resources": {"requests": {"storage": "160Mi"}}}}
    kubernetes.core.patch_namespaced_persistent_volume_claim("grows", "default", size)

    def grown() -> bool:
        claim = kubernetes.core.read_namespaced_persistent_volume_claim("grows", "default")
        return str(claim.status.capacity["storage"]) == "160Mi"

    until("the claim has grown", grown, 90)
    say(f"grown under its writer after {seconds(began)}")
    oracle.wait_for_more(20, 180)
    path, guest = volume_path(kubernetes, made, "grows"), kubernetes.node(made.spec.node_name)
    assert int(guest.sh(f"df -B1 --output=size {path} | tail -1")) > 140 * MIB
    assert oracle.errors == []
    oracle.judge(guest, f"{path}/records")


def test_thirty_claims_at_once(kubernetes: Kubernetes, say: Say) -> None:
    names = [f"many-{number}" for number in range(30)]
    began = time.monotonic()
    kubernetes.create(*(claim(name, claim_spec("at-once", size="16Mi")) for name in names))
    until("all are bound", lambda: all(c.status.phase == "Bound" for c in kubernetes.claims().items), 90)
    say(f"30 claims bound after {seconds(began)}")
    pods = [f"pod-{number}" for number in range(3)]
    for number, name in enumerate(pods):
        mine = names[number * 10 : number * 10 + 10]
        script = "; ".join(f"echo {one} > /{one}/file" for one in mine)
        made = pod(name, f"{script}; sync; cat /many-*/file; echo all", volume=mine[0])
        made["spec"]["volumes"] = [{"name": one, "persistentVolumeClaim": {"claimName": one}} for one in mine]
        made["spec"]["containers"][0]["volumeMounts"] = [{"name": one, "mountPath": f"/{one}"} for one in mine]
        kubernetes.create(made)
    for number, name in enumerate(pods):
        kubernetes.wait_pod(name, seconds=180)
        assert kubernetes.wait_log(name, "all").split() == [*sorted(names[number * 10 : number * 10 + 10]), "all"]
    say(f"30 volumes in use after {seconds(began)}")
    began = time.monotonic()
    empty(kubernetes)
    say(f"30 volumes gone after {seconds(began)}")


def test_the_scheduler_knows_the_room_of_a_pool(kubernetes: Kubernetes) -> None:
    free = int(kubernetes.snode.sh("vgs --noheadings --nosuffix --units=b -o vg_free vg0").split()[0])

    def told() -> set[int]:
        found = kubernetes.storage.list_namespaced_csi_storage_capacity(NAMESPACE).items
        return {int(parse_quantity(one.capacity)) for one in found if one.storage_class_name == "snode-thick"}

    until(f"capacity is {free}", lambda: told() == {free}, 90)
    kubernetes.create(claim("large", claim_spec(size="100Gi")), pod("large", _TOUCH, volume="large"))
    kubernetes.wait_event("large", "did not have enough free storage")


# -- what users are told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "size", "words"),
    [
        ("unknown-pool", {"pool": "fast"}, "48Mi", "no pool 'fast' here; there is: files, raid1, thick, thin"),
        ("bad-parameter", {"pool": "thick", "poool": "x"}, "48Mi", "'poool' is unknown; this driver knows: "),
        ("full", {"pool": "thick"}, "100Gi", "delete volumes, wait for wipes to end, or add a disk"),
    ],
)
def test_a_claim_that_can_not_be_served_says_why(
    kubernetes: Kubernetes, name: str, parameters: dict[str, str], size: str, words: str, say: Say
) -> None:
    kubernetes.create(
        storage_class(name, immediate=True, parameters=parameters), claim(name, claim_spec(name, size=size))
    )
    say(kubernetes.wait_event(name, words))


def test_a_node_without_iscsid_says_so_and_goes_on(kubernetes: Kubernetes, say: Say) -> None:
    cnode = kubernetes.cnodes[1]
    kubernetes.kill(cnode, "iscsid")
    kubernetes.create(claim("stuck"), pod("stuck", _TOUCH, volume="stuck", node=cnode.name))
    say(kubernetes.wait_event("stuck", "iscsid"))
    kubernetes.start_iscsid(cnode)
    kubernetes.wait_pod("stuck", seconds=120)


@pytest.mark.parametrize("role", ["controller", "node"])
def test_the_doctor_finds_no_fault_in_a_pod(kubernetes: Kubernetes, role: str) -> None:
    """What the manifests mount is all that the host's tools need."""
    for made in kubernetes.driver_pods(role):
        words = ["exec", f"--namespace={NAMESPACE}", made.metadata.name, "--container=snode", "--"]
        said = kubernetes.control.kubectl(*words, "snode", "doctor", f"--role={role}")  # fails if there is an error
        assert "host's folders: /dev, " in said


def test_the_commands_of_the_readme(kubernetes: Kubernetes, tmp_path: Path, say: Say) -> None:
    began = time.monotonic()
    said = readme.run_for_kubernetes(kubernetes, tmp_path)
    assert "pod/app condition met" in said
    say(f"{said.splitlines()[-1]!r} from the pod of README.md after {seconds(began)}")
