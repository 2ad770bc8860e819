"""One target of tgtd, from nothing to logins and back: the steps, their order, and how each is verified.

The order while making (target, accounts, LUN, identity, read back, rule last) and while removing (rule, connections,
sessions gone, LUN, target, accounts last) sees to it that at no moment a login is possible which the publication does
not allow: a target without a rule lets nobody in, and a rule never stands without the account.
"""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from csi.deadline import Deadline, wait_until
from csi.errors import CommandFailed, DriverError, Timeout, Unavailable
from csi.exports import tgt_show
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_show import Target, shown_mb
from csi.exports.tgt_wire import Code, Refused
from csi.log import get_logger
from csi.model import Publication, scsi_id_of

#: The LUN of every published volume. LUN 0 is tgtd's controller.
LUN = 1
VENDOR = "SNODE"
#: The names of our accounts: one of these in tgtd that nothing uses is a left-over of ours.
OUR_ACCOUNT = re.compile(r"[nt][0-9a-f]{16}")

# A peer that answers no ping for 30 s is dropped, so that sessions of dead machines do not pile up.
_NOP = {"nop_interval": "5", "nop_count": "6"}
_GONE = frozenset({Code.NO_TARGET, Code.NO_LUN, Code.NO_SESSION, Code.NO_CONNECTION, Code.NO_ACL, Code.NO_USER})
_ACTIVE = frozenset({Code.TARGET_ACTIVE, Code.LUN_ACTIVE})


@dataclass(frozen=True)
class Differences:
    """How a target differs from its publication."""

    remake: tuple[str, ...]  # it must be made anew
    reopen: tuple[str, ...]  # its device must be opened again: a grown or an interrupted one

    def __bool__(self) -> bool:
        return bool(self.remake or self.reopen)


def differences(publication: Publication, target: Target, *, with_rule: bool = True) -> Differences:
    """Compare in all points that decide who reaches which data. with_rule: the access rule must stand already."""
    lun = target.lun(LUN)
    want: dict[str, object] = {
        "number": publication.tid,
        "driver": "iscsi",
        "LUNs": [0, LUN],
        "accounts": (publication.chap.user,),
        "outgoing account": (publication.chap.mutual_user,),
        "rules": (publication.node.initiator,) if with_rule else (),
    }
    have: dict[str, object] = {
        "number": target.tid,
        "driver": target.driver,
        "LUNs": [unit.number for unit in target.luns],
        "accounts": target.incoming,
        "outgoing account": target.outgoing,
        "rules": target.acl,
    }
    reopen: dict[str, str] = {}
    if lun is not None:
        want |= {
            "type": "disk",
            "SCSI id": scsi_id_of(publication.volume_id),
            "serial": publication.volume_id,
            "read-only": publication.readonly,
            "removable": False,
            "thin": False,
            "store": ("rdwr", "direct"),
        }
        have |= {
            "type": lun.type,
            "SCSI id": lun.scsi_id,
            "serial": lun.scsi_sn,
            "read-only": lun.readonly,
            "removable": lun.removable,
            "thin": lun.thin,
            "store": (lun.store, lun.flags),
        }
        if lun.path:  # none is open after an interrupted growth
            want["device"], have["device"] = os.fspath(publication.device), lun.path
        if not lun.online or not lun.path:
            reopen["device"] = "not open"
        # Volumes never shrink, so more than the record says is a growth whose record is not written yet.
        elif lun.size_mb < shown_mb(publication.size_bytes):
            reopen["size"] = f"{lun.size_mb} MB, not {shown_mb(publication.size_bytes)} MB"
    if target.state != "ready":
        reopen["state"] = target.state
    return Differences(
        remake=tuple(f"{key} {have[key]!r}, not {value!r}" for key, value in want.items() if have[key] != value),
        reopen=tuple(f"{key} {value}" for key, value in reopen.items()),
    )


