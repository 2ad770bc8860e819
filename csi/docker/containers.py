"""Which mounts the containers of this machine show."""

from pathlib import Path

from csi.fs.mountinfo import Mount, layers_at, read_table

_PROC = Path("/proc")


def is_shown(path: Path, *, proc: Path = _PROC) -> bool:
    """Whether a mount namespace other than ours and the host's shows, at another place, what is mounted at `path`.

    Other namespaces than containers' hold copies of all mounts of the host; those stand at the same place.
    """
    layers = layers_at(read_table(proc / "self" / "mountinfo"), path)
    if not layers:
        return False
    number = layers[-1].major_minor
    seen = {_namespace(proc / "self"), _namespace(proc / "1"), None}
    for process in proc.glob("[0-9]*"):
        namespace = _namespace(process)
        if namespace in seen:
            continue
        seen.add(namespace)
        try:
            table = read_table(process / "mountinfo")
        except OSError:
            continue  # it ended in this moment
        if any(mount.major_minor == number and not _is_copy(mount, path) for mount in table):
            return True
    return False


def _is_copy(mount: Mount, path: Path) -> bool:
    """Whether it is the host's own mount of the volume, staged or shown, seen from elsewhere."""
    below = str(path.parent.parent)
    return below in str(mount.mount_point)


def _namespace(process: Path) -> int | None:
    try:
        return (process / "ns" / "mnt").stat().st_ino
    except OSError:
        return None
