"""The number of processor cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Generator
from pathlib import Path


def cores() -> int:
    """The processor cores that this process may use: its affinity, and its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(quota) for quota in _quotas())]))


def _quotas(root: Path = Path("/sys/fs/cgroup")) -> Generator[float]:
    for file in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        try:
            words = (root / file).read_text().split()
            period = float(words[1] if len(words) > 1 else (root / "cpu/cpu.cfs_period_us").read_text())
            if words[0] not in ("max", "-1"):
                yield float(words[0]) / period
        except (OSError, ValueError, IndexError):  # another kernel, or no limit
            continue
