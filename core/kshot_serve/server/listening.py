"""The socket that a server listens on, perhaps together with other processes, and how its connections are taken."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

from kshot_runtime.errors import KshotError

log = logging.getLogger("kshot.serve")

_BACKLOG = 2048  # connections that wait to be taken
_FULL_S = 1.0  # until another is tried to be taken when the process has no file left for it


def listen(host: str, port: int) -> socket.socket:
    """A socket at which connections wait to be taken; port 0 takes a free one. A KshotError says why there is none."""
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # only where all three say TCP does asyncio set TCP_NODELAY
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise KshotError(f"cannot serve at {host} port {port}: {error.strerror}. --port 0 takes a free one.") from None
    return listener


def url(listener: socket.socket) -> str:
    """The address of a socket, as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Acceptor:
    """Takes the connections of a socket until it is closed.

    Processes that share the socket each wait `turn_s` after a connection, in which another takes the next one: without
    it one process took up to 196 of 200 that came at once, and connections stay where they are.
    """

    def __init__(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol], turn_s: float = 0.0) -> None:
        self._listener = listener
        self._protocol = protocol
        self._turn_s = turn_s
        self._loop = asyncio.get_running_loop()
        self._begun: set[asyncio.Task[object]] = set()
        self._accepting = self._loop.create_task(self._accept())

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
                self._begin(connection)
                await asyncio.sleep(self._turn_s)
            except OSError as error:
                log.error("no connection can be taken: %s", error)
                await asyncio.sleep(_FULL_S)

    def _begin(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)

    async def close(self) -> None:
        """Take what has come, and listen no more: a connection that is not taken when its socket closes is reset."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        with suppress(OSError):  # nothing more has come, or it was closed before
            while True:
                self._begin(self._listener.accept()[0])
        self._listener.close()
        await asyncio.gather(*self._begun, return_exceptions=True)
