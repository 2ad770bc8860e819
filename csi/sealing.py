"""Secrets for one node: the controller seals, only that node opens.

X25519 with a fresh sender key for each message, HKDF-SHA-256, ChaCha20-Poly1305 (a sealed box). `bound_to` is
authenticated, so that a sealed secret of one publication is worthless in another. `cryptography` is imported on first
use: a service that publishes nothing does not carry its memory.
"""

import base64
import json
from dataclasses import asdict

from csi.errors import DataLoss, Invalid
from csi.model import Chap
from csi.records import RecordStore

_KEY_BYTES = 32
_RECORD = "key"


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def seal(chap: Chap, *, public_key: str, bound_to: str) -> str:
    """Encrypt a CHAP pair to a node's public key (base64url, from its node_id). Text, about 260 characters."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    sender = X25519PrivateKey.generate()
    sender_public = sender.public_key().public_bytes_raw()
    shared = sender.exchange(X25519PublicKey.from_public_bytes(_decode(public_key)))
    plain = json.dumps(asdict(chap)).encode()
    return _encode(
        sender_public
        + _cipher(shared, sender_public + _decode(public_key)).encrypt(bytes(12), plain, bound_to.encode())
    )


def check_public_key(public_key: str, *, whose: str) -> None:
    """Raise Invalid for a key that nothing can be sealed to (malformed, or of small order)."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(_decode(public_key)))
    except ValueError as error:
        raise Invalid(f"{whose}: its key can't be used ({error}); restart the node service, which makes one") from error


class NodeKey:
    """The X25519 key of this node. The private half never leaves the state folder."""

    def __init__(self, *, private: str, public: str) -> None:
        self._private = private
        self.public = public

    @classmethod
    def load(cls, records: RecordStore) -> "NodeKey":
        """Read the key from the node's records; made on the first start."""
        fields = records.read(_RECORD)
        if fields is None:
            from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

            key = X25519PrivateKey.generate()
            fields = {
                "private": _encode(key.private_bytes_raw()),
                "public": _encode(key.public_key().public_bytes_raw()),
            }
            records.write(_RECORD, fields)
        return cls(private=str(fields["private"]), public=str(fields["public"]))

    def open(self, sealed: str, *, bound_to: str) -> Chap:
        """Decrypt what `seal` made for this node. Raises Invalid when it was made for another node or publication."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

        try:
            message = _decode(sealed)
            sender_public, box = message[:_KEY_BYTES], message[_KEY_BYTES:]
            shared = X25519PrivateKey.from_private_bytes(_decode(self._private)).exchange(
                X25519PublicKey.from_public_bytes(sender_public)
            )
            plain = _cipher(shared, sender_public + _decode(self.public)).decrypt(bytes(12), box, bound_to.encode())
        except (InvalidTag, ValueError) as error:
            raise Invalid(
                "publish_context.sealed: not made for this node, publication and context; pass the context on as it "
                "is. If the node's state folder was lost, unpublish the volume and publish it again"
            ) from error
        try:
            return Chap(**json.loads(plain))
        except (ValueError, TypeError) as error:
            raise DataLoss(
                "publish_context.sealed: opened, but its content is not a CHAP pair of this release"
            ) from error


def _cipher(shared: bytes, context: bytes):  # type: ignore[no-untyped-def]
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    # A key is used for one message only (fresh sender key), so the nonce may be constant.
    return ChaCha20Poly1305(HKDF(SHA256(), _KEY_BYTES, None, b"snode-chap-1" + context).derive(shared))
