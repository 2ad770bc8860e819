"""What commands of `snode` share: --config and the flags of the settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from csi import log
from csi.config import Config, load
from csi.settings import SETTINGS


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config and the flags that the table of settings names."""
    for setting in reversed([setting for setting in SETTINGS if setting.flag]):
        shown = f"{setting.help}  [{setting.variable}; default: {setting.default or 'the host name'}]"
        kind = click.Choice(setting.choices) if setting.choices else str
        command = click.option(setting.flag, setting.name.replace(".", "__"), type=kind, help=shown)(command)
    return click.option(
        "--config",
        "-c",
        "file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Settings in TOML.  [default: /etc/snode/snode.toml if it exists]",
    )(command)


def load_settings(file: Path | None, flags: dict[str, Any]) -> Config:
    """The settings of a command, whose keyword arguments are `flags`. Raises ConfigError."""
    # A service sets this up again by its settings; other commands log on stderr only what matters.
    log.set_up(level=flags.get("log_level") or "warning")
    return load(file, flags={name.replace("__", "."): value for name, value in flags.items()})
