"""An iSCSI initiator in this process, by the library libiscsi: as many CNODEs as a test wants, and no guest for each.

The socket of a session is made by the thread that opens it, so open it in the lab's network (`lab.network.inside`); any
thread may use it afterwards. The library's own waiting calls are not used: they leave pointers to their ended stack
frames in a session that breaks.
"""

import ctypes
import ctypes.util
import select
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Self

from csi.model import Chap, IscsiPath

from .errors import LabError

SECTOR = 512
#: The most bytes of a write: they go in the command itself. libiscsi before 1.20 stops when its answer to a ping waits
#: behind data that goes apart (libiscsi's pull request 328).
WRITE = 8 << 10
#: The most bytes of a read.
CHUNK = 256 << 10

_DISCOVERY, _NORMAL = 1, 2  # enum iscsi_session_type
_NONE, _READ, _WRITE = 0, 1, 2  # enum scsi_xfer_dir
_GOOD = 0
_DEVICE_IDENTIFICATION = 0x83
# A lost connection always has something to do.
_MOST_AT_ONCE = 64
_NAA = 3

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class IscsiError(LabError):
    """The target refused, or is not there (any more); the message has libiscsi's words."""


class _Data(ctypes.Structure):
    """struct iscsi_data"""

    _fields_ = (("size", ctypes.c_size_t), ("data", ctypes.c_char_p))


class _Found(ctypes.Structure):
    """The beginning of struct iscsi_discovery_address"""


_Found._fields_ = [("next", ctypes.POINTER(_Found)), ("target_name", ctypes.c_char_p)]

_INT, _TEXT, _POINTER = ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "iscsi_create_context": (_POINTER, [_TEXT]),
    "iscsi_destroy_context": (_INT, [_POINTER]),
    "iscsi_get_error": (_TEXT, [_POINTER]),
    "iscsi_set_targetname": (_INT, [_POINTER, _TEXT]),
    "iscsi_set_session_type": (_INT, [_POINTER, _INT]),
    "iscsi_set_initiator_username_pwd": (_INT, [_POINTER, _TEXT, _TEXT]),
    "iscsi_set_target_username_pwd": (_INT, [_POINTER, _TEXT, _TEXT]),
    "iscsi_set_noautoreconnect": (None, [_POINTER, _INT]),
    "iscsi_get_fd": (_INT, [_POINTER]),
    "iscsi_which_events": (_INT, [_POINTER]),
    "iscsi_service": (_INT, [_POINTER, _INT]),
    "iscsi_connect_async": (_INT, [_POINTER, _TEXT, _Callback, _POINTER]),
    "iscsi_login_async": (_INT, [_POINTER, _Callback, _POINTER]),
    "iscsi_discovery_async": (_INT, [_POINTER, _Callback, _POINTER]),
    "iscsi_full_connect_async": (_INT, [_POINTER, _TEXT, _INT, _Callback, _POINTER]),
    "iscsi_logout_async": (_INT, [_POINTER, _Callback, _POINTER]),
    "iscsi_scsi_command_async": (
        _INT,
        [_POINTER, _INT, _POINTER, _Callback, ctypes.POINTER(_Data), _POINTER],
    ),
    "scsi_create_task": (_POINTER, [_INT, _TEXT, _INT, _INT]),
    "scsi_free_scsi_task": (None, [_POINTER]),
    "scsi_task_add_data_in_buffer": (_INT, [_POINTER, _INT, _POINTER]),
}


@cache
def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("iscsi")
    if name is None:
        raise LabError("the library libiscsi is missing: apt-get install libiscsi-bin")
    library = ctypes.CDLL(name)
    for function, (result, arguments) in _FUNCTIONS.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


