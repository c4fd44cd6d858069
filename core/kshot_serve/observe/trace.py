"""The ids of a request and its place in a trace (W3C Trace Context), by OpenTelemetry.

FastAPI makes the span of each request, where a tracer provider is configured; the stages of a request are its children.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from random import getrandbits
from time import perf_counter, time_ns
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

_TRACER = trace.get_tracer("kshot")
_W3C = TraceContextTextMapPropagator()
_STATE_LENGTH = 512  # characters of a tracestate that are passed on: what the specification asks for


@dataclass
class Request:
    """What goes into the log line of one request. Its ids tell requests apart, and need not be hard to guess."""

    id: str
    trace: str
    span: Span  # its own; the caller's, where no provider is configured; or an invalid one
    headers: dict[str, str]  # that tell the caller its place in the trace
    started: float = field(default_factory=perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, headers: Headers) -> Request:
        """A new request, in the caller's trace if it names one."""
        span = trace.get_current_span()
        ours = span.get_span_context().span_id
        if not ours and "traceparent" in headers:
            state = ",".join(headers.getlist("tracestate"))
            given = {
                "traceparent": headers["traceparent"],
                "tracestate": state if len(state) <= _STATE_LENGTH else "",
            }
            span = trace.get_current_span(_W3C.extract(given))
        known = span.get_span_context()
        trace_id = f"{known.trace_id or getrandbits(128) or 1:032x}"
        answer = {"traceparent": f"00-{trace_id}-{ours or getrandbits(64) or 1:016x}-{known.trace_flags:02x}"}
        if known.trace_state:
            answer["tracestate"] = known.trace_state.to_header()
        request = cls(f"req_{getrandbits(80):020x}", trace_id, span, answer)
        if span.is_recording():
            span.set_attribute("kshot.request_id", request.id)
        return request

    def took(self, stage: str, seconds: float) -> None:
        """A stage has ended now, and took so long."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        if self.span.is_recording():
            end, parent = time_ns(), trace.set_span_in_context(self.span)
            _TRACER.start_span(stage, parent, start_time=end - round(seconds * 1e9)).end(end)


current: ContextVar[Request | None] = ContextVar("request", default=None)
"""The request that this task answers."""
