"""Where the driver changes the world, read from its source: every change, and every call that leads to one.

A change is a file that is made, written, synced, renamed or removed, an ioctl, a message, or a command that is not
read-only. A call of a function that makes one, however far down, is a site as well, so that a new command shows even
where it goes through an old function. Who is meant by `x.write()` is told by its name and, where the source says it,
by the class of `x`; in doubt it is a site.
"""

import ast
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tests.fakes.crash import Place

ROOT = Path(__file__).resolve().parents[2] / "csi"

LOOKS_ONLY = "looks only, as its commands say"
#: Files that are not looked at.
LEFT_OUT: Mapping[str, str] = {
    "pb/*": "generated",
    "__main__.py": "the command line",
    "cli.py": "the command line",
    "cli_*.py": "the command line",
    "client.py": "the command line",
    "certs.py": "the command line",
    "docker/*": "a client of the service; what kill -9 leaves of it is tested with a real dockerd (tests/clusters)",
    "failover/*": "a client of the service and of the Kubernetes API; it keeps nothing",
    "kube*.py": "the Kubernetes API",
    "first_process.py": "passes signals on",
    "demo*.py": "not the service",
    "doctor*.py": LOOKS_ONLY,
    "crash.py": "the switch itself",
    "wire.py": "puts the objects together; what they do at their making is looked at",
    "resident*.py": "run commands for run.py",
    "run.py": "starts the commands, and passes the boundaries around them",
    "claims.py": "locks of files, which the kernel drops with the process",
    "locks.py": "locks of files, which the kernel drops with the process",
    "rpc/*": "the socket of the service, made anew at each start",
    "fs/unmount_helper.py": "a command, with boundaries around it",
    "fs/look_helper.py": "a command that only reads",
    "connectors/attribute_helper.py": "a command, with boundaries around it",
    "connectors/flush_helper.py": "a command, with boundaries around it",
    "exports/tcp_diag.py": "asks the kernel",
    "connectors/block_device.py": "asks a disk who it is",
}
#: Functions whose calls are no sites, though they change something once.
NOT_FOLLOWED: Mapping[str, str] = {
    "ImageDirectory._check_marker": "only at the very first look at a pool; the changes in it are sites",
    "Lvm._check_identity": "only at the very first look at a pool; the changes in it are sites",
    "Wire.ask": "TgtClient._change passes the boundaries; all other requests only look",
    "parent_of": "makes folders for ensure_directory and ensure_file only; the change in it is a site",
}
#: Functions with an ioctl that changes nothing.
ONLY_ASK: Mapping[str, str] = {
    "LoopConnector._backing": "LOOP_GET_STATUS64",
    "DeviceNodes.is_unused": "DM_DEV_STATUS",
}
#: Files whose changes have their boundaries in another one.
BOUNDED_ELSEWHERE: Mapping[str, str] = {
    "connectors/unstick.py": "Unstick._free",
    "exports/tgt_wire.py": "TgtClient._change, for the requests that change something",
}
#: What of `os` changes nothing in the world; everything else is taken for a change, whatever Python will have.
_OS_LOOKS = frozenset(
    ("PathLike", "_exit", "close", "dup", "environ", "fdopen", "fsdecode", "fsencode", "fspath", "fstat", "fstatvfs",
     "geteuid", "getpid", "listdir", "lseek", "lstat", "major", "minor", "open", "path", "pipe", "posix_fadvise",
     "set_blocking",
     "pread", "preadv", "read", "readlink", "scandir", "stat", "stat_result", "statvfs", "strerror", "umask", "urandom")
)  # fmt: skip
_PATH = frozenset(
    ("unlink", "rename", "rmdir", "mkdir", "touch", "write_text", "write_bytes", "symlink_to", "hardlink_to", "chmod",
     "lchmod")
)  # fmt: skip
_SOCKET = frozenset(("send", "sendall", "sendmsg", "sendto"))
#: Built-in things, and their methods that are called like ours.
_BUILT_IN = frozenset(["Path", "str", "int", "bytes", "dict", "list", "set", "bool", "super"])
_BUILT_IN_METHODS = frozenset(["add", "discard", "pop", "append", "extend", "update", "clear", "get", "items"])


@dataclass(frozen=True)
class Site:
    """A call that is a change (`primitive`), passes a boundary (`boundary`), or leads to either."""

    file: str
    line: int
    places: frozenset[Place]  # what the running code may say of it
    function: str
    text: str
    primitive: bool = False
    boundary: bool = False

    def __str__(self) -> str:
        return f"csi/{self.file}:{self.line} in {self.function}: {self.text}"