class _Context:
    """One connection of the library, and the waiting for its answers."""

    def __init__(self, *, initiator: str, kind: int, seconds: float) -> None:
        self._library = _library()
        self._seconds = seconds
        self.stuck = False  # an answer may still come, to a buffer that is gone: nothing more may be asked
        self._outcome: int | None = None
        self._keep: Callable[[int], None] | None = None
        # The library calls it for whatever is open when the context goes: it lives as long as this object.
        self._callback = _Callback(self._ended)
        self._context: int | None = self._library.iscsi_create_context(initiator.encode())
        self.set("iscsi_set_session_type", kind)
        # A session that was fenced must fail, not come back.
        self._library.iscsi_set_noautoreconnect(self._context, 1)

    def close(self) -> None:
        """Close the connection, without a logout."""
        if self._context:
            self._library.iscsi_destroy_context(self._context)
            self._context = None

    def set(self, function: str, *arguments: object) -> None:
        """One of the library's functions that answer at once."""
        if getattr(self._library, function)(self._context, *arguments):
            raise self._error(function)

    def ask(
        self,
        function: str,
        *arguments: object,
        data_out: object = None,
        keep: Callable[[int], None] | None = None,
    ) -> None:
        """One of the library's functions that answer later; returns when it did, raises IscsiError if it failed.

        data_out: what stands behind the callback among its arguments; keep: called with the address of the answer.
        """
        if not self._context:
            raise IscsiError(f"{function}: the session is closed")
        self._outcome, self._keep = None, keep
        behind = (data_out, None) if function == "iscsi_scsi_command_async" else (None,)
        if getattr(self._library, function)(self._context, *arguments, self._callback, *behind):
            raise self._error(function)
        ends = time.monotonic() + self._seconds
        while (outcome := self._answer()) is None:
            self._serve(function)
            if self._answer() is None and time.monotonic() > ends:
                self.stuck = True
                raise IscsiError(f"{function}: no answer within {self._seconds:.0f} s")
        if outcome != _GOOD:
            raise self._error(f"{function}: status {outcome:#x}")
        # The answer to a ping that is left for later would come behind the next command, and the library stop at that.
        self.settle()

    def _answer(self) -> int | None:
        """What the callback noted."""
        return self._outcome

    def settle(self) -> None:
        """Answer the target's pings, until there is nothing to do. That the session is lost is told by what is next."""
        with suppress(IscsiError):
            for _ in range(_MOST_AT_ONCE):
                if self.stuck or not self._context or not self._serve("a ping", wait_ms=0):
                    return

    def _serve(self, function: str, *, wait_ms: int = 200) -> bool:
        """Let the library work, if it is its turn within this time; whether it was."""
        descriptor = self._library.iscsi_get_fd(self._context)
        if descriptor < 0:
            raise self._error(f"{function}: the connection is gone")
        poll = select.poll()
        poll.register(descriptor, self._library.iscsi_which_events(self._context))
        events = sum(ready for _, ready in poll.poll(wait_ms))
        if events & select.POLLIN:
            # What the target said before it closed the connection comes first: the library would not read it.
            events &= select.POLLIN | select.POLLOUT
        if self._library.iscsi_service(self._context, events) < 0 and self._outcome is None:
            raise self._error(function)
        return bool(events)

    def _ended(self, _context: int, status: int, data: int | None, _private: int | None) -> None:
        if self._outcome is None:
            if status == _GOOD and data and self._keep:
                self._keep(data)
            self._outcome = status

    def _error(self, what: str) -> IscsiError:
        return IscsiError(f"{what}: {(self._library.iscsi_get_error(self._context) or b'').decode(errors='replace')}")


def find_targets(portal: str, *, initiator: str, seconds: float = 20) -> list[str]:
    """The names of the targets that a portal tells this initiator of (SendTargets)."""
    names: list[str] = []

    def keep(address: int) -> None:
        found = ctypes.cast(address, ctypes.POINTER(_Found))
        while found:
            names.append(found.contents.target_name.decode())
            found = found.contents.next

    context = _Context(initiator=initiator, kind=_DISCOVERY, seconds=seconds)
    try:
        context.ask("iscsi_connect_async", portal.encode())
        context.ask("iscsi_login_async")
        context.ask("iscsi_discovery_async", keep=keep)
    finally:
        context.close()
    return names


