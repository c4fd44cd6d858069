"""The log: lines that a program can read, soon written, and warnings at once."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys

from starlette.datastructures import Headers

from kshot_serve.observe.logs import Lines
from kshot_serve.observe.trace import Request, current

SPEAKS = """
import logging, sys
from starlette.datastructures import Headers
from kshot_serve.observe.logs import configure_logs
from kshot_serve.observe.trace import current, Request
configure_logs(sys.stderr)
current.set(Request.begin(Headers({"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"})))
logging.getLogger("kshot.serve").info("request", extra={"fields": {"route": "GET /", "status": 200}})
if sys.argv[1] == "wait":
    sys.stdin.read()
if sys.argv[1] == "warn":
    logging.warning("look here")
    import os; os._exit(1)
"""


def spoken(how: str) -> list[dict[str, object]]:
    done = subprocess.run([sys.executable, "-c", SPEAKS, how], capture_output=True, text=True, check=False, timeout=60)
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_is_json_with_the_ids_of_its_request() -> None:
    [line] = spoken("end")
    assert (line["message"], line["route"], line["status"]) == ("request", "GET /", 200)
    assert line["trace_id"] == "ab" * 16
    assert str(line["request_id"]).startswith("req_")


def test_on_a_terminal_a_line_is_plain_and_has_the_same_ids() -> None:
    seen, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", SPEAKS, "end"], stderr=terminal, check=True, timeout=60)
    line = os.read(seen, 4096).decode()
    for end in (seen, terminal):
        os.close(end)
    assert not line.startswith("{")
    assert "route=GET / status=200" in line
    assert f"trace_id={'ab' * 16}" in line
    assert "request_id=req_" in line


def test_a_line_for_a_person_has_the_ids_of_its_request_too() -> None:
    token = current.set(request := Request.begin(Headers()))
    try:
        record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "fields": {"status": 404}})
        line = Lines().format(record)
    finally:
        current.reset(token)
    assert line.endswith(f" info    request status=404 request_id={request.id} trace_id={request.trace}")
    assert Lines().format(record).endswith(" request status=404")


def test_a_warning_is_written_at_once_with_all_before_it() -> None:
    assert [line["message"] for line in spoken("warn")] == ["request", "look here"]  # though the process dies


def test_a_line_is_written_while_nothing_else_happens() -> None:
    process = subprocess.Popen([sys.executable, "-c", SPEAKS, "wait"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b"request" in os.read(process.stderr.fileno(), 4096)
    process.communicate()


def test_a_log_that_nobody_reads_any_more_fails_no_one() -> None:
    speaks = (
        "import logging, sys, time\nfrom kshot_serve.observe.logs import configure_logs\nconfigure_logs(sys.stderr)\n"
        "sys.stdin.read()\n"
        "for number in range(20):\n    logging.warning('line %s', number)\n    logging.info('x' * 10_000)\n"
        "print('went on')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", speaks], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stderr.close()
    process.stdin.close()
    assert process.stdout.read() == b"went on\n"
    process.wait(60)
    process.stdout.close()
