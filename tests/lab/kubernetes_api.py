"""What tests ask of the API of a Kubernetes in the lab. Their objects are in the namespace `default`."""

from typing import Any

from kubernetes import client
from kubernetes.utils import create_from_dict

from .errors import LabError
from .kubernetes_control import ControlPlane, until
from .kubernetes_objects import Object


class Api:
    """The API as the admin sees it, once `open` was called."""

    def __init__(self, control: ControlPlane) -> None:
        self.control = control

    def open(self) -> None:
        """Make the clients."""
        self.api = self.control.client()
        # Any: by their types every field of an object may be None.
        self.core: Any = client.CoreV1Api(self.api)
        self.storage: Any = client.StorageV1Api(self.api)

    def create(self, *objects: Object) -> None:
        """Create objects, those with a namespace in `default`."""
        for made in objects:
            create_from_dict(self.api, made, namespace="default")

    def find_pod(self, name: str) -> Any:
        """A pod, or None."""
        found = self.core.list_namespaced_pod("default", field_selector=f"metadata.name={name}").items
        return found[0] if found else None

    def wait_pod(self, name: str, *, seconds: float = 150, other_than: str = "") -> Any:
        """A pod once it is ready. other_than: the uid of an earlier one of this name. LabError with its events."""

        def ready() -> Any:
            pod = self.find_pod(name)
            return pod if pod and pod.metadata.uid != other_than and is_ready(pod) else None

        try:
            return until(f"pod {name} is ready", ready, seconds)
        except LabError as error:
            raise LabError(f"{error}; events: {self.events(name)}") from error

    def wait_log(self, name: str, text: str, seconds: float = 60) -> str:
        """A pod's log once it has this text in it."""

        def log() -> str:
            said = str(self.core.read_namespaced_pod_log(name, "default"))
            return said if text in said else ""

        return until(f"pod {name} says {text!r}", log, seconds)

    def delete(self, kind: str, *names: str, wait: bool = True, seconds: float = 90) -> None:
        """Delete objects and, unless told otherwise, wait until they are gone."""
        words = ["delete", kind, *names, f"--wait={str(wait).lower()}", f"--timeout={seconds:.0f}s"]
        self.control.kubectl(*words, timeout=seconds + 10)

    def volume_of(self, claim: str) -> Any:
        """The PersistentVolume that a claim is bound to, once it is."""

        def bound() -> Any:
            found = self.core.read_namespaced_persistent_volume_claim(claim, "default")
            return found.spec.volume_name if found.status.phase == "Bound" else ""

        try:
            return self.core.read_persistent_volume(until(f"claim {claim} is bound", bound))
        except LabError as error:
            raise LabError(f"{error}; events: {self.events(claim)}") from error

    def claims(self) -> Any:
        """The list of all claims."""
        return self.core.list_namespaced_persistent_volume_claim("default")

    def events(self, name: str) -> list[str]:
        """What `kubectl describe` shows of an object: the messages about it."""
        found = self.core.list_namespaced_event("default", field_selector=f"involvedObject.name={name}").items
        return [f"{event.reason}: {event.message}" for event in found]

    def wait_event(self, name: str, text: str, seconds: float = 60) -> str:
        """The first message about an object that has this text in it."""

        def found() -> str:
            return next((message for message in self.events(name) if text in message), "")

        try:
            return until(f"an event of {name} with {text!r}", found, seconds)
        except LabError as error:
            raise LabError(f"{error}; there are: {self.events(name)}") from error

    def wait_ready(self, *names: str, ready: bool = True, seconds: float = 90) -> None:
        """Return once these nodes are Ready (or not so)."""

        def done() -> bool:
            nodes = {node.metadata.name: is_ready(node) for node in self.core.list_node().items}
            return all(nodes.get(name) is ready for name in names)

        until(f"{', '.join(names)}: Ready={ready}", done, seconds)

    def clear(self) -> None:
        """Delete what tests made and wait until it is gone from the API."""
        for kind in ("statefulset", "pod", "pvc"):
            self.control.kubectl("delete", kind, "--all", "--namespace=default", "--timeout=300s", timeout=320)
        until("no volume is left in the API", lambda: not self._left(), 90)

    def _left(self) -> list[str]:
        return self.names(self.core.list_persistent_volume()) + self.names(self.storage.list_volume_attachment())

    @staticmethod
    def names(found: Any) -> list[str]:
        """The names of a list's objects."""
        return [item.metadata.name for item in found.items]


def is_ready(thing: Any) -> bool:
    """Whether a pod or a node is Ready."""
    return any(c.type == "Ready" and c.status == "True" for c in thing.status.conditions or ())
