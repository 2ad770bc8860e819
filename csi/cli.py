"""The command `snode`: parse, call, print. Nothing heavy is imported before a command needs it."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from csi import __version__, log
from csi.config import Config, ConfigError, load
from csi.errors import DriverError
from csi.figures import figure, human
from csi.settings import SETTINGS

if TYPE_CHECKING:
    from csi.client import VolumeLine

OK, FAILED, USAGE = 0, 1, 2

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
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


def _load(file: Path | None, flags: dict[str, Any]) -> Config:
    # A service sets this up again by its settings; other commands log on stderr only what matters.
    log.set_up(level=flags.get("log_level") or "warning")
    return load(file, flags={name.replace("__", "."): value for name, value in flags.items()})


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, "--version", "-V", prog_name="snode")
def snode() -> None:
    """Volumes from your own disks for containers: a CSI driver over LVM and iSCSI.

    A SNODE is a machine with disks: run `snode controller` there. A CNODE runs containers: run `snode node` there. A
    machine that is both runs `snode all`. Settings come from a TOML file, then from SNODE_* variables and
    CSI_ENDPOINT, then from flags; each later one wins.

    \b
    Examples:
      sudo snode demo                              a volume's whole life, on this machine
      sudo snode all                               serve volumes kept in files, no settings needed
      sudo snode doctor --config snode.toml        what is missing here, and the repair
      sudo snode volumes list                      what the running driver holds

    \b
    Exit codes: 0 all went well, 1 something failed, 2 wrong usage or settings.
    """


_ROLE_HELP = """
    Runs until SIGTERM or SIGINT; requests that are under way then get 25 seconds to end.

    \b
    Examples:
      CSI_ENDPOINT=unix:///run/snode/csi.sock snode {role} --config /etc/snode/snode.toml
      snode {role} --log-level debug --log-format json
"""


def _role(name: str, roles: Sequence[str], short: str, text: str) -> None:
    @_with_settings
    def command(file: Path | None, **flags: Any) -> None:
        from csi.wire import serve

        sys.exit(serve(_load(file, flags), roles=frozenset(roles)))

    command.__doc__ = text + "\n" + _ROLE_HELP.format(role=name)
    snode.command(name, short_help=short)(command)


_role(
    "controller",
    ["controller"],
    "Serve a SNODE: make and export volumes.",
    "Serve CSI's Identity and Controller on a SNODE: make volumes and export them.",
)
_role(
    "node",
    ["node"],
    "Serve a CNODE: attach and mount volumes.",
    "Serve CSI's Identity and Node on a CNODE: attach volumes and mount them.",
)
_role(
    "all",
    ["controller", "node"],
    "Serve a machine that is both.",
    "Serve Identity, Controller and Node in one process, on a machine that is SNODE and CNODE.",
)


@snode.command(short_help="Walk one volume through its life, here.")
def demo() -> None:
    """Walk one volume through its whole life on this machine, and print what exists after each step.

    Uses LVM, tgt and iSCSI where the kernel has them, else files and loop devices; says which, and why. Needs root.
    Everything is made in a folder of its own and removed at the end.

    \b
    Example:
      sudo snode demo
    """
    from csi.demo import main as run

    sys.exit(run())


@snode.group(short_help="Look at the volumes of a running driver.")
def volumes() -> None:
    """Look at the volumes of a running driver, over its CSI endpoint.

    \b
    Examples:
      sudo snode volumes list
      sudo snode volumes list --json | jq -r '.[] | select(.pool == "fast") | .volume_id'
      sudo snode volumes show v-0123456789abcdefghijkmnpqr
    """


_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@volumes.command("list")
@_JSON
@_with_settings
def list_(file: Path | None, as_json: bool, **flags: Any) -> None:
    """List all volumes: id, name, pool, size, and the nodes that they are published to.

    \b
    Examples:
      sudo snode volumes list
      sudo snode volumes list --json --endpoint unix:///run/x/csi.sock
    """
    from csi.client import Client

    config = _load(file, flags)
    with Client(config.endpoint, tls=config.tls) as client:
        lines = client.volumes()
    if as_json:
        click.echo(json.dumps([_fields(line) for line in lines], indent=2))
        return
    rows = [("VOLUME", "NAME", "POOL", "SIZE", "PUBLISHED TO")]
    rows += [(v.volume_id, _plain(v.name), v.pool, human(v.size_bytes), ", ".join(v.nodes) or "-") for v in lines]
    click.echo(table(rows))


@volumes.command("show")
@click.argument("volume_id")
@_JSON
@_with_settings
def show(file: Path | None, volume_id: str, as_json: bool, **flags: Any) -> None:
    """Show one volume.

    \b
    Example:
      sudo snode volumes show v-0123456789abcdefghijkmnpqr
    """
    from csi.client import Client

    config = _load(file, flags)
    with Client(config.endpoint, tls=config.tls) as client:
        line = client.volume(volume_id)
    if as_json:
        click.echo(json.dumps(_fields(line), indent=2))
        return
    rows = [
        ("volume", line.volume_id),
        ("name", _plain(line.name)),
        ("pool", line.pool),
        ("size", figure(line.size_bytes)),
        ("published to", ", ".join(line.nodes) or "no node"),
        ("reachable from", ", ".join(line.reachable_from) or "every node"),
    ]
    click.echo(table(rows))


@snode.command(short_help="Check this machine, say the repairs.")
@click.option(
    "--role",
    type=click.Choice(["controller", "node", "all"]),
    default="all",
    show_default=True,
    help="What this machine is to be.",
)
@_JSON
@_with_settings
def doctor(file: Path | None, role: str, as_json: bool, **flags: Any) -> None:
    """Check this machine: tools, kernel modules, tgtd, iscsid, volume groups, mount propagation, settings.

    Changes nothing. Says the repair for each fault. Exit code 1 if there is an error; warnings alone are 0.

    \b
    Examples:
      sudo snode doctor
      sudo snode doctor --role node --json
    """
    from csi.doctor import examine

    findings = examine(_load(file, flags), role=role)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.level:<8}{finding.subject}: {finding.text}")
            if finding.repair:
                click.echo(f"        -> {finding.repair}")
    sys.exit(FAILED if any(finding.level == "error" for finding in findings) else OK)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width, two blanks apart."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _plain(name: str) -> str:
    """A volume's name, which may be any text, on one line of a terminal."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _fields(line: "VolumeLine") -> dict[str, Any]:
    return asdict(line)


def main() -> None:
    """The entry point: run a command, turn errors into a sentence and an exit code."""
    try:
        snode(prog_name="snode", standalone_mode=True)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"snode: {problem}", err=True)
        sys.exit(USAGE)
    except DriverError as error:
        click.echo(f"snode: {error}", err=True)
        sys.exit(FAILED)
