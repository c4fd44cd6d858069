"""Mutants of photos crash neither decoder nor server: a small version of bench/serve_fuzz.py, by the same code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench" / "serve_fuzz.py"


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-W", "ignore", BENCH, *arguments], capture_output=True)


def test_two_thousand_mutants_are_decoded_or_refused(features_bundle: Path) -> None:
    """vLLM CVE-2026-22773 and CVE-2026-22778: a photo that ended the server, an error that held an address."""
    done = bench("--files", "2000", "--requests", "200", "--bundle", features_bundle, "--no-results")
    bars = [line for line in done.stdout.decode().splitlines() if line.startswith(("met", "MISSED"))]
    assert len(bars) == 11, done.stderr.decode()[-3000:]
    # How long things take is for the bench: this machine may be busy.
    assert not [line for line in bars if line.startswith("MISSED") and "slowest" not in line]


def test_a_mutant_is_made_again_from_its_number() -> None:
    one, same, other = (bench("--replay", number).stdout for number in ("7", "7", "8"))
    assert one == same != other
