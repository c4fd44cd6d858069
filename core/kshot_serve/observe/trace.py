"""The ids of a request and its place in a trace (W3C Trace Context)."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import getrandbits
from time import perf_counter
from typing import Any

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass
class Request:
    """What goes into the log line of one request. Its ids tell requests apart, and need not be hard to guess."""

    id: str
    trace: str
    started: float = field(default_factory=perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, traceparent: str | None) -> Request:
        """A new request, in the caller's trace if it names one (W3C Trace Context)."""
        found = _TRACEPARENT.fullmatch(traceparent or "")
        return cls(f"req_{getrandbits(80):020x}", found[1] if found else f"{getrandbits(128) or 1:032x}")

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace}-{getrandbits(64) or 1:016x}-01"


current: ContextVar[Request | None] = ContextVar("request", default=None)
"""The request that this task answers."""
