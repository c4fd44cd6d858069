"""The socket that a server listens on, and the address that it goes by."""

from __future__ import annotations

import socket

from kshot_runtime.errors import KshotError


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that does not listen yet. A `shared` port takes others like it, of the same user; Linux deals them out.

    Port 0 takes a free one. A KshotError says why it cannot be had.
    """
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # only where all three say TCP does asyncio set TCP_NODELAY
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        raise KshotError(f"cannot serve at {host} port {port}: {error.strerror}. --port 0 takes a free one.") from None
    return listener


def url(listener: socket.socket) -> str:
    """The address of a bound socket, as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
