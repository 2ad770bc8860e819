"""What one process alone may work on: a state folder, by role, and a tgtd. A claim ends with the process, however it
ends: its lock is the kernel's."""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from csi.errors import Unavailable


def folder_problem(folder: Path, *, uid: int) -> tuple[str, str]:
    """What is wrong with a state folder that is there, and the repair; ("", "") when it may be used by user `uid`.

    Who can write there can have any volume published to any node, and any file attached.
    """
    facts = folder.stat()
    if facts.st_uid != uid:
        return f"{folder} belongs to user {facts.st_uid}, not to {_user(uid)}", f"chown {uid} {folder}"
    if facts.st_mode & 0o022:
        return f"{folder} can be written by others (mode {facts.st_mode & 0o777:04o})", f"chmod 0700 {folder}"
    return "", ""


def claim_state_folder(folder: Path, roles: Iterable[str]) -> None:
    """Make the state folder, for ourselves alone, and be the only process of our roles in it. Raises Unavailable."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        text, repair = folder_problem(folder, uid=os.geteuid())
        if text:
            raise Unavailable(f"state_dir: {text}; {repair}")
        if not any(folder.iterdir()):
            folder.chmod(0o700)  # kubelet makes one that everybody may read; one with files may be more than ours
        for role in sorted(roles):
            refusal = f"another {role} works in this state folder; stop it first"
            _claim(folder / f"{role}.lock", refusal)
    except OSError as error:
        raise Unavailable(f"state_dir {folder}: {error.strerror}; it must be a folder of root's") from error


def claim_tgtd(socket: Path, *, folder: Path = Path("/run")) -> None:
    """Be the only controller of the tgtd at this socket: two would remove each other's targets. Raises Unavailable."""
    # Unambiguous, and legible: /run/tgtd/socket.0 is run-tgtd-socket.0
    name = str(socket.resolve()).strip("/").replace("-", "--").replace("/", "-")
    path = folder / f"snode-tgt-{name}.lock"
    refusal = (
        f"another controller has the tgtd at {socket}, and each would remove the other's targets; stop that one, or "
        "set controller.tgt_socket to a tgtd of our own"
    )
    try:
        _claim(path, refusal)
    except OSError as error:
        raise Unavailable(f"{path}: can't be locked ({error.strerror}); run the driver as root") from error


def _claim(path: Path, refusal: str) -> None:
    """Lock a file until the process ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise Unavailable(f"{path}: {refusal}") from error


def _user(uid: int) -> str:
    return "root" if uid == 0 else f"user {uid}"
