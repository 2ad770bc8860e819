"""What is on a volume, kept in its backing file: it follows the data wherever the driver takes or loses them.

A filesystem is the real superblock of its kind, so that the SNODE's own look finds it, and behind it a list of records:
what applications wrote. A new file has neither.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from csi.fs.format import MINIMUM_BYTES
from tests.fakes.mounts import Contents
from tests.scratch_folder import scratch_folder

_SUPERBLOCK_BYTES = 128 << 10  # btrfs has its first one at 64 KiB
_FACTS_AT = 768 << 10
_FACTS_BYTES = 64 << 10


class Image(Contents):
    """The content of one backing file, read and written at each access."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def signature(self) -> str:
        """As blkid's TYPE; "" = blank."""
        return str(self._facts().get("signature", ""))

    @signature.setter
    def signature(self, fs_type: str) -> None:
        data = superblock(fs_type) if fs_type else bytes(_SUPERBLOCK_BYTES)
        self._write(0, data)
        self._change(signature=fs_type)

    @property
    def fs_bytes(self) -> int:
        """Size of the filesystem."""
        return int(self._facts().get("fs_bytes", 0))

    @fs_bytes.setter
    def fs_bytes(self, size_bytes: int) -> None:
        self._change(fs_bytes=size_bytes)

    @property
    def fsck_code(self) -> int:
        """What e2fsck -p will end with."""
        return int(self._facts().get("fsck_code", 0))

    @fsck_code.setter
    def fsck_code(self, code: int) -> None:
        self._change(fsck_code=code)

    @property
    def records(self) -> list[str]:
        """What was written, oldest first."""
        return list(self._facts().get("records", []))

    @records.setter
    def records(self, records: Sequence[str]) -> None:
        self._change(records=list(records))

    def _facts(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(_FACTS_AT)
            text = file.read(_FACTS_BYTES).rstrip(b"\0")
        return dict(json.loads(text)) if text else {}

    def _change(self, **changes: object) -> None:
        data = json.dumps({**self._facts(), **changes}).encode()
        assert len(data) <= _FACTS_BYTES
        self._write(_FACTS_AT, data.ljust(_FACTS_BYTES, b"\0"))

    def _write(self, at: int, data: bytes) -> None:
        fd = os.open(self.path, os.O_WRONLY)
        try:
            assert os.pwrite(fd, data, at) == len(data)
        finally:
            os.close(fd)


@cache
def superblock(fs_type: str) -> bytes:
    """The beginning of a filesystem, made by the real tool."""
    with scratch_folder("image") as folder:
        path = folder / "image"
        path.touch()
        os.truncate(path, MINIMUM_BYTES[fs_type])
        subprocess.run([f"mkfs.{fs_type}", path], check=True, capture_output=True)
        with path.open("rb") as file:
            return file.read(_SUPERBLOCK_BYTES)
