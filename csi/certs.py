"""Certificates for mutual TLS: a CA of the installation's own, and one certificate for each party.

What a certificate may do stands in it, as URIs in its subjectAltName that only the CA can put there:

    snode:admin        everything
    snode:volumes      make, grow, delete and see volumes
    snode:node:NAME    publish volumes to the node NAME and unpublish them from it, and see those that it has
    snode:server       be a driver that others call (with the serverAuth usage; no other certificate has it)
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi.errors import Conflict, Invalid, NotFound, Unavailable
from csi.model import NODE_NAME
from csi.rpc.endpoint import TlsFiles

ROLES = ("node", "volumes", "admin", "server")
CA_DAYS = 3650
DAYS = 365
#: From so many days before its end on, a certificate is warned of.
WARN_DAYS = 30
_PREFIX = "snode:"
#: Clocks of machines differ; a fresh certificate must hold on one that is a little behind.
_EARLY = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Certificate:
    """What stands in a certificate file."""

    path: Path
    name: str
    roles: tuple[str, ...]
    addresses: tuple[str, ...]
    not_after: datetime.datetime

    def days_left(self, now: datetime.datetime | None = None) -> int:
        """Whole days until its end; negative when it is over."""
        return (self.not_after - (now or _now())).days


def files_of(folder: Path, name: str) -> TlsFiles:
    """Where `init` and `issue` put things: ca.pem, NAME.pem and NAME.key."""
    return TlsFiles(ca=folder / "ca.pem", cert=folder / f"{name}.pem", key=folder / f"{name}.key")


def init(folder: Path, *, days: int = CA_DAYS) -> Certificate:
    """Make the CA of an installation: ca.pem for every machine, ca.key for none but this folder.

    Raises Conflict if the folder has one: a second CA would shut out everything that the first one signed.
    """
    _check_days(days)
    files = files_of(folder, "ca")
    for path in (files.ca, files.key):
        if path.exists():
            raise Conflict(f"{path}: this folder has a CA already; issue certificates with it, or choose another one")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"SNODE CSI CA {x509.random_serial_number() >> 128:08x}")
    builder = _builder(name, name, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
    signed = builder.sign(key, hashes.SHA256())
    _write(files.key, _pem(key), 0o600)
    _write(files.ca, signed.public_bytes(serialization.Encoding.PEM), 0o644)
    return read(files.ca)


def issue(
    folder: Path, name: str, *, roles: Sequence[str] = ("node",), addresses: Sequence[str] = (), days: int = DAYS
) -> Certificate:
    """Make NAME.pem and NAME.key, signed by the folder's CA; existing ones are replaced, which renews them.

    addresses: host names and IP addresses that a server is called by; needed with the role "server", senseless without.
    Raises Invalid for a malformed name, role or address, NotFound if the folder has no CA, Unavailable if it is over.
    """
    _check_days(days)
    if not NODE_NAME.fullmatch(name) or name == "ca":
        raise Invalid(f"{name!r} is not a name: lower-case letters, digits, - and . (and not `ca`)")
    if unknown := sorted(set(roles) - set(ROLES)):
        raise Invalid(f"role {unknown[0]!r} does not exist; there are {', '.join(ROLES)}")
    if not roles:
        raise Invalid(f"{name}: needs at least one role of {', '.join(ROLES)}")
    if ("server" in roles) != bool(addresses):
        raise Invalid(f"{name}: the role `server` and the addresses it is called by (--address) go together")
    ca, ca_key = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), ca.subject, key, days, latest=ca.not_valid_after_utc)
    uris = [_PREFIX + (f"node:{name}" if role == "node" else role) for role in dict.fromkeys(roles)]
    names = [*map(x509.UniformResourceIdentifier, uris), *map(_address, addresses)]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if "server" in roles else [])]
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(sign_certificates=False), True),
        (x509.ExtendedKeyUsage(usages), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    signed = builder.sign(ca_key, hashes.SHA256())
    files = files_of(folder, name)
    _write(files.key, _pem(key), 0o600)
    _write(files.cert, signed.public_bytes(serialization.Encoding.PEM), 0o644)
    return read(files.cert)


def read(path: Path) -> Certificate:
    """What stands in a PEM file. Raises Unavailable when it can't be read or is none."""
    certificate = _load(path)
    names = _extension(certificate)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    addresses = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)] if names else []
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        path=path,
        name=str(common[0].value) if common else "",
        roles=tuple(uri.removeprefix(_PREFIX) for uri in uris if uri.startswith(_PREFIX)),
        addresses=tuple(map(str, addresses)),
        not_after=certificate.not_valid_after_utc,
    )


