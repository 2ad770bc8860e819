"""The status codes that each RPC may end with: CSI's tables of errors, and the driver's documented additions."""

from grpc import StatusCode as Code

#: For any RPC: malformed requests, busy volumes, parts that are away, time that is over.
_ANY = frozenset({Code.OK, Code.INVALID_ARGUMENT, Code.ABORTED, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})

ALLOWED: dict[str, frozenset[Code]] = {
    "CreateVolume": _ANY | {Code.ALREADY_EXISTS, Code.RESOURCE_EXHAUSTED, Code.OUT_OF_RANGE},
    "DeleteVolume": _ANY | {Code.FAILED_PRECONDITION},
    "ControllerPublishVolume": _ANY
    | {Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED},
    "ControllerUnpublishVolume": _ANY | {Code.NOT_FOUND},
    "ValidateVolumeCapabilities": _ANY | {Code.NOT_FOUND},
    "ListVolumes": _ANY,
    "GetCapacity": _ANY,
    "ControllerGetVolume": _ANY | {Code.NOT_FOUND},
    "ControllerExpandVolume": _ANY
    | {Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE, Code.RESOURCE_EXHAUSTED},
    "ControllerGetCapabilities": _ANY,
    # The last two are the driver's: no filesystem and no permission to make one; a device too small for one.
    "NodeStageVolume": _ANY
    | {Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION, Code.DATA_LOSS, Code.OUT_OF_RANGE},
    "NodeUnstageVolume": _ANY | {Code.NOT_FOUND, Code.FAILED_PRECONDITION},
    "NodePublishVolume": _ANY | {Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION},
    "NodeUnpublishVolume": _ANY | {Code.NOT_FOUND, Code.FAILED_PRECONDITION},
    "NodeGetVolumeStats": _ANY | {Code.NOT_FOUND},
    "NodeGetVolumeHealth": _ANY | {Code.NOT_FOUND},
    "NodeExpandVolume": _ANY | {Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE, Code.DATA_LOSS},
    "NodeGetCapabilities": _ANY,
    "NodeGetInfo": _ANY,
    "GetPluginInfo": _ANY,
    "GetPluginCapabilities": _ANY,
    "Probe": _ANY | {Code.FAILED_PRECONDITION},
}
