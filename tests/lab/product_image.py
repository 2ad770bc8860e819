"""The product's container image, built from the working tree as its Dockerfile says, without any registry.

    get_image("localhost/snode-csi:1")     an archive for `docker load -i` and `ctr -n k8s.io images import`

Its name in .cache/image changes with csi/, pyproject.toml and the Dockerfile, and so does the archive's; what was built
once is there at once. The base is Debian trixie by mmdebstrap from the machine's own package source; buildah does the
rest. Fetching the base and all packages takes about two minutes once, a change of csi/ about ten seconds.
`python -m tests.lab.product_image` builds it and prints where it is and how large.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .apt import find_source
from .errors import LabError
from .kernel import PROJECT

CACHE = PROJECT / ".cache" / "image"
#: What the tests call it.
PRODUCT = "localhost/snode-csi:1"
_BASE = "localhost/debian:trixie"
_SUITE = "trixie"
#: What `docker build` gets to see; .dockerignore says the same.
_CONTEXT = ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "csi")
#: What debian:trixie-slim leaves out as well.
_NOT_IN_BASE = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_KEPT_ARCHIVES = 3
#: Images in buildah's storage, those of single steps included, before it is emptied of what has no name.
_MOST_IMAGES = 20
_SECONDS = 1200


def product_image() -> Path:
    """The archive of PRODUCT. Raises LabError."""
    return get_image(PRODUCT)


def get_image(reference: str = PRODUCT) -> Path:
    """An archive of the image with this reference, built first if it is not in the cache.

    Safe to call from several processes at once. Raises LabError when a program is missing, or the build fails with what
    it said.
    """
    path = CACHE / f"{reference.rpartition('/')[2].replace(':', '_')}-{_key(reference)}.tar"
    with _locked():
        if not path.exists():
            began = time.monotonic()
            _say(f"building {reference}, about two minutes the first time and seconds after a change of csi/")
            _build(reference, path)
            _say(f"built {reference} in {time.monotonic() - began:.0f} s: {path.stat().st_size / 2**20:.0f} MiB")
        path.touch()
        _drop_old(path)
    return path


def _key(reference: str) -> str:
    """A short hash of all that goes in."""
    digest = hashlib.sha256(reference.encode())
    for name in _CONTEXT:
        for path in sorted(_files(PROJECT / name)):
            content = path.read_bytes()
            digest.update(f"\0{path.relative_to(PROJECT)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _build(reference: str, path: Path) -> None:
    for program, package in (("buildah", "buildah"), ("mmdebstrap", "mmdebstrap")):
        if shutil.which(program) is None:
            raise LabError(f"{program} is missing: apt-get install {package}")
    _sweep()
    if _buildah("images", "--quiet", "--filter", f"reference={_BASE}").strip() == "":
        _make_base()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".building-") as folder:
        mounts = _pip_mounts(Path(folder))
        _buildah(
            "bud",
            "--layers",
            "--network=host",
            f"--build-arg=BASE={_BASE}",
            *(f"--volume={source}:{target}:ro" for source, target in mounts.items()),
            f"--tag={reference}",
            str(PROJECT),
        )
        made = Path(folder) / "image.tar"
        _buildah("push", reference, f"docker-archive:{made}:{reference}")
        made.replace(path)  # in one step: nobody ever sees half an archive


def _sweep() -> None:
    """Remove what killed builds left, nobody else having the lock, and old steps once there are many."""
    for left in CACHE.glob(".building-*"):
        shutil.rmtree(left)
    _buildah("rm", "--all")
    if len(_buildah("images", "--quiet").split()) > _MOST_IMAGES:
        _buildah("rmi", "--prune")


def _make_base() -> None:
    """A minimal Debian, from where this machine has its own packages."""
    name, text = find_source(_SUITE)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".base-") as folder:
        source, tar = Path(folder) / name, Path(folder) / "base.tar"
        source.write_text(text)
        left_out = [f"--dpkgopt=path-exclude={path}" for path in _NOT_IN_BASE]
        left_out.append("--dpkgopt=path-include=/usr/share/doc/*/copyright")
        _call(["mmdebstrap", "--quiet", "--variant=minbase", *left_out, _SUITE, str(tar), str(source)])
        container = _buildah("from", "scratch").strip()
        try:
            _buildah("add", "--quiet", container, str(tar), "/")
            _buildah("config", "--cmd=bash", container)
            _buildah("commit", "--quiet", container, _BASE)
        finally:
            _buildah("rm", container)


def _pip_mounts(folder: Path) -> dict[Path, str]:
    """This machine's own settings of pip for the build, as a file and what it names (certificates, wheels)."""
    listing = _call([sys.executable, "-m", "pip", "config", "list"])
    settings: dict[str, str] = {}
    mounts: dict[Path, str] = {}
    for name, value in re.findall(r"^(?:global|user|site|install|:env:)\.([a-z-]+)='(.*)'$", listing, re.M):
        words = []
        for word in value.replace("\\n", " ").split():
            path = Path(word)
            if path.is_absolute() and path.exists():
                word = mounts.setdefault(path.resolve(), f"/run/pip/{len(mounts)}")
            words.append(word)
        settings[name] = " ".join(words)
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return {file: "/etc/pip.conf", **mounts}


def _buildah(*words: str) -> str:
    """Run buildah with storage of our own; overlay on overlay is refused, so files are copied there."""
    kind = _call(["stat", "--file-system", "--format=%T", str(CACHE)]).strip()
    driver = ["--storage-driver=vfs"] if kind == "overlayfs" else []
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    return _call(["buildah", f"--root={CACHE / 'storage'}", f"--runroot={CACHE / 'run'}", *driver, *words], environment)


def _call(argv: Sequence[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        told = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise LabError(f"`{' '.join(argv)}` ended with {done.returncode}:\n{told}")
    return done.stdout


def _drop_old(path: Path) -> None:
    """Archives are large, and each change of csi/ makes one."""
    archives = sorted(CACHE.glob("*.tar"), key=lambda archive: archive.stat().st_mtime, reverse=True)
    for archive in archives[_KEPT_ARCHIVES:]:
        if archive != path:
            archive.unlink()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextmanager
def _locked() -> Iterator[None]:
    """One build at a time; the others wait and find it done."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(product_image())