@dataclass
class Function:
    """A function of the driver, or a method."""

    file: str
    name: str
    owner: str  # the class, or ""
    node: ast.FunctionDef
    calls: list[ast.Call]
    known: Mapping[str, str]  # the classes of its arguments and variables, where it says them

    @cached_property
    def entered(self) -> dict[ast.expr, ast.With]:
        """The calls that a `with` enters, and the whole statement."""
        statements = [node for node in ast.walk(self.node) if isinstance(node, ast.With)]
        return {item.context_expr: node for node in statements for item in node.items}

    @property
    def label(self) -> str:
        """With its class."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


class Source:
    """The driver's source, or that of another folder built like it."""

    def __init__(self, root: Path = ROOT) -> None:
        self.files: dict[str, ast.Module] = {}
        self.functions: list[Function] = []
        self.constants: dict[str, list[ast.stmt]] = {}  # file: what stands in the module itself
        self.looks: list[Function] = []  # those of files that look only
        self._bases: dict[str, list[str]] = {}
        self._protocols: dict[str, str] = {}  # its name: the folder of those who keep it
        self._attributes: dict[tuple[str, str], str] = {}  # class, attribute: the attribute's class
        self._imports: dict[str, dict[str, str]] = {}  # file: name: what it is called where it is from
        self._foreign: dict[str, set[str]] = {}  # file: modules that are not ours
        for path in sorted(root.rglob("*.py")):
            self._read(path.relative_to(root).as_posix(), ast.parse(path.read_text()))
        self._classes = set(self._bases)
        self.files = {file: tree for file, tree in self.files.items() if not _is_left_out(file)}
        self.looks = [f for f in self.functions if _is_left_out(f.file) == LOOKS_ONLY]
        self.functions = [function for function in self.functions if function.file in self.files]
        self._by_name: dict[str, list[Function]] = {}
        for function in self.functions:
            self._by_name.setdefault(function.name, []).append(function)
        self._changing: set[int] = set()
        while grown := [f for f in self.functions if id(f) not in self._changing and any(self._sites_of(f))]:
            self._changing.update(map(id, grown))

    def sites(self) -> list[Site]:
        """All of them, in the order of the source."""
        return [site for function in self.functions for site in self._sites_of(function)]

    def missed(self, visited: Set[Place]) -> list[Site]:
        """The sites that pass boundaries, here or further down, and were not under way at any of these."""
        return [site for site in self.sites() if not site.primitive and not site.places & visited]

    def unbounded(self) -> list[str]:
        """Changes that have no boundary between them and the change before, or none after them."""
        found = []
        for function in self.functions:
            if function.file in BOUNDED_ELSEWHERE or self._is_raw(function):
                continue
            steps = [("change", None), *self._steps(function), ("change", None)]
            for before, (kind, call), after in zip(steps, steps[1:], steps[2:], strict=False):
                if kind == "change" and call is not None and "change" in (before[0], after[0]):
                    found.append(f"csi/{function.file}:{call.lineno} in {function.label}: {_text(call)}")
        return found

    def _sites_of(self, function: Function) -> Iterator[Site]:
        entered = function.entered
        for call in function.calls:
            primitive, boundary = self._is_change(call, function), _is_boundary(call)
            if primitive or boundary or self._leads(call, function):
                places = frozenset((function.file, *place) for place in _places(call, entered.get(call)))
                yield Site(function.file, call.lineno, places, function.label, _text(call), primitive, boundary)

    def is_runner(self, func: ast.expr, caller: Function) -> bool:
        """Whether this is the `run` of a runner: of anything that is not known to be something else."""
        match func:
            case ast.Attribute(value=ast.Name(id=name), attr="run") if name in self._foreign[caller.file]:
                return False
            case ast.Attribute(value=value, attr="run"):
                kind = self._class_of(value, caller)
                return kind == "Runner" or (kind not in self._classes and kind not in _BUILT_IN and "." not in kind)
        return False

    def changes(self, func: ast.expr, caller: Function, *, but: Set[str] = frozenset()) -> bool:
        """Whether what is named here, if it is called, makes or leads to a change; `but` for these functions."""
        if self.is_runner(func, caller) or self._names_change(func, caller):
            return True
        leads = (f.label for f in self._meant(func, caller) if id(f) in self._changing)
        return not {*leads} <= NOT_FOLLOWED.keys() | but

    def is_data(self, node: ast.expr, caller: Function) -> bool:
        """Whether this is the name of a class of ours, or of what one holds; in doubt it is."""
        match node:
            case ast.Name(id=name):
                return self._imports[caller.file].get(name, name) in self._classes
            case ast.Attribute(value=value, attr=name):
                owner = self._class_of(value, caller)
                return any(name == held and owner in (kind, "") for kind, held in self._attributes)
        return False

    def _is_change(self, call: ast.Call, caller: Function) -> bool:
        return self._is_primitive(call, caller) or any(map(self._is_raw, self._meant(call.func, caller)))

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self, file: str, tree: ast.Module) -> None:
        self.files[file] = tree
        self.constants[file] = tree.body
        self._imports[file], self._foreign[file] = {}, set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._foreign[file].update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("csi"):
                self._imports[file].update({alias.asname or alias.name: alias.name for alias in node.names})
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self._add(file, "", node)
            elif isinstance(node, ast.ClassDef):
                self._read_class(file, node)

    def _read_class(self, file: str, node: ast.ClassDef) -> None:
        self._bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
        if "Protocol" in self._bases[node.name]:
            self._protocols[node.name] = Path(file).parent.as_posix()
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                self._attributes[node.name, part.target.id] = _class_named(part.annotation)
            elif isinstance(part, ast.FunctionDef):
                self._add(file, node.name, part)
                self._read_attributes(node.name, part)

    def _read_attributes(self, owner: str, function: ast.FunctionDef) -> None:
        known = _arguments(function)
        if any(_is_name(decorator, "property") for decorator in function.decorator_list) and function.returns:
            self._attributes[owner, function.name] = _class_named(function.returns)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Attribute) and _is_name(target.value, "self"):
                        named = _class_named(node.annotation) if isinstance(node, ast.AnnAssign) else ""
                        self._attributes.setdefault((owner, target.attr), named or _class_made(node.value, known))

    def _add(self, file: str, owner: str, node: ast.FunctionDef) -> None:
        calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
        calls.sort(key=lambda call: (call.lineno, call.col_offset))
        self.functions.append(Function(file, node.name, owner, node, calls, _variables(node)))

    # -- who is called -------------------------------------------------------------------------------------------

    def _leads(self, call: ast.Call, caller: Function) -> bool:
        if self.is_runner(call.func, caller):
            return not is_read_only(call)
        return self.changes(call.func, caller)

    def _meant(self, func: ast.expr, caller: Function) -> list[Function]:
        """Whom a call of this may reach."""
        imported = self._imports[caller.file]
        match func:
            case ast.Name(id=name):
                name = imported.get(name, name)
                if name in self._classes:
                    return [f for f in self._by_name.get("__init__", []) if f.owner == name]
                return [f for f in self._by_name.get(name, []) if not f.owner]
            case ast.Attribute(value=ast.Name(id=owner)) if owner in self._foreign[caller.file]:
                return []
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in imported:
                owner, named = imported[owner], self._by_name.get(name, [])
                if owner in self._classes:
                    return [f for f in named if f.owner == owner]
                return [f for f in named if not f.owner and Path(f.file).stem == owner]
            case ast.Attribute(value=value, attr=name):
                return self._methods(name, self._class_of(value, caller))
        return []

    def _methods(self, name: str, owner: str) -> list[Function]:
        """The methods of this name that a thing of this class may have; "" = of any."""
        named = [function for function in self._by_name.get(name, []) if function.owner]
        if owner in self._protocols:
            return [f for f in named if Path(f.file).parent.as_posix() == self._protocols[owner]]
        if owner in self._classes:
            return [f for f in named if f.owner in (owner, *self._bases[owner])]
        foreign = owner in _BUILT_IN or "." in owner
        return [] if foreign or name in _BUILT_IN_METHODS else named

    def _class_of(self, value: ast.expr, caller: Function) -> str:
        """The class of a thing, where the source says it; else ""."""
        match value:
            case ast.Name(id="self"):
                return caller.owner
            case ast.Name(id=name):
                return caller.known.get(name, "")
            case ast.Attribute(value=owner, attr=name):
                return self._attributes.get((self._class_of(owner, caller), name), "")
            case ast.Call():
                return _class_made(value, {})
        return ""

    def _is_primitive(self, call: ast.Call, caller: Function) -> bool:
        match call.func:
            case ast.Attribute(value=ast.Name(id="os"), attr="open"):
                return any(flag in ast.unparse(call) for flag in ("O_CREAT", "O_TRUNC", "O_TMPFILE"))
            case ast.Attribute(attr="replace"):  # of a path; that of a text has two arguments
                return len(call.args) == 1
            case ast.Attribute(attr="open") | ast.Name(id="open"):
                return any(map(_is_mode_to_write, [*call.args, *(keyword.value for keyword in call.keywords)]))
        return self._names_change(call.func, caller)

    def _names_change(self, func: ast.expr, caller: Function) -> bool:
        """Whether this is a changing function of Python's own."""
        match func:
            case ast.Attribute(value=ast.Name(id="os"), attr=name):
                return name not in _OS_LOOKS and name != name.upper()
            case ast.Attribute(value=ast.Name(id="fcntl"), attr="ioctl"):
                return caller.label not in ONLY_ASK
            case ast.Attribute(value=ast.Name(id="shutil"), attr=name):
                return name != "which"
            case ast.Attribute(value=ast.Name(id="subprocess")):
                return True
            case ast.Attribute(value=value, attr=name) if name in _PATH | _SOCKET:
                return self._class_of(value, caller) not in self._classes
        return False

    # -- boundaries ----------------------------------------------------------------------------------------------

    def _is_raw(self, function: Function) -> bool:
        """Whether it makes one change and leaves the boundaries to its callers, in the same file."""
        private = function.name.startswith("_") and not function.name.startswith("__")
        if not private or any(_is_boundary(call) for call in function.calls):
            return False
        return any(self._is_primitive(call, function) for call in function.calls)

    def _steps(self, function: Function) -> list[tuple[str, ast.Call | None]]:
        """The boundaries and changes of a function in their order. A `with step(…)` has a boundary at its end too."""
        entered = function.entered
        handlers = [node for node in ast.walk(function.node) if isinstance(node, ast.ExceptHandler)]
        steps: list[tuple[int, int, str, ast.Call]] = []
        for call in function.calls:
            if any(handler.lineno <= call.lineno <= (handler.end_lineno or 0) for handler in handlers):
                continue  # takes back what failed
            if _is_boundary(call):
                steps.append((call.lineno, call.col_offset, "boundary", call))
                if call in entered:
                    steps.append((entered[call].end_lineno or 0, 1 << 20, "boundary", call))
            elif self._is_change(call, function):
                steps.append((call.lineno, call.col_offset, "change", call))
        return [(kind, call) for _, _, kind, call in sorted(steps, key=lambda step: step[:2])]


