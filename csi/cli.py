"""The command `snode`: parse, call, print. Nothing heavy is imported before a command needs it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from csi import __version__
from csi.cli_certs import certs
from csi.cli_failover import failover
from csi.cli_probe import probe
from csi.cli_settings import load_settings, with_settings
from csi.config import Config, ConfigError
from csi.errors import DriverError
from csi.figures import figure, human
from csi.first_process import divide

if TYPE_CHECKING:
    from csi.client import VolumeLine
    from csi.rpc.endpoint import Endpoint

OK, FAILED, USAGE = 0, 1, 2

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


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


snode.add_command(certs)
snode.add_command(probe)
snode.add_command(failover)

_ROLE_HELP = """
    Runs until SIGTERM or SIGINT; requests that are under way then get 25 seconds to end.

    \b
    Examples:
      CSI_ENDPOINT=unix:///run/snode/csi.sock snode {role} --config /etc/snode/snode.toml
      snode {role} --log-level debug --log-format json
"""


def _role(name: str, roles: Sequence[str], short: str, text: str) -> None:
    @with_settings
    def command(file: Path | None, **flags: Any) -> None:
        from csi.wire import serve

        sys.exit(serve(load_settings(file, flags), roles=frozenset(roles)))

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


@snode.command(short_help="Serve volumes to Docker.")
@with_settings
def docker(file: Path | None, **flags: Any) -> None:
    """Serve Docker's volume plugin API, so that `docker volume create -d snode` and `docker run -v` work here.

    Without docker.controller the volumes are in the pools of this machine (files, unless others are set). With it this
    machine is a CNODE: volumes come from the SNODE at that endpoint, over mutual TLS; its certificate needs the roles
    node and volumes (snode certs issue NAME --role node --role volumes). CSI is served as well, at the endpoint.

    Runs until SIGTERM or SIGINT. Volumes stay mounted then, and are known again at the next start.

    \b
    Examples:
      sudo snode docker &
      docker volume create -d snode -o size=1G data
      docker run --rm -v data:/data debian sh -c 'date >> /data/dates; cat /data/dates'
    """
    from csi.wire import serve

    config = load_settings(file, flags)
    roles = {"node"} if config.docker.controller else {"controller", "node"}
    sys.exit(serve(config, roles=frozenset(roles), docker=True))


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
    """Look at the volumes of a running driver, over its CSI endpoint; free one from a node that is lost.

    Where docker.controller is set, the driver of that SNODE is asked, unless --endpoint says otherwise.

    \b
    Examples:
      sudo snode volumes list
      sudo snode volumes list --json | jq -r '.[] | select(.pool == "fast") | .volume_id'
      sudo snode volumes show v-0123456789abcdefghijkmnpqr
    """


def _controller(config: Config, flags: dict[str, Any]) -> "Endpoint":
    """Where the volumes are: the SNODE of a CNODE that serves Docker, unless the flag names an endpoint."""
    if config.docker.controller is not None and not flags.get("endpoint"):
        return config.docker.controller
    return config.endpoint


_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@volumes.command("list")
@_JSON
@with_settings
def list_(file: Path | None, as_json: bool, **flags: Any) -> None:
    """List all volumes: id, name, pool, size, and the nodes that they are published to.

    \b
    Examples:
      sudo snode volumes list
      sudo snode volumes list --json --endpoint unix:///run/x/csi.sock
    """
    from csi.client import Client

    config = load_settings(file, flags)
    with Client(_controller(config, flags), tls=config.tls) as client:
        lines = client.volumes()
    if as_json:
        click.echo(json.dumps([_fields(line) for line in lines], indent=2))
        return
    rows = [("VOLUME", "NAME", "POOL", "SIZE", "PUBLISHED TO")]
    rows += [(v.volume_id, _plain(v.name), v.pool, human(v.size_bytes), ", ".join(v.nodes) or "-") for v in lines]
    click.echo(table(rows))


@volumes.command("release")
@click.argument("name")
@click.option("--node", required=True, help="The node that is to lose the volume.")
@with_settings
def release(file: Path | None, name: str, node: str, **flags: Any) -> None:
    """Fence a node from a volume (NAME or id) and free it for others, without the node's help.

    What the node has acknowledged is on disk; what it holds in its memory is lost, and it can write no more. Over TCP
    it needs an admin certificate.

    \b
    Example:
      sudo snode volumes release data --node cnode1
    """
    from csi.client import Client

    config = load_settings(file, flags)
    with Client(_controller(config, flags), tls=config.tls) as client:
        line = client.find(name)
        client.release(line, node=node)
    click.echo(f"{line.name or line.volume_id} is free; node {node} can no longer reach it")


@volumes.command("show")
@click.argument("volume_id")
@_JSON
@with_settings
def show(file: Path | None, volume_id: str, as_json: bool, **flags: Any) -> None:
    """Show one volume.

    \b
    Example:
      sudo snode volumes show v-0123456789abcdefghijkmnpqr
    """
    from csi.client import Client

    config = load_settings(file, flags)
    with Client(_controller(config, flags), tls=config.tls) as client:
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
@with_settings
def doctor(file: Path | None, role: str, as_json: bool, **flags: Any) -> None:
    """Check this machine: tools, kernel modules, tgtd, iscsid, volume groups, mount propagation, settings.

    Changes nothing. Says the repair for each fault. Exit code 1 if there is an error; warnings alone are 0.

    \b
    Examples:
      sudo snode doctor
      sudo snode doctor --role node --json
    """
    from csi.doctor import examine

    findings = examine(load_settings(file, flags), role=role)
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
    divide()
    try:
        snode(prog_name="snode", standalone_mode=True)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"snode: {problem}", err=True)
        sys.exit(USAGE)
    except DriverError as error:
        click.echo(f"snode: {error}", err=True)
        sys.exit(FAILED)
