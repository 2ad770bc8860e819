"""Whether this machine can be an iSCSI initiator: its name, iscsid, the kernel module."""

import re
import socket
from pathlib import Path

from csi.connectors.iscsiadm import Iscsiadm
from csi.deadline import Deadline
from csi.errors import DriverError, Timeout, Unavailable
from csi.model import ISCSI_NAME
from csi.run import Runner

INITIATOR_FILE = Path("/etc/iscsi/initiatorname.iscsi")
#: iscsid's management socket, in the abstract namespace (without its leading NUL).
ISCSID_SOCKET = "ISCSIADM_ABSTRACT_NAMESPACE"

_LINE = re.compile(r"^\s*InitiatorName\s*=\s*(\S+)\s*$", re.MULTILINE)
#: Names that come with images and examples. Two nodes of one name throw each other out of the target for ever.
_PLACEHOLDER = re.compile(r"(?i)(example|default|template|changeme|golden|localhost|initiator|([0-9a-f])\2{5,})$")
_NEW_NAME = "write a new one with `echo InitiatorName=$(iscsi-iname)` and restart iscsid"


def initiator_name(path: Path = INITIATOR_FILE) -> str:
    """The iSCSI name of this node; raises Unavailable when there is none or it can't be used, with the repair."""
    try:
        text = path.read_text()
    except OSError as error:
        raise Unavailable(
            f"{path}: no initiator name ({error.strerror}) -> install open-iscsi or {_NEW_NAME}"
        ) from error
    found = _LINE.findall(text)
    if len(found) != 1:
        raise Unavailable(f"{path}: has {len(found)} lines InitiatorName=, wanted is one -> {_NEW_NAME}")
    name = str(found[0])
    if len(name) > 223 or not ISCSI_NAME.fullmatch(name):
        raise Unavailable(f"{path}: {name[:230]!r} is not an iSCSI name in lower case that tgt accepts -> {_NEW_NAME}")
    return name


class Initiator:
    """The checks of Probe and doctor. They change nothing; the connection to iscsid starts it under systemd."""

    def __init__(
        self,
        iscsiadm: Iscsiadm,
        runner: Runner,
        *,
        sysfs: Path = Path("/sys"),
        initiator_file: Path = INITIATOR_FILE,
        iscsid_socket: str = ISCSID_SOCKET,
    ) -> None:
        self._iscsiadm = iscsiadm
        self._runner = runner
        self._sysfs = sysfs
        self._initiator_file = initiator_file
        self._iscsid_socket = iscsid_socket
        self._module_seen = False

    def problems(self, deadline: Deadline) -> list[str]:
        """See Connector.problems. Starts no process once the kernel module was found."""
        found = []
        if not self._iscsiadm.is_there():
            found.append("iscsiadm is missing -> install the package open-iscsi")
        if reason := self._no_iscsid():
            found.append(f"iscsid does not answer ({reason}) -> start it: `systemctl enable --now iscsid`")
        self._module_seen = self._module_seen or self._module_usable(deadline)
        if not self._module_seen:
            found.append(
                "kernel module iscsi_tcp is not loaded and modprobe does not find it -> install the kernel's full "
                "module package, then `modprobe iscsi_tcp` (with a container: on the host)"
            )
        try:
            name = initiator_name(self._initiator_file)
        except DriverError as error:
            found.append(str(error))
        else:
            if _PLACEHOLDER.search(name):
                found.append(f"initiator name {name} looks like one that came with an image, not unique -> {_NEW_NAME}")
        return found

    def _no_iscsid(self) -> str:
        """Why iscsid can't be reached; "" when it can. `iscsiadm` itself would try to start it, and wait."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(2.0)
            try:
                client.connect("\0" + self._iscsid_socket)
            except OSError as error:
                return error.strerror or str(error)
        return ""

    def _module_usable(self, deadline: Deadline) -> bool:
        """True if the module is there or iscsiadm can load it at the first login."""
        if (self._sysfs / "class" / "iscsi_transport" / "tcp").exists():
            return True
        argv = ["modprobe", "--dry-run", "--quiet", "iscsi_tcp"]
        try:
            return self._runner.run(argv, deadline=deadline, read_only=True, ok=None).returncode == 0
        except (Unavailable, Timeout):
            return False
