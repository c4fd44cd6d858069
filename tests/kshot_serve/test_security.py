"""docs/security.md: every attack has a row, every row a test that exists; and the attacks that no other file tries."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "security.md").read_text()


def test_every_test_that_it_names_exists() -> None:
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", DOCS))
    assert len(named) > 50
    assert named <= known, named - known


def test_every_row_names_a_test_and_every_finding_is_there() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("| ") and not line.startswith(("| attack", "| ---"))]
    assert not [row for row in rows if "`test_" not in row]
    assert set(re.findall(r"\bS(\d+):", DOCS)) == {str(number) for number in range(1, 17)}


def test_heads_without_bodies_turn_nobody_away(server: Any, photo: Callable[..., bytes]) -> None:
    """S4: three hundred heads a second, of which no body came, made the server refuse all others."""
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: 9999\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(300):
            client = stack.enter_context(socket.create_connection((host, int(port))))
            client.sendall(head.encode())
        for shade in range(20):
            answer = server.http.post("/v1/embed", content=photo("red", shade), headers={"Content-Type": "image/png"})
            assert answer.status_code == 200, answer.text
