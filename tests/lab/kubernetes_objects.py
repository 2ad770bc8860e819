"""Kubernetes objects of the tests, as users write them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .kubernetes_node import BUSYBOX
from .product_image import PRODUCT

DRIVER = "csi.snode.io"
#: A container's claim is mounted here, and a raw one is this device.
DATA, DEVICE = "/data", "/dev/volume"
RECORDS = f"{DATA}/records"

Object = dict[str, Any]

#: What the last writer left is told first; the program is tests/lab/writer.py.
_WRITER = (
    f'[ -e {RECORDS} ] && python3 -c "$PROGRAM" check {RECORDS}; echo checked; '
    f'exec python3 -c "$PROGRAM" write {RECORDS} "$POD_UID" 0.02'
)


def storage_class(
    name: str,
    *,
    immediate: bool = False,
    retain: bool = False,
    parameters: Mapping[str, str] | None = None,
    mount_options: Sequence[str] = (),
) -> Object:
    """A StorageClass of the driver."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": DRIVER,
        "parameters": dict(parameters or {"pool": "thick"}),
        "mountOptions": list(mount_options),
        "allowVolumeExpansion": True,
        "volumeBindingMode": "Immediate" if immediate else "WaitForFirstConsumer",
        "reclaimPolicy": "Retain" if retain else "Delete",
    }


def claim_spec(
    storage_class: str = "snode-thick", *, size: str = "48Mi", mode: str = "ReadWriteOnce", block: bool = False
) -> Object:
    """What a claim asks for."""
    return {
        "storageClassName": storage_class,
        "accessModes": [mode],
        "volumeMode": "Block" if block else "Filesystem",
        "resources": {"requests": {"storage": size}},
    }


def claim(name: str, spec: Object | None = None) -> Object:
    """A PersistentVolumeClaim."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": spec or claim_spec(),
    }


def static_volume(name: str, *, claim: str, volume_id: str, size: str, mode: str, readonly: bool = False) -> Object:
    """A PersistentVolume made by hand, of a volume that is there, for one claim."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": DRIVER}},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": [mode],
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": "",
            "claimRef": {"namespace": "default", "name": claim},
            "csi": {"driver": DRIVER, "volumeHandle": volume_id, "fsType": "ext4", "readOnly": readonly},
        },
    }


def pod(
    name: str,
    script: str,
    *,
    volume: Object | str,
    node: str = "",
    block: bool = False,
    readonly: bool = False,
    sub_path: str = "",
    security: Object | None = None,
    image: str = BUSYBOX,
    environment: Sequence[Object] = (),
) -> Object:
    """A pod of one container that runs a shell script, then sleeps. volume: a claim's name, or a volume's source."""
    source = (
        {"persistentVolumeClaim": {"claimName": volume, "readOnly": readonly}} if isinstance(volume, str) else volume
    )
    container: Object = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", f"trap 'exit 0' TERM; set -e; {script}; while :; do sleep 1; done"],
        "env": list(environment),
    }
    if block:
        container["volumeDevices"] = [{"name": "volume", "devicePath": DEVICE}]
    else:
        container["volumeMounts"] = [{"name": "volume", "mountPath": DATA, "subPath": sub_path, "readOnly": readonly}]
    spec: Object = {
        "terminationGracePeriodSeconds": 2,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": security or {},
        "containers": [container],
        "volumes": [{"name": "volume", **source}],
    }
    if node:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def writer(name: str, *, volume: Object | str, node: str = "") -> Object:
    """A pod that writes numbered records and says which are durable; its uid is their stamp."""
    program = Path(__file__).with_name("writer.py").read_text()
    environment: list[Object] = [
        {"name": "PROGRAM", "value": program},
        {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
    ]
    made = pod(name, "", volume=volume, node=node, image=PRODUCT, environment=environment)
    made["spec"]["containers"][0]["command"] = ["sh", "-c", _WRITER]
    return made


def stateful_set(name: str, template: Object, *, spec: Object | None = None) -> Object:
    """A StatefulSet of one such pod, with a claim of its own from a template. The pod's volume is `volume`."""
    template["spec"]["volumes"] = []
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "serviceName": name,
            "replicas": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": template["spec"]},
            "volumeClaimTemplates": [{"metadata": {"name": "volume"}, "spec": spec or claim_spec()}],
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"},
        },
    }
