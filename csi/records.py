"""Small JSON records that survive a crash at any instruction, in a folder only root reads.

A record is written to a temporary name, synced, renamed, and the folder synced: a reader finds the old one or the new
one, whole. Names are ours (ids), never the caller's.
"""

import contextlib
import json
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from csi.errors import DataLoss, NoSpace, Unavailable
from csi.run import Boundary, no_boundary, step

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_SUFFIX = ".json"
_TEMPORARY = ".tmp"


class RecordStore:
    """A folder of records of one kind. Every record carries `format`; a newer one than ours is refused."""

    def __init__(
        self, folder: Path, *, format: int = 1, boundary: Boundary = no_boundary, read_only: bool = False
    ) -> None:
        """folder: made with mode 0700 if missing. Left-over temporary files of a crash are removed.

        read_only: another process owns the records; nothing is touched.
        """
        self._folder = folder
        self._format = format
        self._boundary = boundary
        if read_only:
            return
        if not folder.exists():
            with step(boundary, "record-folder"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in folder.glob(f"*{_TEMPORARY}"):
            with step(boundary, "record-leftover"):
                leftover.unlink(missing_ok=True)

    def write(self, name: str, fields: Mapping[str, Any]) -> None:
        """Write or replace a record. Raises NoSpace or Unavailable when the disk refuses; the old one then stands."""
        path = self._path(name)
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}{_TEMPORARY}")
        data = json.dumps({"format": self._format, **fields}, sort_keys=True, indent=1).encode() + b"\n"
        self._boundary("record:before")
        try:
            fd = _write_new(temporary, data)
            try:
                self._boundary("record:written")
                os.fsync(fd)
                self._boundary("record:synced")
            finally:
                os.close(fd)
            temporary.rename(path)
            self._boundary("record:renamed")
            self._sync_folder()
        except OSError as error:
            with contextlib.suppress(OSError):  # a read-only filesystem refuses this too
                temporary.unlink(missing_ok=True)
            kind = NoSpace if error.errno in (28, 122) else Unavailable  # ENOSPC, EDQUOT
            raise kind(f"{path}: can't write the record ({error.strerror}); free space there and repeat") from error
        self._boundary("record:after")

    def read(self, name: str) -> dict[str, Any] | None:
        """The fields of a record, or None when there is none. Raises DataLoss when it can't be understood."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(f"{path}: can't be read ({error.strerror}); see the kernel log") from error
        try:
            fields = json.loads(data)
            version = fields["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataLoss(f"{path}: damaged record ({error}); restore it or move it away") from error
        if not isinstance(version, int) or version > self._format:
            raise DataLoss(f"{path}: record of format {version}, this release reads up to {self._format}; upgrade")
        assert isinstance(fields, dict)
        return fields

    def remove(self, name: str) -> None:
        """Remove a record; absent is fine. Raises Unavailable when the disk refuses."""
        path = self._path(name)
        self._boundary("record-remove:before")
        try:
            path.unlink(missing_ok=True)
            self._boundary("record-remove:removed")
            self._sync_folder()
        except OSError as error:
            raise Unavailable(f"{path}: can't be removed ({error.strerror}); repair the disk and repeat") from error
        self._boundary("record-remove:after")

    def set_aside(self, name: str) -> None:
        """Rename a record that can't be read to `NAME.damaged`, for a human to look at; absent is fine."""
        path = self._path(name)
        with suppress(FileNotFoundError):
            self._boundary("record-set-aside:before")
            path.rename(path.with_suffix(".damaged"))
            self._boundary("record-set-aside:renamed")
            self._sync_folder()
            self._boundary("record-set-aside:after")

    def names(self) -> list[str]:
        """The names of all records, sorted."""
        return sorted(path.name[: -len(_SUFFIX)] for path in self._folder.glob(f"*{_SUFFIX}"))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a record name: {name!r}")
        return self._folder / f"{name}{_SUFFIX}"

    def _sync_folder(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _write_new(path: Path, data: bytes) -> int:
    """Write a file anew; returns its descriptor."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        os.close(fd)
        raise
    return fd
