"""Target paths: what may be one, and reaching it without following a symbolic link.

A container that shares a folder with kubelet may swap a component of a target for a link while the driver works on it
(CVE-2021-25741). So a path is never handed to the kernel as text: it is walked component by component with
O_NOFOLLOW, each component relative to the verified one before, and what follows works on the descriptor at the end.
That is what openat2(RESOLVE_NO_SYMLINKS) promises too; the walk needs no new system call (some seccomp profiles refuse
it) and makes missing folders on its way.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from csi.errors import DriverError, InUse, Invalid, NotFound, Unavailable
from csi.run import Boundary, no_boundary, step

#: Where paths begin; another one for the host's folders, from a container.
ROOT = Path("/")

_SYSTEM = ("proc", "sys", "dev", "etc", "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "boot")
_FORBIDDEN = tuple(Path("/") / name for name in _SYSTEM)
_LONGEST_PATH = 4095  # PATH_MAX without the closing NUL
_LONGEST_COMPONENT = 255
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def check_target(path: Path, *, roots: Sequence[Path] = ()) -> None:
    """Raise Invalid unless volumes may be mounted at `path`.

    roots: folders that the administrator allows; none given means anywhere but the system's own folders. The part of
    the path that exists must be free of symbolic links.
    """
    _components(path)
    shown = _shown(path)
    if any(path == folder or folder in path.parents for folder in _FORBIDDEN):
        raise Invalid(f"path {shown}: lies in a folder of the system; volumes are not mounted there")
    if roots and not any(root in path.parents for root in roots):
        raise Invalid(f"path {shown}: not under {', '.join(map(str, roots))} (the setting node.target_roots)")
    try:
        with parent_of(path) as (parent, name):
            if _is_link(parent, name):
                raise _link(path, path)
    except NotFound:
        pass  # the rest does not exist yet, so there is no link in it


@contextmanager
def parent_of(
    path: Path, *, create: bool = False, root: Path = ROOT, boundary: Boundary = no_boundary
) -> Iterator[tuple[int, str]]:
    """The folder that holds the last component, as an O_PATH descriptor, and the name of that component.

    create: make missing folders, mode 0750. root: the folder that the path is meant from.
    Raises NotFound when a folder is missing, Invalid for a malformed path or a symbolic link on the way.
    """
    *folders, name = _components(path)
    here = os.open(root, _FOLDER & ~os.O_NOFOLLOW)  # /proc/1/root is a link, and no container's to swap
    try:
        walked = Path("/")
        for folder in folders:
            walked /= folder
            below = _enter(here, folder, walked, path, create=create, boundary=boundary)
            os.close(here)
            here = below
        yield here, name
    finally:
        os.close(here)


@contextmanager
def opened(path: Path, *, root: Path = ROOT) -> Iterator[int]:
    """An O_PATH descriptor of what stands at `path` (of the mount on top of it, if any); never through a link.

    Raises NotFound when it is missing, Invalid for a link.
    """
    with parent_of(path, root=root) as (parent, name):
        try:
            fd = os.open(name, _ANY, dir_fd=parent)
        except FileNotFoundError as error:
            raise NotFound(f"path {_shown(path)}: does not exist") from error
        except OSError as error:
            raise _trouble(path, error) from error
    try:
        if _is_link(fd, ""):
            raise _link(path, path)
        yield fd
    finally:
        os.close(fd)


def ensure_directory(path: Path, *, root: Path = ROOT, boundary: Boundary = no_boundary) -> None:
    """Make the folder `path` (mode 0750) with all parents. Raises Invalid when a link or a file is in the way."""
    with parent_of(path, create=True, root=root, boundary=boundary) as (parent, name):
        os.close(_enter(parent, name, path, path, create=True, boundary=boundary))


def ensure_file(path: Path, *, root: Path = ROOT, boundary: Boundary = no_boundary) -> None:
    """Make the empty file `path` (mode 0600) with all parent folders; a file or device node there already is fine."""
    with parent_of(path, create=True, root=root, boundary=boundary) as (parent, name):
        try:
            with step(boundary, "target-file"):
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent))
        except FileExistsError as error:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise _link(path, path) from error
            if stat.S_ISDIR(mode):
                raise Invalid(f"path {_shown(path)}: is a folder, but a block volume needs a file there") from error
        except OSError as error:
            raise _trouble(path, error) from error


def remove_target(path: Path, *, root: Path = ROOT, boundary: Boundary = no_boundary) -> None:
    """Remove the empty folder or empty file at `path`; absent is fine. Never recursive, and never through a link.

    Raises InUse when it holds anything or is a mount point, Invalid for a link.
    """
    try:
        with parent_of(path, root=root) as (parent, name):
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                raise _link(path, path)
            if stat.S_ISDIR(found.st_mode):
                with step(boundary, "target-remove"):
                    os.rmdir(name, dir_fd=parent)
            elif stat.S_ISREG(found.st_mode) and found.st_size == 0:
                with step(boundary, "target-remove"):
                    os.unlink(name, dir_fd=parent)
            else:
                raise InUse(f"path {_shown(path)}: not an empty file; look at it and move it away")
    except (NotFound, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InUse(f"path {_shown(path)}: holds files that are not on the volume; move them away") from error
        if error.errno == errno.EBUSY:
            raise InUse(f"path {_shown(path)}: still a mount point; unmount it first") from error
        raise _trouble(path, error) from error


def _components(path: Path) -> list[str]:
    text = str(path)
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise Invalid(f"path {_shown(path)}: is not valid Unicode") from error
    if not text.startswith("/") or text.startswith("//"):
        raise Invalid(f"path {_shown(path)}: must be absolute")
    if "\0" in text:
        raise Invalid(f"path {_shown(path)}: holds a NUL byte")
    if len(encoded) > _LONGEST_PATH:
        raise Invalid(f"path {_shown(path)}: longer than {_LONGEST_PATH} bytes")
    components = list(path.parts[1:])
    if not components:
        raise Invalid("path '/': the root folder can't be a target")
    if ".." in components:
        raise Invalid(f"path {_shown(path)}: must not contain '..'")
    if any(len(os.fsencode(component)) > _LONGEST_COMPONENT for component in components):
        raise Invalid(f"path {_shown(path)}: a component is longer than {_LONGEST_COMPONENT} bytes")
    return components


def _enter(parent: int, name: str, walked: Path, path: Path, *, create: bool, boundary: Boundary) -> int:
    try:
        try:
            return os.open(name, _FOLDER, dir_fd=parent)
        except FileNotFoundError as error:
            if not create:
                raise NotFound(f"path {_shown(path)}: {_shown(walked)} does not exist") from error
        # Made by somebody else in this moment; what it is shows when it is opened.
        with suppress(FileExistsError), step(boundary, "target-folder"):
            os.mkdir(name, 0o750, dir_fd=parent)
        return os.open(name, _FOLDER, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            if _is_link(parent, name):
                raise _link(path, walked) from error
            raise Invalid(f"path {_shown(path)}: {_shown(walked)} is not a folder") from error
        raise _trouble(path, error) from error


def _is_link(parent: int, name: str) -> bool:
    """Whether a component is a symbolic link (name "": what the descriptor stands for); nothing there is none.

    Asked by readlink: a stat would be answered by the filesystem that is mounted there, with an error for ever when
    that is dead (EIO after an XFS shutdown), and what is dead could not be unmounted any more. The kernel refuses to
    read what is no link before it asks any filesystem.
    """
    try:
        os.readlink(name, dir_fd=parent)
    except OSError:
        return False
    return True


def _link(path: Path, link: Path) -> Invalid:
    return Invalid(
        f"path {_shown(path)}: {_shown(link)} is a symbolic link, which is never followed; "
        "use the real path (for kubelet: its --root-dir)"
    )


def _trouble(path: Path, error: OSError) -> DriverError:
    kind = Invalid if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP) else Unavailable
    return kind(f"path {_shown(path)}: {error.strerror}; see to it on the node and repeat")


def _shown(path: Path) -> str:
    text = str(path)
    return repr(text if len(text) <= 200 else f"{text[:200]}…")
