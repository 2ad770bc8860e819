"""Who may call what over TCP. The certificate says who calls (csi/certs.py); over a unix socket, root.

What no rule allows is refused.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from csi.errors import Forbidden, Invalid
from csi.model import NodeId
from csi.pb import csi_pb2 as pb

_PREFIX = b"snode:"

Q = TypeVar("Q", bound=Message)


@dataclass(frozen=True)
class Caller:
    """The party at the other end."""

    name: str
    roles: frozenset[str]
    not_after: datetime.datetime | None = None  # of its certificate; None = for ever

    @property
    def node(self) -> str:
        """The node that it is, "" for none."""
        return next((role.removeprefix("node:") for role in self.roles if role.startswith("node:")), "")

    def may(self, role: str) -> bool:
        """Whether it has a role; an admin has all."""
        return role in self.roles or "admin" in self.roles


#: Root on this machine.
LOCAL = Caller("root", frozenset({"admin"}))


def caller_of(context: grpc.ServicerContext) -> Caller:
    """Who calls: root over a unix socket; over TCP, where TLS is mutual, whom the verified certificate names."""
    if context.peer().startswith("unix:"):
        return LOCAL
    facts = cast(Mapping[str, Sequence[bytes]], context.auth_context())  # grpc's stubs forget the sequence
    # URIs alone: a CA that also signs mail addresses or host names for others must not give roles by them.
    names = facts.get("peer_uri", ())
    roles = frozenset(name.removeprefix(_PREFIX).decode(errors="replace") for name in names if name.startswith(_PREFIX))
    common = [name.decode(errors="replace") for name in facts.get("x509_common_name", ())]
    return Caller(
        common[0] if common else "a certificate without a name", roles, _end(b"".join(facts["x509_pem_cert"]))
    )


@lru_cache(maxsize=256)
def _end(pem: bytes) -> datetime.datetime:
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def check(request: Message, caller: Caller) -> None:
    """Raise Forbidden unless the caller may make this request.

    TLS looks at the end of a certificate when a connection begins, and connections last; so each request looks again.
    """
    if caller.not_after is not None and caller.not_after < datetime.datetime.now(datetime.UTC):
        raise Forbidden(
            f"the certificate of {caller.name} is over since {caller.not_after:%Y-%m-%d %H:%M} UTC; issue it again: "
            f"snode certs issue {caller.name}"
        )
    if caller.may("admin"):
        return
    rule = _RULES.get(type(request), _administration)
    if reason := rule(request, caller):
        has = ", ".join(sorted(caller.roles)) or "no role"
        what = type(request).__name__.removesuffix("Request")
        raise Forbidden(f"{what}: the certificate of {caller.name} ({has}) does not allow it: {reason}")


def widened(request: Q, caller: Caller) -> Q:
    """The request to serve for this one: a page of a caller that sees a part of the volumes is cut from all of them,
    or its end would name a volume that the caller may not see."""
    if caller.may("volumes") or not isinstance(request, pb.ListVolumesRequest) or request.max_entries < 0:
        return request
    return cast(Q, pb.ListVolumesRequest(starting_token=request.starting_token))


def trim(request: Message, response: Message, caller: Caller) -> None:
    """Take out of a response what the caller may not see. Raises Forbidden if nothing of it is left to be seen."""
    if caller.may("volumes"):
        return
    if isinstance(response, pb.ListVolumesResponse):
        kept = [entry for entry in response.entries if _only_own(entry.status.published_node_ids, caller)]
        most = getattr(request, "max_entries", 0) or len(kept)
        response.next_token = kept[most - 1].volume.volume_id if len(kept) > most else ""
        del response.entries[:]
        response.entries.extend(kept[:most])
    elif isinstance(response, pb.ControllerGetVolumeResponse) and not _only_own(
        response.status.published_node_ids, caller
    ):
        raise Forbidden(
            f"ControllerGetVolume: the volume is not published to {caller.node}, and its certificate shows it no others"
        )


def _only_own(node_ids: Any, caller: Caller) -> bool:
    """Leave only the caller's own id in a list of node ids; whether one is left."""
    own = [node_id for node_id in node_ids if _name_in(node_id) == caller.node]
    del node_ids[:]
    node_ids.extend(own)
    return bool(own)


def _name_in(node_id: str) -> str:
    try:
        return NodeId.parse(node_id).name
    except Invalid:
        return ""


def _anyone(_request: Any, _caller: Caller) -> str:
    return ""


def _administration(_request: Any, _caller: Caller) -> str:
    return "it needs the role admin (snode certs issue NAME --role admin)"


def _volumes(_request: Any, caller: Caller) -> str:
    return "" if caller.may("volumes") else "it needs the role volumes (snode certs issue NAME --role volumes)"


def _reading(_request: Any, caller: Caller) -> str:
    return "" if caller.node or caller.may("volumes") else "it needs the role node or volumes"


def _own_node(request: Any, caller: Caller) -> str:
    name = _name_in(request.node_id)
    if caller.node and name == caller.node:
        return ""
    what = f"the node {name}" if name else "this node_id"
    return f"it is about {what}" + (f", and it may speak for {caller.node} alone" if caller.node else "")


_RULES: dict[type[Message], Callable[[Any, Caller], str]] = {
    pb.GetPluginInfoRequest: _anyone,
    pb.GetPluginCapabilitiesRequest: _anyone,
    pb.ProbeRequest: _anyone,
    pb.ControllerGetCapabilitiesRequest: _anyone,
    pb.CreateVolumeRequest: _volumes,
    pb.DeleteVolumeRequest: _volumes,
    pb.ControllerExpandVolumeRequest: _volumes,
    pb.ValidateVolumeCapabilitiesRequest: _volumes,
    pb.GetCapacityRequest: _volumes,
    pb.ListVolumesRequest: _reading,
    pb.ControllerGetVolumeRequest: _reading,
    pb.ControllerPublishVolumeRequest: _own_node,
    pb.ControllerUnpublishVolumeRequest: _own_node,
}
