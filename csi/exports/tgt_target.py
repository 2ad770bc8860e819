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

from csi.deadline import Deadline, wait_until
from csi.errors import CommandFailed, DriverError, Invalid, Timeout, Unavailable
from csi.exports import tgt_show
from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_compare import LUN, differences
from csi.exports.tgt_show import Target
from csi.exports.tgt_wire import Code, Refused, Vanished
from csi.log import get_logger
from csi.model import Publication, scsi_id_of

VENDOR = "SNODE"
#: The names of our accounts: one of these in tgtd that nothing uses is a left-over of ours.
OUR_ACCOUNT = re.compile(r"[nt][0-9a-f]{16}")

_PARAMETERS = {
    # A peer that answers no ping for 30 s is dropped, so that sessions of dead machines do not pile up.
    "nop_interval": "5",
    "nop_count": "6",
    # For nodes that demand checksums; tgtd still agrees to none with the others.
    "HeaderDigest": "CRC32C",
    "DataDigest": "CRC32C",
}
_ACTIVE = frozenset({Code.TARGET_ACTIVE, Code.LUN_ACTIVE})


#: What tgtd shows: targets by number and name.
Shown = Mapping[tuple[int, str], Target]


class Targets:
    """The targets of one tgtd. Thread-safe; concurrent work on one and the same target is the caller's to prevent."""

    def __init__(self, client: TgtClient) -> None:
        self.client = client
        self._log = get_logger("tgt")

    def all(self, deadline: Deadline) -> Shown:
        """Every target by number and name, foreign ones too."""
        return tgt_show.parse_targets(self.client.show_targets(deadline))

    def numbers(self, deadline: Deadline) -> Mapping[str, int]:
        """The number of every target by its name, foreign ones too; no initiator has a word in it."""
        return {name: tid for tid, name in tgt_show.parse_names(self.client.show_names(deadline)).items()}

    def build(self, publication: Publication, deadline: Deadline) -> None:
        """Make the target of a publication, which must be absent, all but its rule: nobody can log in yet.

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
        self._create_account(chap.user, chap.secret, deadline)
        self._create_account(chap.mutual_user, chap.mutual_secret, deadline)
        # One incoming account for the whole life of the target: tgtd does not stand a change of it.
        client.bind_account(tid, chap.user, outgoing=False, deadline=deadline)
        client.bind_account(tid, chap.mutual_user, outgoing=True, deadline=deadline)
        client.create_lun(tid, LUN, publication.device, deadline)
        client.update_lun(tid, LUN, _identity(publication), deadline)
        for key, value in _PARAMETERS.items():
            client.set_target(tid, key, value, deadline)

    def open(self, publication: Publication, deadline: Deadline) -> None:
        """Let the node in; the target must have been built and verified."""
        self.client.bind_initiator(publication.tid, publication.node.initiator, deadline)

    def verify(self, publication: Publication, shown: Shown, *, with_rule: bool) -> None:
        """Raises CommandFailed when tgtd took the steps but does not show what they say."""
        target = shown.get((publication.tid, publication.target))
        if target is None:
            raise Unavailable(f"target {publication.target}: vanished from tgtd while it was made; repeat the request")
        found = differences(publication, target, with_rule=with_rule)
        if found:
            raise CommandFailed(
                f"target {publication.target}: tgtd accepted every step but shows {found}; repeat the request, and if "
                "it stays so restart tgtd"
            )

    def reopen(self, publication: Publication, deadline: Deadline) -> None:
        """Let tgtd see the device's present size. The node's commands wait meanwhile and are repeated by its kernel.

        Without sessions only, so that no command is at work while the device is exchanged. While a target is offline
        it drops commands without a reply, so its connections are closed at once.
        """
        client, tid, name = self.client, publication.tid, publication.target
        self._check_device(publication)
        client.set_target(tid, "state", "offline", deadline)
        try:
            self._until(lambda: self._without_sessions(tid, name, deadline), f"target {name}: not reopened", deadline)
        except Exception:
            with suppress(DriverError):  # let the node go on with the old size; the error that counts is raised
                client.set_target(tid, "state", "ready", Deadline.after(5.0))
            raise
        # Should this fail, the target stays offline and the node waits; with its device closed it would get I/O errors.
        client.reopen_lun(tid, LUN, publication.device, deadline)
        client.set_target(tid, "state", "ready", deadline)
        self.verify(publication, self.all(deadline), with_rule=True)

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
                with _gone_is_fine():
                    self.client.delete_account(user, deadline)

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
        """Go as far as it goes now; True when the target is gone. Whether it is gone is tgtd's word alone: its list of
        names, and its refusals while there are sessions or commands."""
        tid = self.numbers(deadline).get(name)
        if tid is None:
            return True
        target = self.all(deadline).get((tid, name))
        if target is None or target.problem or not self._unbind_all(target, deadline):
            # Its rules can't be read, so the door is shut in the other way.
            self.client.set_target(tid, "state", "offline", deadline)
        if target is not None:
            users |= {user for user in (*target.incoming, *target.outgoing) if OUR_ACCOUNT.fullmatch(user)}
        if self._close(tid, deadline):
            return False
        try:
            for lun in [unit.number for unit in target.luns if unit.number] if target is not None else []:
                with _gone_is_fine():
                    self.client.delete_lun(tid, lun, deadline)
            with _gone_is_fine():
                self.client.delete_target(tid, name, deadline)
        except Refused as error:
            if error.code in _ACTIVE:
                return False
            raise
        return name not in self.numbers(deadline)

    def _unbind_all(self, target: Target, deadline: Deadline) -> bool:
        """Remove every rule; False when one is shown that can't be. Whoever is in is taken for a rule as well."""
        clean = True
        for rule in dict.fromkeys([*target.acl, *(nexus.initiator for nexus in target.nexuses)]):
            try:
                with _gone_is_fine():
                    self.client.unbind(target.tid, rule, deadline)
            except Invalid:
                clean = False
        return clean

    def _without_sessions(self, tid: int, name: str, deadline: Deadline) -> bool:
        """Close every connection of a target; True when there is no session any more, so no command in flight."""
        if self._close(tid, deadline):
            return False
        target = self.all(deadline).get((tid, name))
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

    def _create_account(self, user: str, secret: str, deadline: Deadline) -> None:
        try:
            self.client.create_account(user, secret, deadline)
        except Refused as error:
            if error.code != Code.USER_EXISTS:
                raise
            # Left over from a call that was cut off. Its secret can't be read back, so it is not trusted.
            self.drop_accounts([user], deadline)
            self.client.create_account(user, secret, deadline)

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
    with suppress(Vanished):
        yield


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