@cache
def driver() -> Source:
    """The driver's own source."""
    return Source()


def _places(call: ast.Call, statement: ast.With | None) -> Iterator[tuple[int, int, int, int]]:
    """Where Python places a call: where it begins, or the name of the method, or the statement that enters it."""
    for node in (call, statement):
        if node is not None:
            yield node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0
    if isinstance(call.func, ast.Attribute):
        line, column = call.func.end_lineno or 0, (call.func.end_col_offset or 0) - len(call.func.attr)
        yield line, column, call.end_lineno or 0, call.end_col_offset or 0


def _is_left_out(file: str) -> str:
    """Why; "" = it is not."""
    return next((why for pattern, why in LEFT_OUT.items() if Path(file).match(pattern)), "")


def _is_boundary(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(attr="_boundary") | ast.Name(id="boundary") | ast.Name(id="step"):
            return True
    return False


def is_read_only(call: ast.Call) -> bool:
    """Whether a runner is told that this command changes nothing."""
    return any(k.arg == "read_only" and _is_true(k.value) for k in call.keywords)


def _is_mode_to_write(node: ast.expr) -> bool:
    """Of a file that is opened: "w", "ab", "r+"; no other argument of an `open` is that short."""
    match node:
        case ast.Constant(value=str(mode)):
            return len(mode) <= 3 and not {*mode}.isdisjoint("wax+")
    return False


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _arguments(function: ast.FunctionDef) -> dict[str, str]:
    """The classes of a function's arguments."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {a.arg: _class_named(a.annotation) for a in arguments if a.annotation is not None}


def _variables(function: ast.FunctionDef) -> dict[str, str]:
    """The classes of a function's arguments and variables."""
    found: dict[str, str] = {}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.setdefault(name, _class_made(value, {}))
            case ast.withitem(context_expr=value, optional_vars=ast.Name(id=name)):
                found.setdefault(name, _class_made(value, {}))
    return found | _arguments(function)


def _class_named(annotation: ast.expr) -> str:
    """The class that an annotation names: of `X`, `"X"`, `X | None`."""
    match annotation:
        case ast.Name(id=name) | ast.Constant(value=str(name)):
            return name
        case ast.Attribute():
            return ast.unparse(annotation)
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            return _class_named(left)
        case ast.Subscript(value=ast.Name(id=name)):
            return name
    return ""


def _class_made(value: ast.expr | None, known: Mapping[str, str]) -> str:
    """The class of a value: of `X(…)`, of an argument, of `argument or X(…)`; with a dot, when it is not ours."""
    match value:
        case ast.Call(func=ast.Name(id=name)) if name.strip("_")[:1].isupper() or name == "super":
            return name
        case ast.Call(func=ast.Attribute(value=ast.Name(id="socket" | "os" as module), attr=name)):
            return f"{module}.{name}"
        case ast.Name(id=name):
            return known.get(name, "")
        case ast.BoolOp(values=values):
            return next((kind for part in values if (kind := _class_made(part, known))), "")
    return ""


def _text(call: ast.Call) -> str:
    text = ast.unparse(call)
    return text if len(text) <= 100 else f"{text[:99]}…"
