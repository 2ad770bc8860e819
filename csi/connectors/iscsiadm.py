"""The few commands of iscsiadm that the connector uses, and what its exit codes mean (open-iscsi, iscsi_err.h)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csi.connectors.portal import Portal
from csi.deadline import Deadline
from csi.errors import CommandFailed, DriverError, Unavailable
from csi.run import Result, Runner


@dataclass(frozen=True)
class ExitCode:
    """One exit code: what happened, what to do about it, and whether the same call may succeed a moment later."""

    meaning: str
    repair: str = ""
    retry: bool = False


#: A second login of the same record: the session is there already, sysfs decides whether it is alive.
EXISTS = 15
#: The target is not there or not for us. Right after a publish or a restart of tgtd it may come to be.
REFUSED = 19

EXIT_CODES: Mapping[int, ExitCode] = {
    0: ExitCode("done"),
    1: ExitCode("unknown error", "see iscsid's log"),
    2: ExitCode("no such session"),
    3: ExitCode("out of memory", "free memory on this node"),
    4: ExitCode("no connection to the portal", "check the network, its firewall, and tgtd on the SNODE", retry=True),
    5: ExitCode("login failed", "see iscsid's log and tgtd's"),
    6: ExitCode("the node database can't be read or written", "see that its file system has space", retry=True),
    7: ExitCode("iscsiadm does not understand the call", "report this as a defect of the driver"),
    8: ExitCode("the portal did not answer in time", "check the network and tgtd on the SNODE", retry=True),
    9: ExitCode("internal error of iscsid", "see iscsid's log", retry=True),
    10: ExitCode("logout failed", "see iscsid's log"),
    11: ExitCode("the target did not answer in time", "check tgtd on the SNODE", retry=True),
    12: ExitCode("kernel module iscsi_tcp is not usable", "run `modprobe iscsi_tcp` on the host"),
    13: ExitCode("not permitted", "run the driver as root, in a container with `privileged`"),
    14: ExitCode("the kernel's iSCSI module can't do this", "update the kernel"),
    15: ExitCode("the session exists already"),
    16: ExitCode("iscsid and iscsiadm do not understand each other", "use the host's iscsiadm, of one version"),
    18: ExitCode("iscsid can't talk to the kernel", "restart iscsid", retry=True),
    19: ExitCode("the target does not exist or refuses this node", "see that the volume is published to this node"),
    20: ExitCode("iscsid does not answer", "start it: `systemctl enable --now iscsid`", retry=True),
    21: ExitCode("no record or session"),
    22: ExitCode("iscsid can't read sysfs", "mount the host's /sys"),
    23: ExitCode("iscsid does not find the SCSI host", "restart iscsid"),
    24: ExitCode("CHAP failed, of the node or of the target", "unpublish the volume and publish it again"),
    28: ExitCode("the session is busy", "repeat later", retry=True),
    29: ExitCode("try again", retry=True),
    31: ExitCode("a child of iscsiadm died", "see iscsid's log"),
    32: ExitCode("the session is not connected", retry=True),
    33: ExitCode("the request timed out", retry=True),
}


def error_of(code: int, what: str) -> DriverError:
    """The error for an exit code; `what` starts the message."""
    known = EXIT_CODES.get(code)
    if known is None:
        return CommandFailed(f"{what}: iscsiadm ended with {code}, which no rule foresees; see iscsid's log")
    words = f"{what}: {known.meaning} (iscsiadm {code})" + (f"; {known.repair}" if known.repair else "; repeat later")
    return CommandFailed(words) if code == 7 else Unavailable(words)


class Iscsiadm:
    """Runs iscsiadm. Without locks of its own: the node database has one, and callers hold the volume's."""

    def __init__(self, runner: Runner, *, program: Sequence[str] = ("iscsiadm",), limit_seconds: float) -> None:
        """program: how to start it; where iscsid is the host's, its iscsiadm must be the host's too.

        limit_seconds: a call that takes longer hangs; iscsid itself gives a login up before.
        """
        self._runner = runner
        self._program = tuple(program)
        self._limit_seconds = limit_seconds

    def new_record(self, target: str, portal: Portal, deadline: Deadline) -> None:
        """Write a node record with the settings of iscsid.conf; no discovery, no session."""
        result = self._run("--mode=node", *_names(target, portal), "--op=new", deadline=deadline)
        if result.returncode != 0:
            raise error_of(result.returncode, f"node record of {target}")

    def login(self, target: str, portal: Portal, deadline: Deadline) -> int:
        """Log in by the record; returns the exit code, for which the caller has a table."""
        return self._run("--mode=node", *_names(target, portal), "--login", deadline=deadline).returncode

    def logout(self, session_number: int, deadline: Deadline) -> int:
        """End one session; returns the exit code. Needs no record."""
        return self._run("--mode=session", f"--sid={session_number}", "--logout", deadline=deadline).returncode

    def is_there(self) -> bool:
        """Whether it can be started. Starts no process."""
        return self._runner.has(self._program[0])

    def _run(self, *arguments: str, deadline: Deadline) -> Result:
        argv = [*self._program, *arguments]
        return self._runner.run(argv, deadline=deadline, ok=None, timeout=self._limit_seconds)


def _names(target: str, portal: Portal) -> tuple[str, ...]:
    return (f"--targetname={target}", f"--portal={portal.argument}")
