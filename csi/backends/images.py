"""A directory of sparse image files: every name is ours, no link is followed, and an empty mount point is refused."""

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from csi.errors import InUse, NoSpace, OutOfRange, Unavailable
from csi.model import VOLUME_ID
from csi.records import RecordStore
from csi.run import Boundary, step

_IMAGE = re.compile(rf"({VOLUME_ID.pattern})\.img")
_NEW = re.compile(rf"\.new-({VOLUME_ID.pattern})")
_TRASH = re.compile(rf"\.trash-({VOLUME_ID.pattern})-[0-9a-f]{{16}}")
_MARKER = "pool"  # a record in the directory and in the state folder: is the right filesystem mounted here?


class ImageDirectory:
    """The images of one pool. Methods with a `directory` want the descriptor that `opened` gives."""

    def __init__(self, pool: str, path: Path, *, state: Path, boundary: Boundary) -> None:
        """path: made with mode 0700 on the very first use. Raises Unavailable when that fails."""
        self.path = path
        self._pool = pool
        self._boundary = boundary
        self._verified: tuple[int, int] | None = None
        self._sidecars: RecordStore | None = None
        # Two threads that both met a new directory would each give it an identity, or sweep up the other's record.
        self._marking = threading.Lock()
        try:
            self._state = RecordStore(state, boundary=boundary)
            if self._state.read(_MARKER) is None and not path.exists():
                with step(boundary, "pool-folder"):
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"pool {pool}: {path} can't be made ({error.strerror})") from error

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory, which is checked to be the pool's own."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(
                f"pool {self._pool}: {self.path} can't be opened ({error.strerror}); is its filesystem mounted?"
            ) from error
        try:
            fact = os.fstat(fd)
            with self._marking:
                if self._verified != (fact.st_dev, fact.st_ino):
                    self._check_marker()
                    self._verified = (fact.st_dev, fact.st_ino)
            yield fd
        finally:
            os.close(fd)

    @property
    def sidecars(self) -> RecordStore:
        """The records beside the images; only while `opened`."""
        if self._sidecars is None:
            self._sidecars = RecordStore(self.path, boundary=self._boundary)
        return self._sidecars

    def _check_marker(self) -> None:
        known = self._state.read(_MARKER)
        here = self.sidecars.read(_MARKER)
        owner = here.get("pool", self._pool) if here is not None else self._pool
        if owner != self._pool:
            raise Unavailable(
                f"pool {self._pool}: {self.path} holds the volumes of pool {owner} -> give each pool a directory "
                f"of its own (if the pool was renamed, write its new name into {self.path / _MARKER}.json)"
            )
        if known is None:
            if here is None:
                here = {"id": secrets.token_hex(16), "pool": self._pool}
                self.sidecars.write(_MARKER, here)
            self._state.write(_MARKER, {"id": here["id"]})
        elif here is None or here.get("id") != known.get("id"):
            raise Unavailable(
                f"pool {self._pool}: {self.path} is not the directory that this pool was made in; mount its filesystem "
                f"(if its volumes are given up, remove {_MARKER}.json from the pool's folder in the state directory)"
            )

    # -- look ----------------------------------------------------------------------------------------------------

    def images(self) -> set[str]:
        """The ids that have an image."""
        return {match[1] for path in self.path.iterdir() if (match := _IMAGE.fullmatch(path.name))}

    def image(self, volume_id: str) -> Path:
        """The path of an image."""
        return self.path / f"{volume_id}.img"

    def stat(self, directory: int, volume_id: str) -> os.stat_result | None:
        """The facts of an image, or None; a link or device in its place is not ours."""
        try:
            fact = os.stat(f"{volume_id}.img", dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return fact if stat.S_ISREG(fact.st_mode) else None

    def available(self, directory: int, *, ratio: float) -> int:
        """Bytes that can still be promised: what is free and what our images hold, less what was promised before."""
        facts = os.fstatvfs(directory)
        promised = held = 0
        for volume_id in self.images():
            fact = self.stat(directory, volume_id)
            if fact is not None:
                promised += fact.st_size
                held += fact.st_blocks * 512
        # The block maps of full images take a little of the filesystem too.
        usable = (facts.f_bavail * facts.f_frsize + held) * 63 // 64
        return max(0, int(usable * ratio) - promised)

    # -- change --------------------------------------------------------------------------------------------------

    def make(self, directory: int, volume_id: str, *, size_bytes: int) -> None:
        """Make an image of zeros; it appears whole or not at all."""
        temporary = f".new-{volume_id}"
        with self._explained(f"volume {volume_id} of {size_bytes} bytes"):
            self._unlink(temporary, directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._boundary("image:before")
            fd = os.open(temporary, flags, 0o600, dir_fd=directory)
            self._boundary("image:made")
            self._set_size(fd, size_bytes)
            os.rename(temporary, f"{volume_id}.img", src_dir_fd=directory, dst_dir_fd=directory)
            self._boundary("image:renamed")
            os.fsync(directory)
        self._boundary("image:after")

    def extend(self, directory: int, volume_id: str, *, size_bytes: int) -> None:
        """Enlarge an image with zeros."""
        with self._explained(f"volume {volume_id} of {size_bytes} bytes"):
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            self._set_size(os.open(f"{volume_id}.img", flags, dir_fd=directory), size_bytes)

    def remove(self, directory: int, volume_id: str) -> None:
        """Remove an image and its sidecar; the volume is gone with the first step, absent is fine."""
        trash = f".trash-{volume_id}-{secrets.token_hex(8)}"
        with self._explained(f"volume {volume_id}"), contextlib.suppress(FileNotFoundError):
            self._boundary("image-trash:before")
            os.rename(f"{volume_id}.img", trash, src_dir_fd=directory, dst_dir_fd=directory)
            self._boundary("image-trash:renamed")
            os.fsync(directory)
            self._boundary("image-trash:after")
        self.sidecars.remove(volume_id)
        with self._explained(f"volume {volume_id}"):
            self._unlink(trash, directory)

    def sweep(self, directory: int) -> list[str]:
        """Remove what a crash left of creations and deletions. Returns the ids of used volumes whose image is gone.

        No image is removed for the lack of a sidecar: no crash of ours leaves such a thing.
        """
        images = self.images()
        for path in list(self.path.iterdir()):
            trash = _TRASH.fullmatch(path.name)
            if trash and trash[1] not in images:
                self.sidecars.remove(trash[1])
            if trash or _NEW.fullmatch(path.name):
                self._unlink(path.name, directory)
        lost = []
        for volume_id in self.sidecars.names():
            if not VOLUME_ID.fullmatch(volume_id) or volume_id in images:
                continue
            fields = self.sidecars.read(volume_id)
            if fields is not None and fields.get("blank"):
                self.sidecars.remove(volume_id)  # of a creation that never came to its image
            else:
                lost.append(volume_id)
        return lost

    def check_detached(self, directory: int, volume_id: str, *, loops: Path) -> None:
        """Raise InUse while a loop device has the image: removed, it would live on unseen, with its space."""
        fact = self.stat(directory, volume_id)
        if fact is None:
            return
        for backing in loops.glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):  # the loop device, or its file, went away in this moment
                attached = Path(backing.read_text().rstrip("\n"))
                if attached.name == f"{volume_id}.img" and os.path.samestat(attached.stat(), fact):
                    raise InUse(
                        f"volume {volume_id}: still attached as /dev/{backing.parent.parent.name} on this host; "
                        "unstage it first"
                    )

    def _unlink(self, name: str, directory: int) -> None:
        """Remove what is no volume (any more); absent is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=directory, follow_symlinks=False)
            with step(self._boundary, "image-unlink"):
                os.unlink(name, dir_fd=directory)

    def _set_size(self, fd: int, size_bytes: int) -> None:
        """Give an image its size, on the disk, and close it."""
        try:
            self._boundary("image-size:before")
            os.ftruncate(fd, size_bytes)
            self._boundary("image-size:set")
            os.fsync(fd)
            self._boundary("image-size:after")
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn an error of the filesystem into ours."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            text = f"pool {self._pool}: {what}: {error.strerror} in {self.path}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"{text}; delete volumes or enlarge its filesystem") from error
            if error.errno in (errno.EFBIG, errno.EINVAL):
                raise OutOfRange(f"{text}; its filesystem can't hold a file of that size") from error
            raise Unavailable(f"{text}; see the kernel log") from error
