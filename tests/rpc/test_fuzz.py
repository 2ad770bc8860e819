"""Random requests for every RPC: each gets an answer, and none finds a defect."""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi.pb import csi_pb2 as pb
from csi.rpc.redact import HIDDEN
from csi.services import controller, identity, node
from tests.rpc.service import Driver, block, mount
from tests.rpc.use_cases import NODE_ID

_IDS = ["v-" + "a" * 26, "v-" + "b" * 26, "../../x", "-x", "", "v-" + "a" * 26 + "\n"]
_PATHS = ["/staging/one", "/target/one", "relative", "/a/../b", "/nul\0", "/"]
_TEXTS = st.one_of(
    st.sampled_from([*_IDS, *_PATHS, NODE_ID, "1;x;;", "ext4", "xfs", "noatime", "bind", "pool", "fast"]),
    st.text(max_size=200),
)
_INTEGERS = st.one_of(st.integers(-2, 2), st.sampled_from([-(1 << 63), (1 << 63) - 1, 1 << 30]))


def _requests() -> list[type[Message]]:
    """The requests of the RPCs that are implemented here; the rest is the generated base class's."""
    classes: list[type] = [identity.Identity, controller.Controller, node.Node]
    return [getattr(pb, f"{name}Request") for kind in classes for name in vars(kind) if hasattr(pb, f"{name}Request")]


def _scalar(field: Any, draw: Callable[..., Any]) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw(_TEXTS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return draw(st.booleans())
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draw(st.integers(0, 8))
    value = draw(_INTEGERS)
    return max(-(1 << 31), min(value, (1 << 31) - 1)) if field.type == FieldDescriptor.TYPE_INT32 else value


def _fill(message: Message, draw: Callable[..., Any], *, chance: int) -> None:
    """Set fields at random: each with a chance of 1 in `chance`, what lies deeper more often."""
    for field in message.DESCRIPTOR.fields:
        if draw(st.integers(1, chance)) != 1:
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value.update(draw(st.dictionaries(_TEXTS, _TEXTS, max_size=3)))
        elif isinstance(value, Message):
            value.SetInParent()
            _fill(value, draw, chance=2)
        elif field.message_type is not None:
            for _ in range(draw(st.integers(0, 2))):
                _fill(value.add(), draw, chance=2)
        elif isinstance(value, str | int):
            setattr(message, field.name, _scalar(field, draw))
        else:
            value.extend(draw(st.lists(_TEXTS, max_size=3)))


#: A request that begins like this is answered with OK or NOT_FOUND, so that changes to it go deep.
_GOOD: dict[str, Any] = {
    "name": "one",
    "volume_id": _IDS[0],
    "node_id": NODE_ID,
    "staging_target_path": _PATHS[0],
    "target_path": _PATHS[1],
    "volume_path": _PATHS[1],
    "volume_capability": mount(),
    "volume_capabilities": [mount(), block()],
    "capacity_range": pb.CapacityRange(required_bytes=1 << 30),
}


@st.composite
def requests(draw: Callable[..., Any]) -> Message:
    kind = draw(st.sampled_from(_requests()))
    known = {name: value for name, value in _GOOD.items() if name in kind.DESCRIPTOR.fields_by_name}
    request = kind(**known) if draw(st.integers(0, 3)) else kind()
    _fill(request, draw, chance=8)
    assert isinstance(request, Message)
    return request


_DRIVER = Driver()


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests())
def test_no_request_finds_a_defect(request: Message) -> None:
    reply = _DRIVER.call(request)
    assert reply.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), f"{reply.code}: {reply.details}"
    if reply.code is grpc.StatusCode.INVALID_ARGUMENT:
        name = reply.details.partition(":")[0].split("[")[0].split(".")[0].split(" ")[0]
        # A text in a hidden field may be a part of the message, such as `target` in `target_path: required`.
        is_field = name in request.DESCRIPTOR.fields_by_name or HIDDEN in name
        assert is_field, f"does not begin with a field's name: {reply.details}"


def test_all_implemented_rpcs_are_among_them() -> None:
    assert len(_requests()) == 3 + 10 + 9
