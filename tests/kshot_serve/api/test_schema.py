"""The API keeps to its description: a short run of bench/serve_schema.py, by the same code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench" / "serve_schema.py"


def test_a_short_run_of_schemathesis_finds_nothing(features_bundle: Path) -> None:
    """gh:triton-inference-server/server#6796 and others: what is not described cannot be relied on."""
    arguments = ["--seconds", "8", "--bundle", features_bundle, "--no-results"]
    done = subprocess.run([sys.executable, BENCH, *arguments], capture_output=True, text=True)
    bars = [line for line in done.stdout.splitlines() if line.startswith(("met", "MISSED"))]
    assert len(bars) == 3, done.stderr[-3000:]
    # Whether every operation has succeeded at least once takes longer: that is for the bench.
    assert all(line.startswith("met") for line in bars[:2]), done.stdout[-6000:]
