"""What would hide a change from the reader of the source (crash_sites.py), told by name: the driver may not have it.

A changing function may be called, and not be handed on, kept or mapped; it is called by the name of its module; and a
command that is said to be read-only is one of a list.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping

from tests.unit.crash_sites import Function, Source, is_read_only

#: The commands that change nothing, by their first words; of our own helpers, by the name of the file.
READ_ONLY: Mapping[tuple[str, ...], str] = {
    ("dmsetup", "info"): "the devices that there are",
    ("dmsetup", "status"): "how they are",
    ("look_helper.py",): "opens a device to read",
    ("lvm", "fullreport"): "all that LVM knows of a group",
    ("lvm", "lvmconfig"): "how LVM is set up",
    ("lvm", "vgs"): "one setting of a group",
    ("modprobe", "--dry-run"): "whether a module is there",
    ("pvs",): "all disks of LVM",
    ("tgtd", "--version"): "its version",
}
#: Functions that lead to a change and are named without a call.
HANDED_ON: Mapping[str, str] = {
    "ImageDirectory.sidecars": "a property; the change in it is a site",
    "_Zeroing._run": "the thread's; the changes in it are sites",
}
#: Modules whose functions are called by the module's own name, or the reader would not know them.
_BY_NAME = frozenset(["os", "fcntl", "shutil", "subprocess"])
#: Of these, names that change nothing.
_IMPORTED = frozenset(["PathLike", "which"])

_NO_ARGUMENTS = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
_NOTHING = ast.FunctionDef(name="", args=_NO_ARGUMENTS, body=[], decorator_list=[])


def hidden(source: Source) -> list[str]:
    """A line for each place, with what is wrong with it."""
    found = {(function.file, *place) for function in source.looks for place in _commands(source, function, look=True)}
    for function in source.functions:
        found |= {(function.file, *place) for place in _commands(source, function, look=False)}
    for file, tree in source.files.items():
        found |= {(file, *place) for place in (*_imports(tree), *_references(source, file, tree))}
    return [f"csi/{file}:{line}: {text}" for file, line, text in sorted(found)]


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if alias.asname and alias.name in _BY_NAME:
                        yield node.lineno, f"{alias.name} under another name"
            case ast.ImportFrom(module=str(module), names=names) if module in _BY_NAME:
                for alias in names:
                    if alias.name not in _IMPORTED:
                        yield node.lineno, f"from {module} import {alias.name}"


def _commands(source: Source, function: Function, *, look: bool) -> Iterator[tuple[int, str]]:
    """Read-only commands that are not in the list, or whose words can't be read. look: there may be no other ones."""
    known = {**_assigned(source.constants[function.file]), **_assigned(ast.walk(function.node))}
    for call in function.calls:
        if source.is_runner(call.func, function) and (look or is_read_only(call)):
            words = _words(call.args[0], known) if call.args else ()
            if not is_read_only(call) or not any(words[: len(listed)] == listed for listed in READ_ONLY):
                said = " ".join(words) or ast.unparse(call)
                yield call.lineno, f"{function.label} runs as one that changes nothing: {said}"


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """What names stand for; one that stands for several things stands for none."""
    found: dict[str, ast.expr] = {}
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = ast.Constant(None) if name in found else value
    return found


def _words(argv: ast.expr, known: Mapping[str, ast.expr]) -> tuple[str, ...]:
    """The first words of a command, up to one that is not written there."""
    match argv:
        case ast.Name(id=name) if name in known:
            return _words(known[name], {other: value for other, value in known.items() if other != name})
        case ast.Call(func=ast.Name(id="helper"), args=[_, ast.Constant(value=str(name))]):
            return (name,)
        case ast.List(elts=[ast.Starred(value=value), *_]):
            return _words(value, known)
        case ast.List(elts=parts):
            words: list[str] = []
            for part in parts:
                if not (isinstance(part, ast.Constant) and isinstance(part.value, str)):
                    break
                words.append(part.value)
            return tuple(words)
    return ()


def _references(source: Source, file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Changing functions that are named where no known function calls them."""
    owners: dict[ast.AST, Function] = {}
    for function in source.functions:
        if function.file == file:
            owners.update(dict.fromkeys(ast.walk(function.node), function))
    called = {call.func for function in source.functions if function.file == file for call in function.calls}
    called |= {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    outside = Function(file, "<module>", "", _NOTHING, [], {})
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load) or node in called:
            continue
        owner = owners.get(node, outside)
        if not source.is_data(node, owner) and source.changes(node, owner, but=HANDED_ON.keys()):
            yield node.lineno, f"{owner.label} names without a call {ast.unparse(node)}"
