"""The commands `snode certs …`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from csi.certs import Certificate

FOLDER = Path("/etc/snode/tls")
_FOLDER = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=FOLDER,
    show_default=True,
    help="Where ca.pem, ca.key and what is issued stand.",
)
_ROLES = ("node", "volumes", "admin", "server")


@click.group(short_help="Make certificates for mutual TLS.")
def certs() -> None:
    """Make the certificates that SNODEs and CNODEs prove themselves to each other with over TCP.

    One machine keeps the folder with the CA. Each party gets three files from it: ca.pem, NAME.pem and NAME.key, named
    in the settings tls.ca, tls.cert and tls.key. A running driver reads renewed files by itself.

    \b
    What a certificate may do is its role:
      node      publish volumes to the node of its NAME, unpublish them from it, and see those that it has
      volumes   make, grow, delete and see volumes
      admin     everything
      server    be a driver that others call, at the addresses given

    \b
    Examples:
      snode certs init
      snode certs issue snode1 --role server --address 192.0.2.10
      snode certs issue cnode1 --role node --role volumes
      snode certs show /etc/snode/tls/cnode1.pem
    """


@certs.command()
@_FOLDER
@click.option("--days", type=int, default=3650, show_default=True, help="How long the CA holds.")
def init(folder: Path, days: int) -> None:
    """Make the CA of an installation. Its key, ca.key, leaves this folder never.

    \b
    Example:
      snode certs init --folder /root/snode-ca
    """
    from csi import certs as library

    made = library.init(folder, days=days)
    click.echo(f"{made.path}  until {made.not_after:%Y-%m-%d}; every machine gets a copy")
    click.echo(f"{library.files_of(folder, 'ca').key}  keep it here and nowhere else")


@certs.command()
@click.argument("name")
@_FOLDER
@click.option("--role", "roles", multiple=True, type=click.Choice(_ROLES), help="May be repeated.  [default: node]")
@click.option("--address", "addresses", multiple=True, help="Host name or IP address of a server; may be repeated.")
@click.option("--days", type=int, default=365, show_default=True, help="How long it holds.")
def issue(name: str, folder: Path, roles: tuple[str, ...], addresses: tuple[str, ...], days: int) -> None:
    """Make NAME.pem and NAME.key, signed by the CA of the folder. What exists is replaced: that is how to renew.

    For a CNODE, NAME is its node.name, which is its host name unless set otherwise.

    \b
    Examples:
      snode certs issue snode1 --role server --address 192.0.2.10 --address snode1.example.com
      snode certs issue cnode1
      snode certs issue operator --role admin --days 30
    """
    from csi import certs as library

    made = library.issue(folder, name, roles=roles or ("node",), addresses=addresses, days=days)
    files = library.files_of(folder, name)
    click.echo(f"{made.path} and {files.key}  {_described(made)}")
    click.echo("copy both and ca.pem to the machine, and name them in its settings:")
    click.echo(f'  [tls]\n  ca = "{files.ca}"\n  cert = "{files.cert}"\n  key = "{files.key}"')


@certs.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Say what stands in certificate files: name, roles, addresses, how long they hold.

    \b
    Example:
      snode certs show /etc/snode/tls/*.pem
    """
    from csi import certs as library

    found = [library.read(path) for path in files]
    if as_json:
        lines = [
            {
                "path": str(one.path),
                "name": one.name,
                "roles": one.roles,
                "addresses": one.addresses,
                "not_after": one.not_after.isoformat(),
                "days_left": one.days_left(),
            }
            for one in found
        ]
        click.echo(json.dumps(lines, indent=2))
        return
    for one in found:
        click.echo(f"{one.path}  {one.name}: {_described(one)}")


def _described(certificate: "Certificate") -> str:
    parts = [", ".join(certificate.roles) or "no role (a CA, or not one of ours)"]
    if certificate.addresses:
        parts.append(f"called by {', '.join(certificate.addresses)}")
    left = certificate.days_left()
    parts.append(f"until {certificate.not_after:%Y-%m-%d}" + (f", {left} days" if left >= 0 else ", OVER"))
    return "; ".join(parts)
