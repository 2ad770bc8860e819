"""The closed list of errors that the driver raises on purpose.

Each message names the object and the next step. `rpc/status.py` maps every class to one gRPC status code; a class that
is not in this file reaches the caller as INTERNAL and is a defect.
"""


class DriverError(Exception):
    """Base of all errors of the driver."""


class Invalid(DriverError):
    """A field of the request is malformed or not supported in this form."""


class NotFound(DriverError):
    """The volume, pool, node or path does not exist."""


class Conflict(DriverError):
    """The object exists already, with other properties than the request asks for."""


class OutOfRange(DriverError):
    """A size can't be had: negative, above the limit, below the minimum, or limit smaller than required."""


class NoSpace(DriverError):
    """The pool, its metadata, or another bounded resource is used up."""


class InUse(DriverError):
    """The state of the object forbids the request: published, staged, mounted, held elsewhere."""


class Busy(DriverError):
    """Another request for the same object is under way; the caller repeats later."""


class Stale(DriverError):
    """A token of the caller no longer means anything; the caller starts over."""


class Timeout(DriverError):
    """The time of the request is used up; what was begun is completed by a repetition."""


class Forbidden(DriverError):
    """The caller's certificate does not allow the request."""


class Unsupported(DriverError):
    """The driver can't do this at all, in any form."""


class Unavailable(DriverError):
    """A part that the driver needs (tgtd, iscsid, a portal, a device) does not answer now."""


class DataLoss(DriverError):
    """What stands on the device is not what should; only a human may decide, nothing is written."""


class CommandFailed(DriverError):
    """An external command failed in a way that no rule foresees. The message has the command and its last words."""
