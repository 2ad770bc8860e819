"""Attacks on mutual TLS, and its renewal, on a real server and a real client."""

import datetime
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi import certs
from csi.client import Client, VolumeUse
from csi.errors import Forbidden, Unavailable
from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc
from csi.rpc.endpoint import Endpoint
from tests.rpc.test_access import ADDRESSES, NODES, Tls

CODE = grpc.StatusCode
DAY = datetime.timedelta(days=1)
#: The server ends the handshake; what our own side can't offer has other words.
THEIR_NO = "UNEXPECTED_EOF|ALERT"
ADMIN = [x509.UniformResourceIdentifier("snode:admin")]


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[Tls]:
    made = Tls(tmp_path / "tls")
    yield made
    assert made.server.stop(grace_seconds=0)


def forge(
    folder: Path,
    name: str,
    *,
    issuer: Path | None,
    names: Sequence[x509.GeneralName] = ADMIN,
    begin: datetime.timedelta = -DAY,
    end: datetime.timedelta = DAY,
    subject: str = "",
) -> None:
    """NAME.pem and NAME.key in `folder`, signed by ISSUER.pem and .key (None: by itself), with whatever is wanted."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or name)])
    signer, signer_name = key, own
    if issuer is not None:
        loaded = serialization.load_pem_private_key(issuer.with_suffix(".key").read_bytes(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
        signer_name = x509.load_pem_x509_certificate(issuer.with_suffix(".pem").read_bytes()).subject
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(own).issuer_name(signer_name).public_key(key.public_key())
    builder = (
        builder.serial_number(x509.random_serial_number()).not_valid_before(now + begin).not_valid_after(now + end)
    )
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = builder.add_extension(usages, critical=False).sign(signer, hashes.SHA256())
    pem = serialization.Encoding.PEM
    chain = issuer.with_suffix(".pem").read_bytes() if issuer is not None else b""
    (folder / f"{name}.pem").write_bytes(made.public_bytes(pem) + chain)
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(private)


def _has(answer: Any, code: grpc.StatusCode) -> str:
    assert isinstance(answer, grpc.RpcError), answer
    failure: Any = answer
    assert failure.code() is code, failure.details()
    return str(failure.details())


# -- attacks ---------------------------------------------------------------------------------------------------------


def test_whom_our_ca_did_not_sign_or_no_longer_vouches_for_has_no_connection(tls: Tls, tmp_path: Path) -> None:
    ca = tls.folder / "ca"
    other = tmp_path / "other"
    certs.init(other)
    same_name = x509.load_pem_x509_certificate((tls.folder / "ca.pem").read_bytes()).subject
    forge(tls.folder, "good", issuer=ca)
    assert tls.call("good", pb.ListVolumesRequest()) == pb.ListVolumesResponse(), "a forged one that must work"
    forge(tls.folder, "expired", issuer=ca, begin=-2 * DAY, end=-datetime.timedelta(seconds=5))
    forge(tls.folder, "early", issuer=ca, begin=DAY / 2, end=DAY)
    forge(tls.folder, "alone", issuer=None)
    forge(tls.folder, "other", issuer=other / "ca")
    forge(other, "namesake", issuer=None, subject=str(same_name.rfc4514_string().removeprefix("CN=")))
    forge(tls.folder, "twin", issuer=other / "namesake")
    forge(tls.folder, "child", issuer=tls.folder / "cnode1")
    for name in ("expired", "early", "alone", "other", "twin", "child"):
        _has(tls.call(name, pb.ListVolumesRequest()), CODE.UNAVAILABLE)
    assert len(tls.shown) == 1, "none of the others came as far as a request"


def test_a_role_is_an_uri_of_ours_and_nothing_else(tls: Tls) -> None:
    uri = x509.UniformResourceIdentifier
    lures: dict[str, list[x509.GeneralName]] = {
        "mail": [x509.RFC822Name("snode:admin")],
        "host": [x509.DNSName("snode:admin"), x509.DNSName("snode:volumes")],
        "other": [
            x509.UniformResourceIdentifier("spiffe://snode:admin"),
            x509.UniformResourceIdentifier("SNODE:admin"),
        ],
        "near": [uri(f"snode:{word}") for word in ("admin ", "Admin", "admin,volumes", "")],
        "none": [x509.DNSName("admin")],
    }
    for name, names in lures.items():
        forge(tls.folder, name, issuer=tls.folder / "ca", names=names, subject="operator")
        details = _has(tls.call(name, pb.ListVolumesRequest()), CODE.PERMISSION_DENIED)
        assert "the certificate of operator" in details
        _has(tls.call(name, pb.ControllerUnpublishVolumeRequest(volume_id="v", node_id="")), CODE.PERMISSION_DENIED)


def _handshake(tls: Tls, *, cert: str = "", version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, ciphers: str = "") -> str:
    """The version that a client gets; raises OSError when the server does not want it."""
    context = ssl.create_default_context(cafile=str(tls.folder / "ca.pem"))
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, version
    if ciphers:
        context.set_ciphers(ciphers)
    context.set_alpn_protocols(["h2"])
    if cert:
        files = certs.files_of(tls.folder, cert)
        context.load_cert_chain(files.cert, files.key)
    host, _, port = tls.endpoint.address.partition(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    with raw, context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        if not wrapped.recv(9):  # TLS 1.3 refuses a client's certificate after the handshake
            raise ConnectionResetError("closed")
        return str(wrapped.version())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_nothing_below_tls_1_2_and_nobody_without_a_certificate(tls: Tls) -> None:
    assert _handshake(tls, cert="operator") == "TLSv1.3"
    assert _handshake(tls, cert="operator", version=ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1):
        with pytest.raises(ssl.SSLError, match=THEIR_NO):
            _handshake(tls, cert="operator", version=version, ciphers="ALL:@SECLEVEL=0")
    for weak in ("aNULL:@SECLEVEL=0", "eNULL:@SECLEVEL=0"):
        with pytest.raises(ssl.SSLError, match=THEIR_NO):
            _handshake(tls, cert="operator", version=ssl.TLSVersion.TLSv1_2, ciphers=weak)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with pytest.raises(OSError):
            _handshake(tls, version=version)
    with grpc.insecure_channel(tls.endpoint.target) as channel:
        stub: Any = csi_pb2_grpc.ControllerStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListVolumes(pb.ListVolumesRequest(), timeout=5)
    _has(refused.value, CODE.UNAVAILABLE)


def test_a_connection_does_not_outlive_its_certificate(tls: Tls) -> None:
    forge(tls.folder, "brief", issuer=tls.folder / "ca", end=datetime.timedelta(seconds=2))
    with tls.channel("brief") as channel:
        stub: Any = csi_pb2_grpc.ControllerStub(channel)
        stub.ListVolumes(pb.ListVolumesRequest(), timeout=5)
        time.sleep(2.1)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListVolumes(pb.ListVolumesRequest(), timeout=5)
    assert "the certificate of brief is over since" in _has(refused.value, CODE.PERMISSION_DENIED)


# -- our client ------------------------------------------------------------------------------------------------------


def test_a_client_uses_its_renewed_certificate_without_a_restart(tls: Tls) -> None:
    files = certs.files_of(tls.folder, "docker1")
    with Client(tls.endpoint, tls=files) as client:
        client.volumes()
        assert tls.shown[-1] == files.cert.read_bytes()
        # A renewal replaces two files, one after the other; in between the old ones serve.
        before = files.cert.read_bytes()
        certs.issue(tls.folder, "docker1", roles=["node", "volumes"])
        fresh = files.cert.read_bytes()
        files.cert.write_bytes(before)
        client.volumes()
        assert tls.shown[-1] == before
        files.cert.write_bytes(fresh)
        client.volumes()
        assert tls.shown[-1] == fresh
        files.key.unlink()
        client.volumes()
        assert tls.shown[-1] == fresh


def test_an_installation_changes_its_ca_while_it_runs(tls: Tls, tmp_path: Path) -> None:
    new = tmp_path / "new"
    certs.init(new)
    both = (tls.folder / "ca.pem").read_bytes() + (new / "ca.pem").read_bytes()
    files = certs.files_of(tls.folder, "docker1")
    with Client(tls.endpoint, tls=files) as client:
        client.volumes()
        (tls.folder / "ca.pem").write_bytes(both)
        certs.issue(new, "docker1", roles=["node", "volumes"])
        certs.issue(new, "server", roles=["server"], addresses=ADDRESSES)
        for name in ("docker1", "server"):
            for path in (certs.files_of(new, name).key, certs.files_of(new, name).cert):
                (tls.folder / path.name).write_bytes(path.read_bytes())
            assert certs.problems(certs.files_of(tls.folder, name), server=name == "server") == []
            client.volumes()
        (tls.folder / "ca.pem").write_bytes((new / "ca.pem").read_bytes())
        client.volumes()
    _has(tls.call("maker", pb.ListVolumesRequest()), CODE.UNAVAILABLE)


def test_what_keeps_a_client_out_is_a_sentence(tls: Tls, tmp_path: Path) -> None:
    other = tmp_path / "other"
    certs.init(other)
    certs.issue(other, "docker1", roles=["admin"])
    stranger = Client(tls.endpoint, tls=certs.files_of(other, "docker1"))
    node = Client(tls.endpoint, tls=certs.files_of(tls.folder, "cnode1"))
    operator = Client(tls.endpoint, tls=certs.files_of(tls.folder, "operator"))
    nowhere = Client(Endpoint(address="127.0.0.1:1"), tls=certs.files_of(tls.folder, "operator"))
    tls.volumes.raises = Unavailable("tgtd does not answer")
    with stranger, node, operator, nowhere:
        with pytest.raises(Unavailable, match="refuses the certificate of the other; snode doctor"):
            stranger.volumes()
        assert node.volumes() == []
        with pytest.raises(Forbidden, match="DeleteVolume: the certificate of cnode1"):
            node.delete("v-00000000000000000000000000")
        with pytest.raises(Forbidden, match="the node cnode2, and it may speak for cnode1 alone"):
            node.unpublish("v-00000000000000000000000000", node_id=NODES["cnode2"])
        with pytest.raises(Unavailable, match=r"^tgtd does not answer$"):
            operator.create("x", size_bytes=1, parameters={}, use=VolumeUse())
        with pytest.raises(Unavailable, match="no connection"):
            nowhere.volumes()
