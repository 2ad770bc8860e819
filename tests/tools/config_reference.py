"""Prints docs/reference/configuration.md from the table of settings:

python -m tests.tools.config_reference > docs/reference/configuration.md
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csi.settings import POOL_TYPES, Setting, settings_of

_INTRODUCTION = """\
# Settings

Generated from `csi/settings.py` by `python -m tests.tools.config_reference`; a test compares the two.

Settings come from a TOML file (`--config FILE`, else `/etc/snode/snode.toml` if it exists), then from the environment,
then from flags; each later one wins. Lists in variables and flags are separated by commas. An unknown setting is
refused, with the nearest known one named, and so is an unknown variable that begins with `SNODE_` (but for those that
Kubernetes makes of a Service, such as `SNODE_PORT`); all problems are told at once. Without a `[pools.NAME]` table
there is one pool, `default`, of type `files` in the folder `volumes` of `state_dir`.

Examples that run as they are: `deploy/config/files.toml` and `deploy/config/lvm.toml`.
"""

_SECTIONS = {
    "": ("Top level", ""),
    "tls": ("[tls]", "Needed for an endpoint on TCP, which is served with mutual TLS only; the three go together.\n"),
    "controller": ("[controller]", "Read by `snode controller` and `snode all`.\n"),
    "node": ("[node]", "Read by `snode node` and `snode all`.\n"),
    "docker": ("[docker]", "Read by `snode docker`.\n"),
    "failover": ("[failover]", "Read by `snode failover`; see docs/guides/failover.md.\n"),
}


def page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for section, (title, text) in _SECTIONS.items():
        parts += [f"## {title}\n", *([text] if text else []), _table(settings_of(section), variables=True)]
    parts.append("## [pools.NAME]\n")
    parts.append(
        "One table for each pool. A StorageClass names it: `parameters: {pool: NAME}`. Set in the file only.\n"
    )
    for kind in POOL_TYPES:
        parts += [f'### type = "{kind}"\n', _table(settings_of("pools", pool_type=kind), variables=False)]
    return "\n".join(parts)


def _table(settings: Sequence[Setting], *, variables: bool) -> str:
    return "\n".join(_rows(settings, variables=variables)) + "\n"


def _rows(settings: Sequence[Setting], *, variables: bool) -> Iterator[str]:
    more = "| variable | flag " if variables else ""
    yield f"| key | value | default {more}| meaning |"
    yield f"|---|---|---{'|---|---' if variables else ''}|---|"
    for setting in settings:
        value = ", ".join(f"`{choice}`" for choice in setting.choices) or setting.kind.value
        cells = [f"`{setting.key}`", value, _default(setting)]
        if variables:
            cells += [_code(setting.variable), _code(setting.flag)]
        yield f"| {' | '.join([*cells, setting.help])} |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    return "" if setting.default is None else f"`{_toml(setting.default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


if __name__ == "__main__":
    print(page(), end="")
