"""docs/security.md: every attack has a row, every row a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "security.md").read_text()


def test_every_test_that_it_names_exists(test_names: set[str]) -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCS))
    assert len(named) > 50
    assert named <= test_names, named - test_names


def test_every_row_names_a_test_and_every_finding_is_there() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("| ") and not line.startswith(("| attack", "| ---"))]
    assert not [row for row in rows if "`test_" not in row]
    assert set(re.findall(r"\bS(\d+):", DOCS)) == {str(number) for number in range(1, 17)}
