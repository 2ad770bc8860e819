"""The requests to tgtd that the driver makes, a method each.

Every value is checked against a strict grammar before it is sent, because tgtd itself hardly checks: a comma ends a
value and begins another parameter, and a request without its text can end the daemon.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from csi.deadline import Deadline
from csi.errors import Invalid
from csi.exports.tgt_wire import ALL_TARGETS, Mode, Op, Wire
from csi.model import ISCSI_NAME
from csi.run import Boundary, no_boundary

_TARGET_NAME = re.compile(r"[a-z0-9:.-]{1,223}")
_ACCOUNT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{12,64}")
_RULE = re.compile(r"[!-+\--~]{1,255}")  # only to remove it: printable, no comma
_PATH = re.compile(r"/[A-Za-z0-9/_.+@:-]{0,999}")
_VALUE = re.compile(r"[A-Za-z0-9_.-]{1,36}")
_KEY = re.compile(r"[A-Za-z_]{1,32}")


def check_target_name(name: str) -> str:
    """Raises Invalid when tgtd would not take the name as it is."""
    return _checked(_TARGET_NAME, name, "target name")


def check_initiator(name: str) -> str:
    """Raises Invalid when it is not an iSCSI name that a rule may hold."""
    if len(name) > 223:
        raise Invalid(f"initiator name {name[:40]!r}…: longer than 223 characters")
    return _checked(ISCSI_NAME, name, "initiator name")


def check_account(user: str) -> str:
    """Raises Invalid when it can't be an account name."""
    return _checked(_ACCOUNT, user, "CHAP user")


def check_secret(secret: str, user: str) -> str:
    """Raises Invalid when it can't be a secret; the message never holds the secret."""
    if not _SECRET.fullmatch(secret):
        raise Invalid(f"CHAP secret of {user}: must be 12 to 64 letters, digits, '_' or '-'")
    return secret


def check_path(path: Path) -> str:
    """Raises Invalid when tgtd could misread the path of a backing device."""
    return _checked(_PATH, os.fspath(path), "device path")


def _checked(grammar: re.Pattern[str], value: str, what: str) -> str:
    if not grammar.fullmatch(value):
        raise Invalid(f"{what} {value[:80]!r}: tgtd can't take it; allowed is {grammar.pattern}")
    return value


def _checked_tid(tid: int) -> int:
    if not 0 < tid < 1 << 31:
        raise Invalid(f"target number {tid}: must be 1 to 2147483647")
    return tid


