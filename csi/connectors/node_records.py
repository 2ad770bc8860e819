"""iscsid's node records of our targets: static, manual, with the CHAP pair, and removed with the attachment.

iscsiadm takes secrets only on its command line, where every user of the machine can read them. So it makes the record
without them (in the format of its version, with the machine's defaults), and the settings are written here.
"""

import errno
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from csi.connectors.iscsiadm import Iscsiadm
from csi.connectors.portal import Portal
from csi.connectors.sessions import split_target
from csi.deadline import Deadline
from csi.errors import Invalid, NoSpace, Unavailable
from csi.model import Chap
from csi.run import Boundary, no_boundary, step

#: Where iscsiadm may keep its node database: Debian and its kin, Fedora and its kin.
DATABASE_FOLDERS = (Path("/etc/iscsi"), Path("/var/lib/iscsi"))

_TEMPORARY = ".snode-record"
_CHAP_WORD = re.compile(r"[A-Za-z0-9._:-]{1,223}")
_END = "# END RECORD"


def node_settings(*, replacement_seconds: int, login_seconds: int, digests: bool = False) -> dict[str, str]:
    """The settings of every record of ours; what is not named here stays as iscsid.conf has it.

    Manual start and scan: nothing logs in at boot behind our back, and no foreign LUN appears.
    digests: a target that can't do CRC32C is refused, since what was asked for must not be left out without a word.
    """
    crc = {"node.conn[0].iscsi.HeaderDigest": "CRC32C", "node.conn[0].iscsi.DataDigest": "CRC32C"}
    return {
        "node.startup": "manual",
        "node.session.scan": "manual",
        "node.session.nr_sessions": "1",
        "node.session.timeo.replacement_timeout": str(replacement_seconds),
        "node.conn[0].startup": "manual",
        "node.conn[0].timeo.login_timeout": str(login_seconds),
        "node.conn[0].timeo.noop_out_interval": "5",
        "node.conn[0].timeo.noop_out_timeout": "5",
        **(crc if digests else {}),
    }


class NodeRecords:
    """The records of this driver's targets in the node database; those of others are never touched."""

    def __init__(
        self,
        iscsiadm: Iscsiadm,
        *,
        settings: Mapping[str, str],
        folders: Sequence[Path] = DATABASE_FOLDERS,
        boundary: Boundary = no_boundary,
    ) -> None:
        self._iscsiadm = iscsiadm
        self._settings = dict(settings)
        self._folders = tuple(folders)
        self._boundary = boundary

    def write(
        self, target: str, portal: Portal, *, chap: Chap | None, login_tries: int = 3, deadline: Deadline
    ) -> None:
        """Make the one record of a target anew, whatever was there.

        login_tries: how often iscsid tries to log in before it gives up; a session that is lost it tries for ever.
        A damaged record (power cut) is neither replaced nor deleted by iscsiadm, hence the removal by hand first.
        Raises Unavailable when the database can't be used.
        """
        tries = {"node.session.initial_login_retry_max": str(login_tries)}
        settings = {**self._settings, **tries, **_chap_settings(chap)}
        self.remove(target)
        self._iscsiadm.new_record(target, portal, deadline)
        path = self._find(target, portal)
        if path is None:
            places = ", ".join(str(folder) for folder in self._folders)
            raise Unavailable(
                f"node record of {target}: iscsiadm wrote none below {places}; the driver must see the folder that the "
                "host's iscsid uses (in a container, mount it)"
            )
        try:
            self._replace(path, with_settings(path.read_text(), settings))
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
            raise kind(f"{path}: can't write the node record ({error.strerror}); mend that and repeat") from error

    def targets(self) -> list[str]:
        """The targets of ours that have a record, sorted."""
        names = {path.name for folder in self._folders for path in folder.glob("nodes/*")}
        names |= {path.name.partition(",")[0] for folder in self._folders for path in folder.glob("static/*")}
        return sorted(name for name in names if split_target(name))

    def remove(self, target: str) -> None:
        """Remove all records of one of our targets, damaged ones and a crash's left-overs too; absent is fine."""
        if split_target(target) is None:
            raise ValueError(f"not a target of this driver: {target!r}")
        for folder in self._folders:
            # `static` has iscsiadm's link from the kind of discovery to the record.
            for place in [*folder.glob(f"static/{target},*"), folder / "nodes" / target]:
                if place.is_symlink() or place.is_file():
                    self._unlink(place)
                elif place.exists():
                    with step(self._boundary, "node-record-remove"):
                        shutil.rmtree(place)
            self._unlink(_temporary(folder, target))

    def remove_volume(self, volume_id: str, *, keep: Collection[str] = ()) -> None:
        """Remove the records of all targets of a volume but `keep`; absent is fine."""
        for target in self.targets():
            parts = split_target(target)
            if parts and parts[0] == volume_id and target not in keep:
                self.remove(target)

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed driver left; they hold secrets."""
        for folder in self._folders:
            for path in folder.glob(f"{_TEMPORARY}.*"):
                self._unlink(path)

    def _find(self, target: str, portal: Portal) -> Path | None:
        places = [folder / "nodes" / target / portal.folder / "default" for folder in self._folders]
        return next((path for path in places if path.is_file()), None)

    def _replace(self, path: Path, text: str) -> None:
        # Not beside the record: iscsiadm takes every file there for one. Mode 0600 from the first byte on.
        temporary = _temporary(path.parents[3], path.parents[1].name)
        self._boundary("node-record:before")
        _write_new(temporary, text)
        self._boundary("node-record:written")
        temporary.rename(path)
        self._boundary("node-record:after")

    def _unlink(self, path: Path) -> None:
        """Remove a file or a link; absent is fine."""
        if os.path.lexists(path):
            with step(self._boundary, "node-record-unlink"):
                path.unlink(missing_ok=True)


def _write_new(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)


def with_settings(text: str, settings: Mapping[str, str]) -> str:
    """A record's text with these settings in place of its own; raises Unavailable when it is not a whole record."""
    lines = text.splitlines()
    if _END not in lines:
        raise Unavailable("iscsiadm wrote a node record without an end; see that its file system has space, and repeat")
    kept = [line for line in lines[: lines.index(_END)] if line.partition(" = ")[0] not in settings]
    return "\n".join([*kept, *(f"{key} = {value}" for key, value in settings.items() if value), _END, ""])


def _chap_settings(chap: Chap | None) -> dict[str, str]:
    fields = {"username": "", "password": "", "username_in": "", "password_in": ""}
    if chap is not None:
        fields = {
            "username": chap.user,
            "password": chap.secret,
            "username_in": chap.mutual_user,
            "password_in": chap.mutual_secret,
        }
        for name, value in fields.items():
            if not _CHAP_WORD.fullmatch(value):
                raise Invalid(f"CHAP {name} of the publish context has a character that is not allowed, or none")
    settings = {f"node.session.auth.{name}": value for name, value in fields.items()}
    return {"node.session.auth.authmethod": "CHAP" if chap else "None", **settings}


def _temporary(folder: Path, target: str) -> Path:
    return folder / f"{_TEMPORARY}.{target}"
