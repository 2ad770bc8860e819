"""An iSCSI initiator for tests: libiscsi (package libiscsi7) by ctypes. It needs no kernel support and no root."""

import ctypes
from typing import Any

_NORMAL_SESSION = 2
_NO_DIGEST = 0
_CHECK_CONDITION = 2
_LAST_SCSI_STATUS = 0xFF


class LoginFailed(Exception):
    """The target refused, or the connection was closed."""


class CommandError(Exception):
    """A SCSI command failed, or its connection is gone."""


class ConnectionGone(CommandError):
    """The command had no answer; a kernel would log in again and repeat it."""


class _Sense(ctypes.Structure):
    _fields_ = (
        ("error_type", ctypes.c_ubyte),
        ("key", ctypes.c_int),
        ("ascq", ctypes.c_int),
        ("bits", ctypes.c_ubyte),
        ("bit_pointer", ctypes.c_ubyte),
        ("field_pointer", ctypes.c_uint16),
    )


class _Data(ctypes.Structure):
    _fields_ = (("size", ctypes.c_int), ("data", ctypes.POINTER(ctypes.c_ubyte)))


class _Task(ctypes.Structure):
    """The public head of struct scsi_task."""

    _fields_ = (
        ("status", ctypes.c_int),
        ("cdb_size", ctypes.c_int),
        ("xfer_dir", ctypes.c_int),
        ("expxferlen", ctypes.c_int),
        ("cdb", ctypes.c_ubyte * 16),
        ("residual_status", ctypes.c_int),
        ("residual", ctypes.c_size_t),
        ("sense", _Sense),
        ("datain", _Data),
    )


def _library() -> Any:
    try:
        library = ctypes.CDLL("libiscsi.so.7")
    except OSError as error:
        raise AssertionError("libiscsi.so.7 is missing: install the package libiscsi7") from error
    library.iscsi_create_context.restype = ctypes.c_void_p
    library.iscsi_get_error.restype = ctypes.c_char_p
    for name in ("inquiry", "readcapacity16", "testunitready", "read16", "write16", "modesense6", "synchronizecache10"):
        getattr(library, f"iscsi_{name}_sync").restype = ctypes.POINTER(_Task)
    return library


class Session:
    """A session with LUN 1 of a target, logged in when made. Raises LoginFailed."""

    def __init__(
        self,
        portal: str,
        target: str,
        initiator: str,
        *,
        user: str = "",
        secret: str = "",
        mutual_user: str = "",
        mutual_secret: str = "",
        alias: str = "",
        seconds: int = 5,
    ) -> None:
        self._library = _library()
        self._context = ctypes.c_void_p(self._library.iscsi_create_context(initiator.encode()))
        self._library.iscsi_set_targetname(self._context, target.encode())
        self._library.iscsi_set_session_type(self._context, _NORMAL_SESSION)
        self._library.iscsi_set_header_digest(self._context, _NO_DIGEST)
        self._library.iscsi_set_noautoreconnect(self._context, 1)
        self._library.iscsi_set_timeout(self._context, seconds)
        if alias:
            self._library.iscsi_set_alias(self._context, alias.encode())
        if user:
            self._library.iscsi_set_initiator_username_pwd(self._context, user.encode(), secret.encode())
        if mutual_user:
            self._library.iscsi_set_target_username_pwd(self._context, mutual_user.encode(), mutual_secret.encode())
        if self._library.iscsi_full_connect_sync(self._context, portal.encode(), 1) != 0:
            message = self._error()
            self.close()
            raise LoginFailed(message)

    def close(self) -> None:
        """End it without a logout, as a machine does that loses power."""
        if self._context:
            self._library.iscsi_destroy_context(self._context)
            self._context = ctypes.c_void_p()

    def alive(self) -> bool:
        """True if the LUN still answers."""
        try:
            self._run("testunitready")
        except CommandError:
            return False
        return True

    def size_bytes(self) -> int:
        """READ CAPACITY (16)."""
        data = self._run("readcapacity16")
        return (int.from_bytes(data[0:8], "big") + 1) * int.from_bytes(data[8:12], "big")

    def vendor(self) -> str:
        """Vendor of the standard INQUIRY."""
        return self._run("inquiry", 0, 0, 96)[8:16].decode().strip()

    def serial(self) -> str:
        """VPD page 0x80."""
        return self._run("inquiry", 1, 0x80, 255)[4:].decode().strip(" \0")

    def naa(self) -> str:
        """The 32 hex digits of the NAA identifier in VPD page 0x83: what a kernel shows as `naa.…`."""
        data = self._run("inquiry", 1, 0x83, 255)
        position = 4
        found = ""
        while position + 4 <= len(data):
            kind, length = data[position + 1] & 0xF, data[position + 3]
            if kind == 3 and length == 16:
                found = data[position + 4 : position + 4 + length].hex()
            position += 4 + length
        return found

    def write_cache(self) -> bool:
        """The WCE bit of the caching mode page."""
        data = self._run("modesense6", 1, 0, 8, 0, 255)
        return bool(data[4 + data[3] + 2] & 0x04)

    def write_protected(self) -> bool:
        """The WP bit of MODE SENSE."""
        return bool(self._run("modesense6", 1, 0, 8, 0, 255)[2] & 0x80)

    def write(self, block: int, data: bytes) -> None:
        """WRITE (16) of whole blocks of 512 bytes. Raises CommandError."""
        self._run("write16", block, data, len(data), 512, 0, 0, 0, 0, 0)

    def read(self, block: int, size: int) -> bytes:
        """READ (16). Raises CommandError."""
        return self._run("read16", block, size, 512, 0, 0, 0, 0, 0)

    def _run(self, name: str, *arguments: Any) -> bytes:
        if not self._context:
            raise CommandError("closed")
        call = getattr(self._library, f"iscsi_{name}_sync")
        if name in ("read16", "write16"):
            arguments = (ctypes.c_uint64(arguments[0]), *arguments[1:])
        for _ in range(4):  # a new session begins with unit attentions
            task = call(self._context, 1, *arguments)
            if not task:
                raise ConnectionGone(self._error())
            head = task.contents
            status, key, ascq = head.status, head.sense.key, head.sense.ascq
            data = bytes(head.datain.data[: head.datain.size]) if head.datain.size > 0 else b""
            self._library.scsi_free_scsi_task(task)
            if status == 0:
                return data
            if status > _LAST_SCSI_STATUS:  # libiscsi's own: cancelled, error, timeout
                raise ConnectionGone(f"status {status:#x}")
            if not (status == _CHECK_CONDITION and key == 6):
                break
        raise CommandError(f"status {status:#x}, sense key {key:#x}, {ascq:#06x}: {self._error()}")

    def _error(self) -> str:
        return str(self._library.iscsi_get_error(self._context).decode())
