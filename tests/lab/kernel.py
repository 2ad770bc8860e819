"""The kernel that guests run: User Mode Linux, which is an ordinary program.

First choice is the one of Debian sid: 2 to 4 times faster than that of bookworm and never leaves a guest's processes
running on the host. It needs a newer C library than a stable host has, so it gets sid's beside it, in a cache folder.
Fallback is the package `user-mode-linux` of the host's own release. Run this file's folder to fill the cache:
`python -m tests.lab.kernel`.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .apt import find_source
from .errors import LabError

PROJECT = Path(__file__).resolve().parents[2]
_DEBIAN_OWN = (Path("/usr/bin/linux.uml"), Path("/usr/lib/uml/modules"))
_LIBC = Path("glibc/usr/lib/x86_64-linux-gnu")


@dataclass(frozen=True)
class Kernel:
    """A kernel program, the folder that holds `<release>/kernel/…` for it, and what it understands."""

    binary: Path
    modules: Path
    release: str
    seccomp: bool


def get_kernel() -> Kernel:
    """The best kernel to be had here: from the cache, else fetched once, else the host's own.

    SNODE_LAB_KERNEL=debian asks for the host's own; SNODE_LAB_KERNEL=sid refuses it.
    """
    wish = os.environ.get("SNODE_LAB_KERNEL", "")
    reason = "asked for by SNODE_LAB_KERNEL"
    if wish != "debian":
        try:
            return _sid_kernel(cache_folder())
        except (LabError, OSError, subprocess.SubprocessError) as error:
            if wish == "sid":
                raise
            reason = str(error)
    try:
        kernel = _probe(*_DEBIAN_OWN)
    except (LabError, OSError, subprocess.SubprocessError) as error:
        raise LabError(
            f"no kernel for the lab. Debian sid's: {reason}. "
            f"This machine's own: {error} (apt-get install user-mode-linux)"
        ) from error
    _say(f"using this machine's own kernel {kernel.release}, 2 to 4 times slower than Debian sid's: {reason}")
    return kernel


def cache_folder() -> Path:
    """Where the kernel is kept: `$XDG_CACHE_HOME/snode-csi` if that is set, else `.cache/uml` of the project.

    It must be stable: the path of the C library stands inside the patched kernel program.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) / "snode-csi" if base else PROJECT / ".cache" / "uml").absolute()


def _sid_kernel(cache: Path) -> Kernel:
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    with _locked(cache / ".lock"):
        try:
            return _probe(cache / "linux.uml", cache / "uml/usr/lib/uml/modules")
        except (LabError, OSError, subprocess.SubprocessError):
            pass  # not there, half there, or the folder was moved: build it again
        began = time.monotonic()
        if not _archives(cache):
            _say(f"fetching Debian sid's user-mode-linux (60 MB) once into {cache} …")
            _download(cache)
        _unpack(cache)
        kernel = _probe(cache / "linux.uml", cache / "uml/usr/lib/uml/modules")
        _say(f"kernel {kernel.release} ready after {time.monotonic() - began:.0f} s")
        return kernel


def _archives(cache: Path) -> list[Path]:
    """The two packages, once both are whole (apt moves a file into place only after its checksum was right)."""
    found = [sorted(cache.glob(f"debs/{name}_*.deb")) for name in ("user-mode-linux", "libc6")]
    return [files[-1] for files in found] if all(found) else []


def _download(cache: Path) -> None:
    """Fetches the packages with apt, whose state for this is in the cache: the host's lists stay as they are."""
    debs, state = cache / "debs", cache / "apt"
    for folder in (debs, state / "lists/partial", state / "archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    name, text = find_source("sid")
    (state / name).write_text(text)
    options = {
        "Dir::Etc::sourcelist": state / name,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "Acquire::Retries": "2",
    }
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    _call([*apt, "update"])
    _call([*apt, "download", "user-mode-linux/sid", "libc6/sid"], cwd=debs)
    shutil.rmtree(state)  # 30 MB of package lists
    if not _archives(cache):
        raise LabError("apt-get download left no packages")


def _unpack(cache: Path) -> None:
    for deb, folder in zip(_archives(cache), ("uml", "glibc"), strict=True):
        shutil.rmtree(cache / folder, ignore_errors=True)
        _call(["dpkg", "-x", os.fspath(deb), os.fspath(cache / folder)])
    libc, program = cache / _LIBC, cache / "linux.uml"
    shutil.copy2(cache / "uml/usr/bin/linux.uml", program)
    # Inside the program, not LD_LIBRARY_PATH: that would break every host tool which UML is started through.
    _call(["patchelf", "--set-interpreter", f"{libc}/ld-linux-x86-64.so.2", "--set-rpath", f"{libc}", f"{program}"])


def _probe(binary: Path, modules: Path) -> Kernel:
    """Runs the kernel for its version: proves that its C library fits (a GLIBC too old ends with a message)."""
    if not binary.exists():
        raise LabError(f"{binary} is not there")
    release = _call([os.fspath(binary), "--version"]).strip()
    if not (modules / release / "kernel/fs/overlayfs").is_dir():
        raise LabError(f"{modules} has no modules for kernel {release}")
    return Kernel(binary, modules, release, seccomp=b"seccomp=" in binary.read_bytes())


def _call(argv: list[str], *, cwd: Path | None = None) -> str:
    done = subprocess.run(
        argv, cwd=cwd, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise LabError(f"{Path(argv[0]).name} failed: {last}")
    return done.stdout


def _say(what: str) -> None:
    print(f"lab: {what}", file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one test run at a time fills the cache; the others wait and find it filled."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(get_kernel())
