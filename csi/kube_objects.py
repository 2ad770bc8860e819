"""Kubernetes' objects as far as csi/kube.py needs them, and how they are read from the server's JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Lease:
    """A Lease. `renewed` is the holder's own clock: another text is a sign of life, and it is used for nothing else."""

    name: str
    holder: str = ""
    renewed: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    version: str = ""  # "" = it is not there yet


@dataclass(frozen=True)
class Taint:
    """A taint of a node."""

    key: str
    effect: str
    value: str = ""
    added: str = ""  # as the server has it


@dataclass(frozen=True)
class Node:
    """A node, as far as it matters here."""

    name: str
    uid: str
    version: str
    ready: bool = False
    taints: tuple[Taint, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    volumes_in_use: tuple[str, ...] = ()  # `kubernetes.io/csi/DRIVER^HANDLE`, as kubelet reports


@dataclass(frozen=True)
class Attachment:
    """A VolumeAttachment."""

    name: str
    driver: str
    node: str
    volume_name: str  # of the PersistentVolume; "" for an inline one
    attached: bool


@dataclass(frozen=True)
class PersistentVolume:
    """A PersistentVolume of a CSI driver."""

    name: str
    driver: str
    handle: str
    claim: str  # "namespace/name", "" = unbound


@dataclass(frozen=True)
class Pod:
    """A pod on a node."""

    namespace: str
    name: str
    uid: str
    started: bool  # a container of it has run, so its volumes were mounted
    claims: frozenset[str]  # "namespace/name" of the PersistentVolumeClaims that it mounts


def read_lease(item: Object) -> Lease:
    """A Lease."""
    metadata, spec = item["metadata"], item.get("spec", {})
    return Lease(
        name=metadata["name"],
        holder=str(spec.get("holderIdentity", "")),
        renewed=str(spec.get("renewTime", "")),
        annotations=metadata.get("annotations", {}),
        version=metadata["resourceVersion"],
    )


def read_node(item: Object) -> Node:
    """A node."""
    metadata, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    return Node(
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata["resourceVersion"],
        ready=any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", [])),
        taints=tuple(
            Taint(taint["key"], taint["effect"], taint.get("value", ""), taint.get("timeAdded", "") or "")
            for taint in spec.get("taints") or []
        ),
        annotations=metadata.get("annotations", {}),
        labels=metadata.get("labels", {}),
        volumes_in_use=tuple(status.get("volumesInUse") or []),
    )


def taint_fields(taint: Taint) -> Object:
    """A taint as the server takes it."""
    fields = {"key": taint.key, "effect": taint.effect, "value": taint.value, "timeAdded": taint.added}
    return {key: value for key, value in fields.items() if value}


def read_volume(item: Object) -> PersistentVolume:
    """A PersistentVolume; driver and handle are "" if it is not of CSI."""
    source, claim = item["spec"].get("csi", {}), item["spec"].get("claimRef")
    return PersistentVolume(
        name=item["metadata"]["name"],
        driver=str(source.get("driver", "")),
        handle=str(source.get("volumeHandle", "")),
        claim=f"{claim['namespace']}/{claim['name']}" if claim else "",
    )


def read_attachment(item: Object) -> Attachment:
    """A VolumeAttachment."""
    spec = item["spec"]
    return Attachment(
        name=item["metadata"]["name"],
        driver=spec["attacher"],
        node=spec["nodeName"],
        volume_name=str(spec["source"].get("persistentVolumeName") or ""),
        attached=bool(item.get("status", {}).get("attached")),
    )


def read_pod(item: Object) -> Pod:
    """A pod."""
    metadata, status = item["metadata"], item.get("status", {})
    claims = set()
    for volume in item["spec"].get("volumes") or []:
        if "persistentVolumeClaim" in volume:
            claims.add(volume["persistentVolumeClaim"]["claimName"])
        elif "ephemeral" in volume:
            claims.add(f"{metadata['name']}-{volume['name']}")
    states = [*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])]
    return Pod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        started=any(one.get("state", {}).keys() & {"running", "terminated"} for one in states),
        claims=frozenset(f"{metadata['namespace']}/{claim}" for claim in claims),
    )
