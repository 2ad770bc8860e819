"""SNODE CSI: volumes from your own disks, by LVM and iSCSI, for containers."""

import os

__version__ = "0.1.0"

# The driver forks (LVM, iscsiadm, mkfs, mount) beside gRPC threads; gRPC's own fork handlers must stay out of it.
# It has to be set before grpc is imported for the first time.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
