"""A storage lab on one machine: real kernels for one SNODE and its CNODEs, and the faults that kill storage.

    with Lab() as lab:
        snode = lab.guest("snode", memory="512M", disks=[Disk("4G")])
        cnode = lab.guest("cnode1")
        lab.boot_all()
        print(snode.sh("lsblk"))
        cnode.kill9()  # a power cut

README.md beside this file says more.
"""

from .channel import Command
from .disk import Disk
from .errors import CommandFailed, GuestGone, LabError
from .guest import Guest
from .lab import Lab

__all__ = ["Command", "CommandFailed", "Disk", "Guest", "GuestGone", "Lab", "LabError"]
