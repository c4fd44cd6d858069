"""Memory that training keeps, and gives back."""

from __future__ import annotations

import subprocess
import sys

import pytest

TAKES = """
import numpy as np
from pathlib import Path
from kshot import malloc

def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

def step() -> None:
    blocks = [np.ones(1_000_000) for _ in range(40)]  # 320 MB

before = resident()
with malloc.kept():
    step()
    print(resident() - before)
    step()
    print(resident() - before)
print(resident() - before)
step()
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and needs glibc")
def test_what_is_freed_is_kept_for_the_next_step_and_given_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", TAKES], capture_output=True, text=True, check=True)
    first, second, after, outside = map(float, done.stdout.split())
    assert first > 300
    assert 300 < second < 360  # the same blocks again
    assert abs(after) < 30
    assert abs(outside) < 60
