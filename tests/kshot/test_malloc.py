"""Memory that training keeps, and gives back."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import resource, threading
import numpy as np
from pathlib import Path
from kshot import malloc

def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step(size: int = 1_000_000, count: int = 40) -> int:
    before = faults()
    blocks = [np.ones(size) for _ in range(count)]  # 320 MB
    return faults() - before

"""

TAKES = """
before = resident()
with malloc.kept():
    step()
    print(resident() - before)
    with malloc.kept():
        step()
    print(resident() - before)
print(resident() - before)
step()
print(resident() - before)
"""

FAULTS = """
def thread():
    with malloc.kept():
        print(step(), step())

thread()
step(100_000)
print(step(100_000))  # blocks of 800 kB, after `kept`
first = threading.Thread(target=thread)
first.start()
first.join()
"""


def answers(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and needs glibc")


@linux
def test_what_is_freed_is_kept_for_the_next_step_and_given_back_at_the_end_of_the_outermost_block() -> None:
    first, second, after, outside = answers(TAKES)
    assert first > 300
    assert 300 < second < 360  # the same blocks again
    assert abs(after) < 30
    assert abs(outside) < 60


@linux
def test_a_second_step_faults_no_page_in_any_thread_and_smaller_blocks_fault_none_afterwards() -> None:
    """Any setting of glibc's ends that it learns to keep blocks over 128 kB, and threads have arenas of their own."""
    first, second, afterwards, in_thread, again = answers(FAULTS)
    assert min(first, in_thread) > 10_000
    assert max(second, afterwards, again) < 1_000
