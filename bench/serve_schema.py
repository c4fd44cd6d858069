"""Run Schemathesis against a real server: every operation, valid and invalid data, and stateful sequences.

    python bench/serve_schema.py [--seconds 300] [--bundle FOLDER]

Checks: no 5xx, no undocumented status, header or body, no access to deleted objects. The only allowed 5xx
is 503 for a request whose own deadline is too short. bench/schema_hooks.py configures Schemathesis.
Answers per operation are counted from the server's log. Exits with 1 if a target is missed. Writes
bench/results/serve_schema.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from serving_load import arguments, bar, build, fill, photo, serving, write

CHECKS = (
    "no_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "allow_header_conformance", "unsupported_method", "use_after_free",
)  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bundle", type=Path, help="what the server serves; else an untrained ProtoNet")
    parser.add_argument("--no-results", action="store_true", help="write no file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with serving(options.bundle or build("protonet", folder / "bundle"), folder / "serve") as served:
            client = served.client()
            exported = folder / "space.zip"
            exported.write_bytes(client.call("GET", f"/v1/spaces/{fill(client, 2, photo, shots=1)}/export").content)
            came, told = ask(f"{served.url}/openapi.json", exported, options.seconds, options.seed)
            alive = client.call("GET", "/healthz/ready").is_success
        answers, errors = answered(folder / "serve" / "log")
    print(told)
    for (route, status), count in sorted(answers.items()):
        print(f"{count:6} {status} {route}")
    failures = re.search(r"(\d+) unique failure", told)
    succeeded = {route for route, status in answers if status < 300}
    asked = {route for route, _ in answers} - {"unmatched"}
    if options.bundle is None:
        asked.discard("POST /v1/verify")  # an untrained learner cannot verify
    found = {
        "what": f"Schemathesis for {options.seconds} s, {answers.total():,} requests",
        "answers": {f"{status} {route}": count for (route, status), count in sorted(answers.items())},
        "bars": [
            bar("kinds of failure", int(failures[1]) if failures else came, 0, came == 0),
            bar("errors in the server's log", len(errors), 0, not errors and alive),
            bar("operations that never succeeded", len(asked - succeeded), 0, asked == succeeded),
        ],
    }
    print(*errors[:5], sep="\n")
    if not options.no_results:
        write("serve_schema", found, "schemathesis", "hypothesis")
    return 0 if all(each["met"] for each in found["bars"]) else 1


def ask(url: str, exported: Path, seconds: int, seed: int) -> tuple[int, str]:
    """Run Schemathesis until the time is up; its outcome and its report."""
    here = str(Path(__file__).parent)
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schema_hooks", "PYTHONPATH": here, "KSHOT_EXPORTED": exported}
    command = [Path(sys.executable).with_name("st"), "run", url, "--checks", ",".join(CHECKS), "--seed", str(seed)]
    more = ["--max-time", str(seconds), "--continue-on-failure", "--request-timeout", "30", "--warnings", "off"]
    done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, cwd=exported.parent)
    return done.returncode, done.stdout[-6000:] + done.stderr[-2000:]


def answered(log: Path) -> tuple[Counter[tuple[str, int]], list[str]]:
    """Counts of each route's statuses, and all error lines."""
    answers: Counter[tuple[str, int]] = Counter()
    errors = []
    for line in log.read_text().splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            told = {"level": "error"}  # not a log line of the server
        if told.get("message") == "request":
            answers[told["route"], told["status"]] += 1
        if told["level"] in ("error", "critical"):
            errors.append(line[:500])
    return answers, errors


if __name__ == "__main__":
    raise SystemExit(main())