class Targets:
    """The targets of one tgtd. Thread-safe; concurrent work on one and the same target is the caller's to prevent."""

    def __init__(self, client: TgtClient) -> None:
        self.client = client
        self._log = get_logger("tgt")

    def all(self, deadline: Deadline) -> Mapping[str, Target]:
        """Every target by name, foreign ones too."""
        return tgt_show.parse_targets(self.client.show_targets(deadline))

    def find(self, name: str, deadline: Deadline) -> Target | None:
        """The target of this name."""
        return self.all(deadline).get(name)

    def make(self, publication: Publication, deadline: Deadline) -> None:
        """Make the target of a publication, which must be absent; opened for logins by the last step.

        Raises Unavailable when the device is not there or the target's number is taken.
        """
        client, tid, chap = self.client, publication.tid, publication.chap
        self._check_device(publication)
        try:
            client.create_target(tid, publication.target, deadline)
        except Refused as error:
            if error.code != Code.TARGET_EXISTS:
                raise
            raise Unavailable(
                f"target {publication.target}: its number {tid} is taken in tgtd by another target; unpublish volume "
                f"{publication.volume_id} and publish it again, which takes another number"
            ) from error
        for user, secret in ((chap.user, chap.secret), (chap.mutual_user, chap.mutual_secret)):
            # Left over from a call that was cut off. Its secret can't be read back, so it is not trusted.
            self._drop_account(user, deadline)
            client.create_account(user, secret, deadline)
        # One incoming account for the whole life of the target: tgtd does not stand a change of it.
        client.bind_account(tid, chap.user, outgoing=False, deadline=deadline)
        client.bind_account(tid, chap.mutual_user, outgoing=True, deadline=deadline)
        client.create_lun(tid, LUN, publication.device, deadline)
        client.update_lun(tid, LUN, _identity(publication), deadline)
        for key, value in _NOP.items():
            client.set_target(tid, key, value, deadline)
        self._verify(publication, deadline, with_rule=False)
        client.bind_initiator(tid, publication.node.initiator, deadline)
        self._verify(publication, deadline)

    def reopen(self, publication: Publication, deadline: Deadline) -> None:
        """Let tgtd see the device's present size. The node's commands wait meanwhile and are repeated by its kernel.

        Without sessions only, so that no command is at work while the device is exchanged. While a target is offline
        it drops commands without a reply, so its connections are closed at once.
        """
        client, tid, name = self.client, publication.tid, publication.target
        self._check_device(publication)
        client.set_target(tid, "state", "offline", deadline)
        try:
            self._until(lambda: self._close_all(tid, name, deadline), f"target {name}: not reopened", deadline)
        except Exception:
            with suppress(DriverError):  # let the node go on with the old size; the error that counts is raised
                client.set_target(tid, "state", "ready", Deadline.after(5.0))
            raise
        # Should this fail, the target stays offline and the node waits; with its device closed it would get I/O errors.
        client.reopen_lun(tid, LUN, publication.device, deadline)
        client.set_target(tid, "state", "ready", deadline)
        self._verify(publication, deadline)

    def fence(self, name: str, accounts: Iterable[str], deadline: Deadline) -> None:
        """Remove a target so that nobody reaches its device any more and nothing is in flight; absent is fine.

        accounts: of the publication; those of ours that the target shows are removed too. Raises Timeout when commands
        in flight do not end in time: the target then lets in nobody, and a repetition goes on.
        """
        users = set(accounts)
        self._until(lambda: self._fence_step(name, users, deadline), f"target {name}: not removed", deadline)
        self.drop_accounts(users, deadline)

    def drop_accounts(self, users: Collection[str], deadline: Deadline) -> None:
        """Delete accounts; absent is fine. One that a target has bound stays: without it that target would be open."""
        if users:
            bound = {user for target in self.all(deadline).values() for user in (*target.incoming, *target.outgoing)}
            for user in sorted(set(users) - bound):
                self._drop_account(user, deadline)

    def close_foreign(self, target: Target, initiator: str, deadline: Deadline) -> None:
        """Close the sessions of anybody else than the initiator: a session outlives the rule that let it in."""
        foreign = {nexus.sid for nexus in target.nexuses if nexus.initiator != initiator}
        if foreign:
            self._close(target.tid, deadline, only=foreign)
            self._log.warning("closed sessions that no publication allows", target=target.name, sessions=len(foreign))

    def _until(self, step: Callable[[], bool], undone: str, deadline: Deadline) -> None:
        """Repeat a step until it has done all. Its wait is for the disk: closed connections leave commands behind."""
        try:
            wait_until(step, deadline, what="commands in flight")
        except Timeout as error:
            raise Timeout(
                f"{undone} in time: commands of the node are in flight on a slow disk, or tgtd is slow; repeat the "
                "request, it goes on from here"
            ) from error

    def _fence_step(self, name: str, users: set[str], deadline: Deadline) -> bool:
        """Go as far as it goes now; True when the target is gone.

        What is there, and which number it has, is taken from the list in which no word is an initiator's.
        """
        tid = self._number_of(name, deadline)
        if tid is None:
            return True
        target = self.find(name, deadline)
        if target is not None:
            users |= {user for user in (*target.incoming, *target.outgoing) if OUR_ACCOUNT.fullmatch(user)}
            for rule in target.acl:
                with _gone_is_fine():
                    self.client.unbind(tid, rule, deadline)
        if not self._close_all(tid, name, deadline):
            return False
        try:
            for lun in target.luns if target is not None else ():
                if lun.number:
                    with _gone_is_fine():
                        self.client.delete_lun(tid, lun.number, deadline)
            with _gone_is_fine():
                self.client.delete_target(tid, name, deadline)
        except Refused as error:
            if error.code in _ACTIVE:
                return False
            raise
        return self._number_of(name, deadline) is None

    def _close_all(self, tid: int, name: str, deadline: Deadline) -> bool:
        """Close every connection of a target; True when there is no session any more."""
        if self._close(tid, deadline):
            return False
        target = self.find(name, deadline)
        return target is None or not target.nexuses

    def _close(self, tid: int, deadline: Deadline, *, only: Collection[int] | None = None) -> int:
        """Close the connections of a target, or of some of its sessions; returns how many there were."""
        count = 0
        with _gone_is_fine():
            for connection in tgt_show.parse_connections(self.client.show_connections(tid, deadline)):
                if only is None or connection.sid in only:
                    count += 1
                    with _gone_is_fine():
                        self.client.close_connection(tid, connection.sid, connection.cid, deadline)
        return count

    def _number_of(self, name: str, deadline: Deadline) -> int | None:
        names = tgt_show.parse_names(self.client.show_names(deadline))
        return next((tid for tid, other in names.items() if other == name), None)

    def _drop_account(self, user: str, deadline: Deadline) -> None:
        with _gone_is_fine():
            self.client.delete_account(user, deadline)

    def _verify(self, publication: Publication, deadline: Deadline, *, with_rule: bool = True) -> None:
        target = self.find(publication.target, deadline)
        if target is None:
            raise Unavailable(f"target {publication.target}: vanished from tgtd while it was made; repeat the request")
        found = differences(publication, target, with_rule=with_rule)
        if found:
            shown = ", ".join(found.remake + found.reopen)
            raise CommandFailed(
                f"target {publication.target}: tgtd accepted every step but shows {shown}; "
                "repeat the request, and if it stays so restart tgtd"
            )

    def _check_device(self, publication: Publication) -> None:
        device = publication.device
        try:
            fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                mode, size = os.fstat(fd).st_mode, os.lseek(fd, 0, os.SEEK_END)
            finally:
                os.close(fd)
        except OSError as error:
            raise Unavailable(
                f"volume {publication.volume_id}: its device {device} can't be opened ({error.strerror}); "
                "see that its pool is there, then repeat"
            ) from error
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)) or size < publication.size_bytes:
            raise Unavailable(
                f"volume {publication.volume_id}: {device} has {size} bytes, its record says {publication.size_bytes}; "
                "see that its pool is whole (lvs -a), then repeat"
            )


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except Refused as error:
        if error.code not in _GONE:
            raise


def _identity(publication: Publication) -> dict[str, str]:
    """What an initiator reads by INQUIRY. tgtd's own default is alike on every SNODE, so that multipath would join
    volumes of different SNODEs. Thin provisioning off: what it promises of unmapped blocks does not hold on every
    store. The write cache stays reported as on, so that initiators flush."""
    return {
        "scsi_id": scsi_id_of(publication.volume_id),
        "scsi_sn": publication.volume_id,
        "vendor_id": VENDOR,
        "product_id": "volume",
        "product_rev": "1",
        "thin_provisioning": "0",
        "readonly": str(int(publication.readonly)),
    }
