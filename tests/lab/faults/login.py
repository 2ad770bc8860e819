#!/usr/bin/python3
"""iSCSI logins step by step (RFC 7143, 6.3 and 11.12), which no initiator's tool offers. Standard library alone.

login.py knock ADDRESS PORT FOLDER     runs in a guest: for each publication record in FOLDER, again and again, a
                                       login of its node without CHAP; prints "granted TARGET", and "tries N" often
"""

import hashlib
import json
import os
import re
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

GRANTED, CHAP_FAILED, NOT_FOUND = 0x0000, 0x0201, 0x0203
#: The connection was closed without an answer.
CLOSED = -1

_SECURITY, _OPERATIONAL, _FULL = 0, 1, 3
_HEADER = 48
_NO_DIGESTS = {"HeaderDigest": "None", "DataDigest": "None"}


class Login:
    """One login on a connection. Each method sends one request and returns the status of the answer, or CLOSED."""

    def __init__(self, connection: socket.socket, *, initiator: str, target: str) -> None:
        self._connection = connection
        self._names = {"InitiatorName": initiator, "TargetName": target, "SessionType": "Normal"}
        self._isid = b"\x80" + os.urandom(5)  # like no other session's, which this one would replace
        self._answer: dict[str, str] = {}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def begin(self) -> int:
        """Say who we are and which target we want."""
        return self._ask({**self._names, "AuthMethod": "CHAP"}, stage=_SECURITY)

    def prove(self, user: str, secret: str) -> int:
        """CHAP (RFC 1994), after `begin`; its end is the end of the security stage."""
        status = self._ask({"CHAP_A": "5"}, stage=_SECURITY)
        if status != GRANTED:
            return status
        challenge = bytes.fromhex(self._answer["CHAP_C"][2:])
        digest = hashlib.md5(bytes([int(self._answer["CHAP_I"])]) + secret.encode() + challenge).hexdigest()
        return self._ask({"CHAP_N": user, "CHAP_R": f"0x{digest}"}, stage=_SECURITY, next_stage=_OPERATIONAL)

    def finish(self) -> int:
        """The last step; GRANTED means that there is a session now."""
        return self._ask(_NO_DIGESTS, stage=_OPERATIONAL, next_stage=_FULL)

    def without_chap(self) -> int:
        """A whole login without any proof; GRANTED means that there is a session now."""
        return self._ask({**self._names, **_NO_DIGESTS, "AuthMethod": "None"}, stage=_OPERATIONAL, next_stage=_FULL)

    def _ask(self, pairs: dict[str, str], *, stage: int, next_stage: int | None = None) -> int:
        data = b"".join(f"{key}={value}\0".encode() for key, value in pairs.items())
        flags = stage << 2 | (0x80 | next_stage if next_stage is not None else 0)
        header = struct.pack(">BBHI", 0x43, flags, 0, len(data)) + self._isid + bytes(34)
        try:
            self._connection.sendall(header + data + bytes(-len(data) % 4))
            answer = self._receive(_HEADER)
            length = int.from_bytes(answer[5:8], "big")
            text = self._receive(length + -length % 4)[:length]
        except (OSError, EOFError):
            return CLOSED
        self._answer = dict(re.findall(r"([^=\0]+)=([^\0]*)", text.decode()))
        status = int.from_bytes(answer[36:38], "big")
        if status == GRANTED and next_stage == _FULL and not answer[1] & 0x80:
            return self._ask({}, stage=stage, next_stage=next_stage)  # the target had more to say
        return status

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._connection.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def knock(address: str, port: int, folder: Path) -> None:
    """See the module."""
    tries, said = 0, time.monotonic()
    while True:
        for path in folder.glob("*.json"):
            with suppress(OSError, ValueError):  # records come and go
                record = json.loads(path.read_bytes())
                target = f"iqn.2026-11.io.snode:{record['volume_id']}:{record['nonce']}"
                with socket.create_connection((address, port), timeout=5) as connection:
                    login = Login(connection, initiator=record["node_id"].split(";")[3], target=target)
                    tries += 1
                    if login.without_chap() == GRANTED:
                        print(f"granted {target}", flush=True)
        if time.monotonic() - said > 0.2:
            print(f"tries {tries}", flush=True)
            said = time.monotonic()


if __name__ == "__main__":
    assert sys.argv[1] == "knock"
    knock(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