class Session:
    """A session with one LUN, from login to logout. Sizes are bytes."""

    def __init__(self, path: IscsiPath, *, initiator: str, chap: Chap | None, seconds: float = 20) -> None:
        """Logs in; chap: the pair for both directions, None for a login without any proof.

        seconds: for each answer. Raises IscsiError when the target lets us not in, or does not prove itself.
        """
        self._lun = path.lun
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._pump = threading.Thread(target=self._answer_pings, name="libiscsi", daemon=True)
        self._context = _Context(initiator=initiator, kind=_NORMAL, seconds=seconds)
        try:
            self._context.set("iscsi_set_targetname", path.target.encode())
            if chap:
                self._context.set("iscsi_set_initiator_username_pwd", chap.user.encode(), chap.secret.encode())
                self._context.set(
                    "iscsi_set_target_username_pwd", chap.mutual_user.encode(), chap.mutual_secret.encode()
                )
            self._context.ask("iscsi_full_connect_async", path.portal.encode(), path.lun)
        except IscsiError:
            self._context.close()
            raise
        self._pump.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Log out, or just close the connection if that is not to be had."""
        self._closed.set()
        self._pump.join()
        if not self._context.stuck:
            with suppress(IscsiError):
                self._context.ask("iscsi_logout_async")
        self._context.close()

    def scsi_id(self) -> str:
        """The NAA name of the device (VPD page 0x83), as hex digits: the longest one, as Linux takes it for `naa.…`."""
        page = self._command(struct.pack(">BBBHB", 0x12, 1, _DEVICE_IDENTIFICATION, 255, 0), read=255)
        at, end, names = 4, 4 + int.from_bytes(page[2:4]), [b""]
        while at < end:
            length = page[at + 3]
            if page[at + 1] & 0x0F == _NAA:
                names.append(page[at + 4 : at + 4 + length])
            at += 4 + length
        return max(names, key=len).hex()

    def size_bytes(self) -> int:
        """READ CAPACITY(16)."""
        answer = self._command(struct.pack(">BBQIBB", 0x9E, 0x10, 0, 32, 0, 0), read=32)
        last, sector = struct.unpack(">QI", answer[:12])
        return int((last + 1) * sector)

    def read(self, offset: int, length: int) -> bytes:
        """READ(16) of at most CHUNK bytes; offset and length are multiples of SECTOR."""
        return self._command(_transfer(0x88, offset, length), read=length)

    def write(self, offset: int, data: bytes) -> None:
        """WRITE(16) of at most WRITE bytes; likewise."""
        assert len(data) <= WRITE
        self._command(_transfer(0x8A, offset, len(data)), write=data)

    def flush(self) -> None:
        """SYNCHRONIZE CACHE(16) of everything."""
        self._command(_transfer(0x91, 0, 0))

    def _answer_pings(self) -> None:
        """tgtd drops who does not answer for 30 s, whether he has something to do or not."""
        while not self._closed.wait(1):
            with self._lock:
                self._context.settle()

    def _command(self, cdb: bytes, *, read: int = 0, write: bytes = b"") -> bytes:
        library = _library()
        direction = _READ if read else _WRITE if write else _NONE
        task = library.scsi_create_task(len(cdb), cdb, direction, read or len(write))
        buffer = ctypes.create_string_buffer(read)
        if read:
            library.scsi_task_add_data_in_buffer(task, read, ctypes.addressof(buffer))
        data = ctypes.byref(_Data(len(write), write)) if write else None
        # Freed only after its end: what has no answer may still be the library's.
        with self._lock:
            self._context.ask("iscsi_scsi_command_async", self._lun, task, data_out=data)
        library.scsi_free_scsi_task(task)
        return buffer.raw


def _transfer(operation: int, offset: int, length: int) -> bytes:
    return struct.pack(">BBQIBB", operation, 0, offset // SECTOR, length // SECTOR, 0, 0)
