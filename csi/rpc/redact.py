"""Requests as plain values for the log, without what nobody may read there.

A field is hidden when the specification marks it `csi_secret`, and also when it is known to carry credentials or
tokens without that mark: publish_context (our sealed CHAP pair), volume_context (an orchestrator may put service
account tokens into it) and mount_flags ("MAY contain sensitive information").
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from csi.pb import csi_pb2

HIDDEN = "***"

_HIDDEN_NAMES = frozenset({"publish_context", "volume_context", "mount_flags"})
#: Shorter values are not searched for in texts: they would blank out half of every message ("1", "true", "ext4").
_SHORTEST_SECRET = 6
_LONGEST_SHOWN = 256


def redacted(message: Message) -> dict[str, Any]:
    """The set fields of a message by name; hidden ones show only that they were there (maps: their keys)."""
    return {field.name: _shown(field, value) for field, value in message.ListFields()}


def hidden_values(message: Message, *, but: frozenset[str] = frozenset()) -> frozenset[str]:
    """Every text in the hidden fields of a message (without those named in `but`) that is worth searching for."""
    return frozenset(text for text in _hidden_texts(message, but) if len(text) >= _SHORTEST_SECRET)


def without(text: str, secrets: frozenset[str]) -> str:
    """`text` with every occurrence of a secret replaced, longest first (one may contain another)."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN).replace(repr(secret)[1:-1], HIDDEN)
    return text


def _is_hidden(field: FieldDescriptor) -> bool:
    extension: Any = csi_pb2.csi_secret  # the generated stub has it as a plain descriptor
    return field.name in _HIDDEN_NAMES or bool(field.GetOptions().Extensions[extension])


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _shown(field: FieldDescriptor, value: Any) -> Any:
    if _is_map(field):
        hidden = _is_hidden(field)
        return {_short(key): HIDDEN if hidden else _plain(item) for key, item in value.items()}
    if _is_hidden(field):
        return HIDDEN
    if isinstance(value, Message | str | bytes | int | float):
        return _plain(value)
    return [_plain(item) for item in value]


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return redacted(value)
    return _short(value) if isinstance(value, str) else value


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}… ({len(text)} characters)"


def _hidden_texts(message: Message, but: frozenset[str]) -> Iterator[str]:
    for field, value in message.ListFields():
        if field.name in but:
            continue
        if _is_hidden(field):
            yield from (str(item) for item in (value.values() if _is_map(field) else value))
        elif isinstance(value, Message):
            yield from _hidden_texts(value, but)
        elif field.message_type is not None and not _is_map(field):
            for item in value:
                yield from _hidden_texts(item, but)
