"""Connections as sockets, for what no HTTP client would do."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest


class Connection(socket.socket):
    """A connection to a server; reads time out after 20 seconds."""

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer; the body as far as its length says."""
        came = b""
        while b"\r\n\r\n" not in came:
            piece = self.recv(65536)
            assert piece, f"the connection ended after {came!r}"
            came += piece
        head, _, body = came.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        while len(body) < int(headers["content-length"]):
            body += self.recv(65536)
        return int(first.split()[1]), headers, body

    def gone(self) -> bool:
        """Whether the server has closed the connection, after whatever it had sent."""
        try:
            while self.recv(1 << 20):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True


def _connected(url: str, *lines: str, buffer: int = 0) -> Connection:
    host, port = url.removeprefix("http://").split(":")
    there = Connection()
    there.settimeout(20)
    if buffer:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    there.connect((host, int(port)))
    there.sendall("".join(f"{line}\r\n" for line in lines).encode())
    return there


@pytest.fixture(scope="session")
def connected() -> Callable[..., Connection]:
    """connected(url, *lines, buffer=0): a connection that has sent these lines.

    With `buffer`, the system keeps so few bytes that have not been read.
    """
    return _connected
