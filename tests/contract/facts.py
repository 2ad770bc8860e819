"""A protobuf file as flat facts, so that two of them can be compared by full name.

A fact is one thing that shows on the wire or in the generated code: `csi.v1.Volume.volume_id: number` is `2`. The walk
is generic: it takes every field that a descriptor has set, so nothing can be forgotten when descriptors get new ones.
"""

import re
from collections.abc import Iterator, Sequence

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

#: Parts of a descriptor that are named things of their own.
NAMED = (
    "message_type", "nested_type", "field", "enum_type", "value", "oneof_decl", "extension", "service", "method",
)  # fmt: skip

#: Parts whose order says nothing.
UNORDERED = ("dependency", "reserved_name", "reserved_range")

#: Where the file lies and its comments are not part of the contract; `oneof_index` is turned into a name.
LEFT_OUT = ("name", "source_code_info", "oneof_index")


def facts_of(file: FileDescriptorProto) -> dict[str, str]:
    """All facts of a file, by `full.name: what`. Options are named in full, custom ones by their extension."""
    return dict(_walk(file, file.package))


def differences(ours: FileDescriptorProto, published: FileDescriptorProto) -> list[str]:
    """One line for each fact that is not the same in both, sorted by full name."""
    mine, theirs = facts_of(ours), facts_of(published)
    return [
        f"{key} is {mine.get(key, 'absent')}, published is {theirs.get(key, 'absent')}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def _walk(part: Message, full_name: str) -> Iterator[tuple[str, str]]:
    yield f"{full_name}: kind", type(part).__name__.removesuffix("DescriptorProto")
    if isinstance(part, DescriptorProto):
        yield from _oneofs(part, full_name)
    if isinstance(part, FieldDescriptorProto) and not part.HasField("json_name"):
        yield f"{full_name}: json_name", _default_json_name(part.name)
    for field, value in part.ListFields():
        if field.name in NAMED:
            for child in value:
                yield from _walk(child, f"{full_name}.{child.name}")
        elif field.name == "options":
            yield from _options(value, full_name)
        elif field.name in UNORDERED:
            yield f"{full_name}: {field.name}", " ".join(sorted(_text(item) for item in value))
        elif field.name not in LEFT_OUT:
            yield f"{full_name}: {field.name}", _text(value)


def _oneofs(message: DescriptorProto, full_name: str) -> Iterator[tuple[str, str]]:
    """Which oneof a field is in, by name: the numbers of oneofs depend on their order."""
    for field in message.field:
        if field.HasField("oneof_index"):
            yield f"{full_name}.{field.name}: oneof", message.oneof_decl[field.oneof_index].name


def _options(options: Message, full_name: str) -> Iterator[tuple[str, str]]:
    for field, value in options.ListFields():
        name = f"({field.full_name})" if field.is_extension else field.name
        yield f"{full_name}: option {name}", _text(value)
    # An option whose extension this process does not know is read as an unknown field; it must not pass unseen.
    unknown = UnknownFieldSet(options)
    for index in range(len(unknown)):
        yield f"{full_name}: option number {unknown[index].field_number}", _text(unknown[index].data)


def _default_json_name(name: str) -> str:
    """The name that protoc writes down for other languages and leaves out of Python code."""
    return re.sub(r"_(.)", lambda match: match[1].upper(), name)


def _text(value: object) -> str:
    if isinstance(value, Message):
        return str(value).replace("\n", " ").strip()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return " ".join(_text(item) for item in value)
    return str(value)
