"""Finds, in the machine's own package sources, the line that fetches another release of Debian from the same place."""

import platform
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import LabError

_ROOT = Path("/etc/apt")


def find_source(suite: str, root: Path = _ROOT, codename: str | None = None) -> tuple[str, str]:
    """File name and text of a source like the machine's main one, with another `suite`; LabError if there is none.

    Place, keys and options are the machine's own, so a mirror or a proxy that it uses is used here too.
    """
    suites = {"stable", "testing", "unstable", "sid", codename or _codename()}
    for path in sorted(root.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            if text := _from_stanza(stanza, suites, suite):
                return f"{suite}.sources", text
    for path in (root / "sources.list", *sorted(root.glob("sources.list.d/*.list"))):
        for line in path.read_text().splitlines() if path.exists() else ():
            if text := _from_line(line, suites, suite):
                return f"{suite}.list", text
    raise LabError(f"no Debian source in /etc/apt to fetch {suite} from")


def _codename() -> str:
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def _fields(stanza: str) -> Iterator[tuple[str, str]]:
    """Fields of a deb822 stanza; a field's further lines (a key block) stay with it as they are."""
    lines = [line for line in stanza.splitlines() if line.strip() and not line.startswith("#")]
    for field in re.split(r"\n(?=\S)", "\n".join(lines)):
        name, colon, value = field.partition(":")
        if colon:
            yield name.strip(), value.strip()


def _from_stanza(stanza: str, suites: set[str], suite: str) -> str | None:
    fields = {name.lower(): value for name, value in _fields(stanza)}
    if "deb" not in fields.get("types", "").split() or not suites & set(fields.get("suites", "").split()):
        return None
    if "main" not in fields.get("components", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
        return None
    fields |= {"types": "deb", "suites": suite, "components": "main"}
    return "".join(f"{name.capitalize()}: {value}\n" for name, value in fields.items())


def _from_line(line: str, suites: set[str], suite: str) -> str | None:
    found = re.match(r"deb\s+(\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+(.*)", line.strip())
    if not found or found[3].strip("/") not in suites or "main" not in found[4].split():
        return None
    return f"deb {found[1] or ''}{found[2]} {suite} main\n"
