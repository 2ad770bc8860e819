#!/usr/bin/python3 -ISs
"""Hands connections on: `relay.py LISTEN TARGET`, each `unix:/path` or `tcp:address:port`; prints "ready".

It joins what cannot meet: a unix socket inside a guest and the lab's network, or a process outside the lab's network
and a guest's port. A guest runs it with the system's Python, so it imports nothing of the project.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

_Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _listen(where: str, handler: _Handler) -> Any:
    kind, _, rest = where.partition(":")
    if kind == "unix":
        return await asyncio.start_unix_server(handler, rest)
    address, _, port = rest.rpartition(":")
    return await asyncio.start_server(handler, address, int(port))


async def _connect(where: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    kind, _, rest = where.partition(":")
    if kind == "unix":
        return await asyncio.open_unix_connection(rest)
    address, _, port = rest.rpartition(":")
    return await asyncio.open_connection(address, int(port))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def main(listen: str, target: str) -> None:
    """Serves until it is killed; a connection whose target is not there is closed at once."""

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await _connect(target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        far_writer.close()
        writer.close()

    server = await _listen(listen, hand_on)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    os.umask(0o077)
    asyncio.run(main(*sys.argv[1:]))
