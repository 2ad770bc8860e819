"""The Kubernetes API as far as the failover needs it: a thin, typed layer over the library `kubernetes`.

The library does the connection (a pod's service account, or a kubeconfig); objects are read as the plain JSON that the
server sends, since its models cost a hundred times what the few fields do that are looked at. Nothing is cached, and
nothing waits: every request ends within `SECONDS`. What is refused or unreachable is an error of csi.errors.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from kubernetes import config
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import OpenApiException
from urllib3.exceptions import HTTPError

from csi.errors import Busy, Conflict, DriverError, Forbidden, NotFound, Unavailable
from csi.kube_objects import (
    Attachment,
    Lease,
    Node,
    Object,
    PersistentVolume,
    Pod,
    Taint,
    read_attachment,
    read_lease,
    read_node,
    read_pod,
    read_volume,
    taint_fields,
)

#: Longest wait for the connection, and for the answer.
SECONDS = (2.0, 4.0)
NODE_LEASES = "kube-node-lease"
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_JSON, _MERGE_PATCH = "application/json", "application/merge-patch+json"
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
_EVENT_NAMESPACE = "default"  # of events on what has no namespace


class Kube:
    """One API server. Methods raise NotFound, Conflict (it exists), Busy (it was changed meanwhile), Forbidden,
    Unavailable.
    """

    def __init__(self, api: ApiClient, *, namespace: str) -> None:
        """namespace: of our own Leases."""
        self._api = api
        self.namespace = namespace

    @classmethod
    def connect(cls, *, kubeconfig: Path | None = None, namespace: str = "") -> "Kube":
        """By a kubeconfig, or as the pod that we are. namespace "" = the pod's own. Raises Unavailable."""
        settings = Configuration()
        settings.retries = 0
        try:
            if kubeconfig is not None:
                config.load_kube_config(str(kubeconfig), client_configuration=settings, persist_config=False)
            else:
                config.load_incluster_config(settings)
                namespace = namespace or (_SERVICE_ACCOUNT / "namespace").read_text(encoding="ascii").strip()
        except (config.ConfigException, OSError) as error:
            raise Unavailable(
                f"no way to the Kubernetes API: {error}; run in a pod with a service account, or set "
                "failover.kubeconfig"
            ) from error
        return cls(ApiClient(settings), namespace=namespace or "default")

    def close(self) -> None:
        """Close the connections."""
        self._api.rest_client.pool_manager.clear()

    # -- leases --------------------------------------------------------------------------------------------------

    def node_leases(self) -> dict[str, str]:
        """When each node's kubelet last renewed its Lease, by node. From the server's cache: cheap at any size."""
        items = self._list(_LEASES, {"resourceVersion": "0"}, namespace=NODE_LEASES)
        return {item["metadata"]["name"]: str(item.get("spec", {}).get("renewTime", "")) for item in items}

    def node_lease(self, node: str) -> str:
        """The same of one node, as it surely is now."""
        found = self._ask("GET", _LEASES + "/{name}", namespace=NODE_LEASES, name=node)
        return str(found.get("spec", {}).get("renewTime", ""))

    def leases(self, label: str) -> list[Lease]:
        """Leases in our namespace that have a label (`key=value`)."""
        return [read_lease(item) for item in self._list(_LEASES, {"labelSelector": label}, namespace=self.namespace)]

    def find_lease(self, name: str) -> Lease | None:
        """A Lease in our namespace."""
        try:
            return read_lease(self._ask("GET", _LEASES + "/{name}", namespace=self.namespace, name=name))
        except NotFound:
            return None

    def put_lease(self, lease: Lease, *, labels: Mapping[str, str], seconds: float) -> Lease:
        """Renew a Lease for its holder now; made if its version is "". Raises Busy or Conflict when another was
        first.
        """
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": lease.name,
                "namespace": self.namespace,
                "labels": dict(labels),
                "annotations": dict(lease.annotations),
                **({"resourceVersion": lease.version} if lease.version else {}),
            },
            "spec": {
                "holderIdentity": lease.holder,
                "leaseDurationSeconds": int(seconds),
                "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }
        if lease.version:
            path = _LEASES + "/{name}"
            return read_lease(self._ask("PUT", path, namespace=self.namespace, name=lease.name, body=body))
        return read_lease(self._ask("POST", _LEASES, namespace=self.namespace, body=body))

    # -- nodes, volumes, pods ------------------------------------------------------------------------------------

    def node(self, name: str) -> Node:
        """One node."""
        return read_node(self._ask("GET", "/api/v1/nodes/{name}", name=name))

    def nodes(self, label: str) -> list[Node]:
        """The nodes that have a label (`key` or `key=value`)."""
        return [read_node(item) for item in self._list("/api/v1/nodes", {"labelSelector": label})]

    def patch_node(
        self,
        node: Node,
        *,
        taints: Sequence[Taint],
        annotations: Mapping[str, str | None],
        labels: Mapping[str, str | None],
    ) -> None:
        """Set a node's taints, and some annotations and labels (None removes). Raises Busy if it changed since."""
        body = {
            "metadata": {"resourceVersion": node.version, "annotations": dict(annotations), "labels": dict(labels)},
            "spec": {"taints": [taint_fields(taint) for taint in taints]},
        }
        self._ask("PATCH", "/api/v1/nodes/{name}", name=node.name, body=body, content=_MERGE_PATCH)

    def attachments(self) -> list[Attachment]:
        """All VolumeAttachments."""
        return [read_attachment(item) for item in self._list("/apis/storage.k8s.io/v1/volumeattachments")]

    def persistent_volume(self, name: str) -> PersistentVolume:
        """A PersistentVolume; driver and handle are "" if it is not of CSI."""
        return read_volume(self._ask("GET", "/api/v1/persistentvolumes/{name}", name=name))

    def pods_on(self, node: str) -> list[Pod]:
        """The pods that are bound to a node."""
        return [read_pod(item) for item in self._list("/api/v1/pods", {"fieldSelector": f"spec.nodeName={node}"})]

    def forget_pod(self, pod: Pod) -> None:
        """Delete a pod from the API at once, without waiting for its kubelet; gone is fine."""
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.uid}}
        path = "/api/v1/namespaces/{namespace}/pods/{name}"
        try:
            self._ask("DELETE", path, namespace=pod.namespace, name=pod.name, body=body)
        except (NotFound, Busy):
            return  # gone, or another one has its name by now

    def tell(self, node: Node, *, reason: str, message: str, warning: bool, reporter: str) -> None:
        """An Event on a node."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            # In the order of time, as other clients name theirs.
            "metadata": {"name": f"{node.name}.{time.time_ns():x}", "namespace": _EVENT_NAMESPACE},
            "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": node.name, "uid": node.uid},
            "reason": reason,
            "message": message[:1024],
            "type": "Warning" if warning else "Normal",
            "source": {"component": "snode-failover", "host": reporter},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        self._ask("POST", "/api/v1/namespaces/{namespace}/events", namespace=_EVENT_NAMESPACE, body=body)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _list(self, path: str, query: Mapping[str, str] | None = None, **names: str) -> list[Object]:
        found = self._ask("GET", path, query=query, body=None, **names)
        return cast(list[Object], found.get("items") or [])

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = _JSON,
        **names: str,
    ) -> Object:
        what = f"{method} {path.format(**names)}"
        try:
            request = self._api.param_serialize(
                method,
                path,
                path_params=names,
                query_params=list((query or {}).items()),
                header_params={"Accept": _JSON, **({"Content-Type": content} if body is not None else {})},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._api.call_api(*request, _request_timeout=SECONDS)
            data, status = response.read(), int(response.status)
        except (HTTPError, OpenApiException, OSError) as error:
            raise Unavailable(f"the Kubernetes API does not answer ({what}): {error}") from error
        if not 200 <= status < 300:
            raise _refusal(what, status, data)
        found = json.loads(data)
        assert isinstance(found, dict)
        return found


def _refusal(what: str, status: int, data: bytes) -> DriverError:
    try:
        answer = json.loads(data)
        message, reason = str(answer["message"]), str(answer.get("reason", ""))
    except (ValueError, KeyError, TypeError):
        message, reason = data[:200].decode(errors="replace"), ""
    text = f"the Kubernetes API says {status} to {what}: {message}"
    if status == 409:
        return Conflict(text) if reason == "AlreadyExists" else Busy(text)
    if status in (401, 403):
        return Forbidden(f"{text}; see the rules in deploy/kubernetes/components/failover")
    return NotFound(text) if status == 404 else Unavailable(text)
