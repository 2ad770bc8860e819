"""Container images of the host's own programs, as `docker load` and `ctr images import` take them: no registry."""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_FOLDERS = ("bin", "tmp", "etc", "lib", "lib64", "usr/bin", "usr/lib", "proc", "dev", "sys", "var/lib")
_BUSYBOX = (
    "sh",
    "sleep",
    "cat",
    "echo",
    "sync",
    "ls",
    "df",
    "dd",
    "date",
    "mkdir",
    "touch",
    "head",
    "tail",
    "wc",
    "seq",
    "test",
    "true",
    "grep",
    "stat",
)


def make_image(
    path: Path,
    reference: str,
    *,
    programs: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
    entrypoint: Sequence[str] = (),
) -> None:
    """Write an image of busybox and some programs of the host, with the libraries that they need.

    files: further programs, by their paths in the image; these need no libraries.
    """
    layer = _layer(programs, files or {})
    digest = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": list(entrypoint),
            "Cmd": [] if entrypoint else ["/bin/sleep", "1000000"],
            "Env": ["PATH=/usr/bin:/bin"],
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [reference], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        _add(tar, "config.json", json.dumps(config).encode())
        _add(tar, "manifest.json", json.dumps(manifest).encode())
        _add(tar, "layer.tar", layer)


def _layer(programs: Sequence[str], files: Mapping[str, Path]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in _FOLDERS:
            _add(tar, folder, mode=0o1777 if folder == "tmp" else 0o755)
        _add(tar, "bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)
        for name in _BUSYBOX:
            _add(tar, f"bin/{name}", link="busybox")
        for file in sorted({file for program in programs for file in _needed(program)}):
            _add(tar, str(file).lstrip("/"), file.read_bytes(), mode=0o755)
        for name, file in files.items():
            _add(tar, name.lstrip("/"), file.read_bytes(), mode=0o755)
    return out.getvalue()


def _needed(program: str) -> list[Path]:
    """A program and its libraries, each at the path where the loader looks for it."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return [Path(program), *map(Path, re.findall(r"(?:=> )?(/\S+) \(0x", listing))]


def _add(tar: tarfile.TarFile, name: str, data: bytes | None = None, *, mode: int = 0o644, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.mode = mode
    if link:
        info.type, info.linkname = tarfile.SYMTYPE, link
    elif data is None:
        info.type = tarfile.DIRTYPE
    else:
        info.size = len(data)
    tar.addfile(info, io.BytesIO(data or b""))