def problems(
    tls: TlsFiles, *, server: bool = False, docker_node: str = "", now: datetime.datetime | None = None
) -> list[tuple[bool, str]]:
    """What is wrong with the files of one end, as (is it an error, `what -> the repair`); [] when all is well.

    server: whether they are to be served with, which needs the role `server`. docker_node: the name of the node whose
    Docker uses them, "" = none does.
    """
    found: list[tuple[bool, str]] = []
    try:
        authorities, certificate, key = _load_all(tls.ca), _load(tls.cert), _load_key(tls.key)
    except Unavailable as error:
        return [(True, str(error))]
    ca = next((one for one in authorities if _is_signed(certificate, one)), None)
    if ca is None:
        found.append((True, f"{tls.cert} was not signed by {tls.ca} -> use the ca.pem that it was issued with"))
    again = f"issue it again: snode certs issue, and put the files at {tls.cert.parent}"
    for path, loaded in ((tls.ca, ca or authorities[0]), (tls.cert, certificate)):
        left = (loaded.not_valid_after_utc - (now or _now())).days
        if left < 0:
            found.append((True, f"{path} is over since {loaded.not_valid_after_utc:%Y-%m-%d} -> {again}"))
        elif left < WARN_DAYS:
            found.append((False, f"{path} ends in {left} days, on {loaded.not_valid_after_utc:%Y-%m-%d} -> {again}"))
    if certificate.public_key() != key.public_key():
        found.append((True, f"{tls.key} is not the key of {tls.cert} -> {again}"))
    if tls.key.stat().st_mode & 0o077:
        found.append((True, f"{tls.key} can be read by others -> chmod 0600 {tls.key}"))
    roles = read(tls.cert).roles
    if server and "server" not in roles:
        found.append((True, f"{tls.cert} is no server's -> snode certs issue NAME --role server --address ADDRESS"))
    if docker_node and "admin" not in roles and not {f"node:{docker_node}", "volumes"} <= set(roles):
        repair = f"snode certs issue {docker_node} --role node --role volumes"
        found.append((True, f"{tls.cert} may not make volumes and use them on node {docker_node} -> {repair}"))
    if not roles:
        found.append((True, f"{tls.cert} has no role of this driver -> make it with snode certs issue"))
    return found


# -- building blocks ---------------------------------------------------------------------------------------------


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _check_days(days: int) -> None:
    if not 0 < days <= CA_DAYS:
        raise Invalid(f"{days} days: a certificate holds for 1 to {CA_DAYS} days")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _address(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if not NODE_NAME.fullmatch(text.lower()):
            raise Invalid(f"address {text!r} is neither a host name nor an IP address") from None
        return x509.DNSName(text.lower())


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    *,
    latest: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    end = _now() + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _EARLY)
        .not_valid_after(min(end, latest) if latest else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    files = files_of(folder, "ca")
    if not files.ca.exists() or not files.key.exists():
        raise NotFound(f"{folder} has no CA (ca.pem and ca.key); make one: snode certs init --folder {folder}")
    ca, key = _load(files.ca), _load_key(files.key)
    if ca.not_valid_after_utc <= _now():
        raise Unavailable(f"{files.ca} is over since {ca.not_valid_after_utc:%Y-%m-%d}; make a new CA in a new folder")
    return ca, key


def _is_signed(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _load(path: Path) -> x509.Certificate:
    return _load_all(path)[0]


def _load_all(path: Path) -> list[x509.Certificate]:
    """All certificates in a file; while an installation changes its CA, ca.pem has the old and the new one."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise Unavailable(f"{path}: can't be read: {error.strerror} -> correct the setting, or issue it") from error
    except ValueError as error:
        raise Unavailable(f"{path} is no certificate in PEM form -> issue it again: snode certs issue") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise Unavailable(f"{path}: can't be read: {error.strerror} -> correct the setting, or issue it") from error
    except (ValueError, TypeError) as error:
        raise Unavailable(f"{path} is no key in PEM form -> issue it again: snode certs issue") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Unavailable(f"{path} is no key on an elliptic curve -> issue it again: snode certs issue")
    return key


def _extension(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """In one step, so that a server that reloads never finds half a file; a key never readable by others."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
        file.flush()
        os.fsync(fd)
    temporary.replace(path)