class TgtClient:
    """Thread-safe: it keeps no connection and no state. Methods raise what Wire.ask raises, and Invalid for a value
    outside of the grammar."""

    def __init__(self, path: Path, *, boundary: Boundary = no_boundary, call_seconds: float = 30.0) -> None:
        """path: tgtd's management socket. call_seconds: the longest wait for one reply."""
        self._wire = Wire(path, call_seconds=call_seconds)
        self._boundary = boundary

    def show_targets(self, deadline: Deadline) -> str:
        """All targets with sessions, LUNs, accounts and rules."""
        return self._wire.ask(Mode.TARGET, Op.SHOW, "show targets", deadline)

    def show_names(self, deadline: Deadline) -> str:
        """Drivers, their state, and number and name of each target: nothing in it comes from an initiator."""
        return self._wire.ask(Mode.DRIVER, Op.SHOW, "show drivers", deadline)

    def show_connections(self, tid: int, deadline: Deadline) -> str:
        """The sessions and connections of a target."""
        return self._wire.ask(Mode.CONNECTION, Op.SHOW, "show connections", deadline, tid=_checked_tid(tid))

    def show_accounts(self, deadline: Deadline) -> str:
        """All account names."""
        return self._wire.ask(Mode.ACCOUNT, Op.SHOW, "show accounts", deadline)

    def show_system(self, deadline: Deadline) -> str:
        """The state of the daemon."""
        return self._wire.ask(Mode.SYSTEM, Op.SHOW, "show its state", deadline)

    def create_target(self, tid: int, name: str, deadline: Deadline) -> None:
        """Make a target without LUN 1 and without a rule: nobody can log in."""
        text = f"targetname={check_target_name(name)}"
        self._change("target-new", Mode.TARGET, Op.NEW, f"create target {name}", deadline, tid=tid, text=text)

    def delete_target(self, tid: int, name: str, deadline: Deadline) -> None:
        """Delete a target without sessions. Never forced: that stops at the first busy LUN, or ends the daemon."""
        self._change("target-delete", Mode.TARGET, Op.DELETE, f"delete target {name}", deadline, tid=tid)

    def set_target(self, tid: int, key: str, value: str, deadline: Deadline) -> None:
        """Set a parameter of a target: `state`, `nop_interval`, `nop_count`, or a key of the iSCSI login."""
        text = f"{_checked(_KEY, key, 'parameter')}={_checked(_VALUE, value, 'parameter value')}"
        what = f"set {key} of target number {tid}"
        self._change("target-update", Mode.TARGET, Op.UPDATE, what, deadline, tid=tid, text=text)

    def set_system_state(self, state: str, deadline: Deadline) -> None:
        """`offline`: all new TCP connections are dropped; `ready`: the normal state."""
        text = f"State={_checked(_VALUE, state, 'state')}"
        self._change("system-update", Mode.SYSTEM, Op.UPDATE, f"go {state}", deadline, text=text)

    def create_account(self, user: str, secret: str, deadline: Deadline) -> None:
        """Make a CHAP account."""
        text = f"user={check_account(user)},password={check_secret(secret, user)}"
        self._change("account-new", Mode.ACCOUNT, Op.NEW, f"create CHAP account {user}", deadline, text=text)

    def delete_account(self, user: str, deadline: Deadline) -> None:
        """Delete a CHAP account. No target may have it bound: a target without an account lets everybody log in."""
        text = f"user={check_account(user)}"
        self._change("account-delete", Mode.ACCOUNT, Op.DELETE, f"delete CHAP account {user}", deadline, text=text)

    def bind_account(self, tid: int, user: str, *, outgoing: bool, deadline: Deadline) -> None:
        """Demand a CHAP account of initiators; or, outgoing, let the target prove itself with it."""
        text = f"user={check_account(user)}"
        what = f"bind CHAP account {user} to target number {tid}"
        self._change("account-bind", Mode.ACCOUNT, Op.BIND, what, deadline, tid=tid, text=text, direction=int(outgoing))

    def create_lun(self, tid: int, lun: int, path: Path, deadline: Deadline) -> None:
        """Add a disk on a device or file.

        rdwr is the only store that honours flushes and FUA with fdatasync; direct keeps the page cache out, so that a
        close has nothing to write back while all other targets wait.
        """
        text = f"path={check_path(path)},bstype=rdwr,bsoflags=direct"
        what = f"offer {path} as LUN {lun} of target number {tid}"
        self._change("lun-new", Mode.DEVICE, Op.NEW, what, deadline, tid=tid, lun=lun, text=text)

    def update_lun(self, tid: int, lun: int, parameters: Mapping[str, str], deadline: Deadline) -> None:
        """Set parameters of a LUN: `scsi_id`, `scsi_sn`, `vendor_id`, `product_id`, `product_rev`, `readonly`, …"""
        pairs = [f"{_checked(_KEY, k, 'parameter')}={_checked(_VALUE, v, k)}" for k, v in parameters.items()]
        what = f"set parameters of LUN {lun} of target number {tid}"
        self._change("lun-update", Mode.DEVICE, Op.UPDATE, what, deadline, tid=tid, lun=lun, text=",".join(pairs))

    def reopen_lun(self, tid: int, lun: int, path: Path, deadline: Deadline) -> None:
        """Close and open the backing device, so that tgtd reads its size anew. Only without sessions.

        One request, because tgtd refuses to open while the LUN is online; opening sets it online again.
        """
        text = f"online=0,path={check_path(path)}"
        what = f"open {path} again"
        self._change("lun-reopen", Mode.DEVICE, Op.UPDATE, what, deadline, tid=tid, lun=lun, text=text)

    def delete_lun(self, tid: int, lun: int, deadline: Deadline) -> None:
        """Remove a LUN; refused (LUN_ACTIVE) while a command is in flight."""
        what = f"delete LUN {lun} of target number {tid}"
        self._change("lun-delete", Mode.DEVICE, Op.DELETE, what, deadline, tid=tid, lun=lun)

    def bind_initiator(self, tid: int, name: str, deadline: Deadline) -> None:
        """Allow logins of this initiator. By name alone: an address rule beside it would let in the whole address."""
        text = f"initiator-name={check_initiator(name)}"
        self._change("acl-bind", Mode.TARGET, Op.BIND, f"allow {name}", deadline, tid=tid, text=text)

    def unbind(self, tid: int, rule: str, deadline: Deadline) -> None:
        """Remove a rule as `show` prints it, a name or an address. Sessions that are there stay."""
        kind = "name" if rule.startswith(("iqn.", "eui.", "naa.")) else "address"
        text = f"initiator-{kind}={_checked(_RULE, rule, 'access rule')}"
        self._change("acl-unbind", Mode.TARGET, Op.UNBIND, f"remove the rule {rule}", deadline, tid=tid, text=text)

    def close_connection(self, tid: int, sid: int, cid: int, deadline: Deadline) -> None:
        """Close a connection at once; its commands in flight still end, and only then its session vanishes."""
        what = f"close session {sid} of target number {tid}"
        self._change("connection-delete", Mode.CONNECTION, Op.DELETE, what, deadline, tid=tid, sid=sid, cid=cid)

    def _change(
        self,
        name: str,
        mode: Mode,
        op: Op,
        what: str,
        deadline: Deadline,
        *,
        tid: int | None = None,
        sid: int = 0,
        lun: int = 0,
        cid: int = 0,
        direction: int = 0,
        text: str = "",
    ) -> None:
        number = ALL_TARGETS if tid is None else _checked_tid(tid)
        self._boundary(f"tgt:{name}:before")
        self._wire.ask(mode, op, what, deadline, tid=number, sid=sid, lun=lun, cid=cid, direction=direction, text=text)
        self._boundary(f"tgt:{name}:after")
