"""Which gRPC code each error of the driver becomes."""

import grpc

from csi import errors

#: The trailing metadata of a Probe that is answered with ready=false: why, in UTF-8.
PROBLEMS = "snode-problems-bin"

#: One row for each class; a subclass without a row of its own takes its nearest ancestor's.
CODES: dict[type[errors.DriverError], grpc.StatusCode] = {
    errors.Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Conflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.NoSpace: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.InUse: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Busy: grpc.StatusCode.ABORTED,
    errors.Stale: grpc.StatusCode.ABORTED,
    errors.Timeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.CommandFailed: grpc.StatusCode.INTERNAL,
    errors.DriverError: grpc.StatusCode.INTERNAL,
}


def code_of(error: errors.DriverError) -> grpc.StatusCode:
    """The code of an error: the first class of its method resolution order that has a row."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    raise AssertionError("unreachable: DriverError itself has a row")
