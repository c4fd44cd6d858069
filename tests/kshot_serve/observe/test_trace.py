"""W3C Trace Context of requests, and OpenTelemetry's spans where an exporter is asked for."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, ClassVar

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.datastructures import Headers

from kshot_serve.observe.trace import Request

KSHOT = Path(sys.executable).with_name("kshot")
TRACE, SPAN = "ab" * 16, "cd" * 8


def begun(*headers: tuple[str, str]) -> Request:
    return Request.begin(Headers(raw=[(name.encode(), value.encode()) for name, value in headers]))


@pytest.mark.parametrize("flags", ["00", "01"])
def test_a_request_stays_in_its_callers_trace_with_its_sampled_flag(flags: str) -> None:
    answered = begun(("traceparent", f"00-{TRACE}-{SPAN}-{flags}")).headers
    found = re.fullmatch(f"00-{TRACE}-([0-9a-f]{{16}})-{flags}", answered["traceparent"])
    assert found
    assert found[1] != SPAN


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert begun(("traceparent", f"01-{TRACE}-{SPAN}-01-more")).trace == TRACE


@pytest.mark.parametrize(
    "traceparent",
    [
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}", "nonsense", "",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_begins_a_trace_of_its_own(traceparent: str) -> None:
    answered = begun(("traceparent", traceparent), ("tracestate", "a=1")).headers
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", answered["traceparent"])
    assert not {TRACE, "0" * 32} & set(answered["traceparent"].split("-"))
    assert "tracestate" not in answered


def test_a_tracestate_is_passed_on() -> None:
    given = ("traceparent", f"00-{TRACE}-{SPAN}-01")
    assert begun(given, ("tracestate", "a=1,b=2"), ("tracestate", "c=3")).headers["tracestate"] == "a=1,b=2,c=3"
    assert "tracestate" not in begun(given, ("tracestate", "a=" + "x" * 600)).headers


def test_without_an_exporter_a_request_costs_microseconds() -> None:
    request, started = begun(), perf_counter()
    for _ in range(1000):
        request.took("decode", 0.001)
    assert perf_counter() - started < 0.05  # a span that is recorded takes about 20 us


class Collector(BaseHTTPRequestHandler):
    """Takes spans, as an OpenTelemetry collector does."""

    spans: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            self.spans.extend((resource, span) for scope in resource.scope_spans for span in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_spans_go_to_the_collector_that_the_environment_names(
    features_bundle: Path, photo: Callable[..., bytes], tmp_path: Path
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.serve_forever, daemon=True).start()
        environment = os.environ | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}", "OTEL_SERVICE_NAME": "shop",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [KSHOT, "serve", features_bundle, "--port", "0", "--folder", "serve"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        with httpx.Client(base_url=process.stdout.readline().split()[-1], timeout=60) as http:
            space = "/v1/spaces/" + http.post("/v1/spaces", json={"name": "colours"}).json()["id"]
            http.post(f"{space}/classes", data={"name": "red"}, files=[("photos", photo("red"))]).raise_for_status()
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=1"}
            answer = http.post(f"{space}/classify", files=[("photos", photo("red", 1))], headers=headers)
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0
        collector.shutdown()
    spans = [(resource, span) for resource, span in Collector.spans if span.trace_id.hex() == TRACE]
    [(resource, root)] = [(resource, span) for resource, span in spans if span.parent_span_id.hex() == SPAN]
    assert root.name == "POST /v1/spaces/{space_id}/classify"
    attributes = {each.key: each.value for each in root.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["kshot.request_id"].string_value == answer.headers["x-request-id"]
    assert "shop" in str(resource.resource)
    assert answer.headers["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    assert answer.headers["tracestate"] == "a=1"
    stages = {span.name for _, span in spans if span.parent_span_id == root.span_id}
    assert stages >= {"decode", "queue", "infer", "decide"}
