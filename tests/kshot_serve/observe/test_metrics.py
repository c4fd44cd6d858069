"""/metrics: both formats, the process's own figures, of several workers too, and nothing superfluous."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain


def test_both_formats_hold_the_same_families_and_parse(server: Any) -> None:
    text = server.http.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    families = {family.name for family in plain(text.text)}
    asked = server.http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in openmetrics(asked.text)} == families
    assert {"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds"} <= families
    assert "_created" not in text.text + asked.text


def test_several_workers_tell_their_processes_together(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom kshot_serve.observe.metrics import Metrics\nmetrics = Metrics()\nmetrics.queued.set(1)\n"
        "print('here', flush=True)\nsys.stdin.read()\n"
        "if sys.argv[1] == 'tell': print(metrics.exposition('')[0].decode())"
    )
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    workers = [
        subprocess.Popen([sys.executable, "-c", code, how], stdin=-1, stdout=-1, text=True, env=environment)
        for how in ("tell", "wait")
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "here\n"
    resident = [int(Path(f"/proc/{each.pid}/statm").read_text().split()[1]) * 4096 for each in workers]
    files = sum(len(list(Path(f"/proc/{each.pid}/fd").iterdir())) for each in workers)
    clocks = [Path(f"/proc/{each.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for each in workers]
    seconds = sum(int(clock) for both in clocks for clock in both) / os.sysconf("SC_CLK_TCK")
    told, _ = workers[0].communicate(timeout=60)
    workers[1].communicate(timeout=60)
    values = {family.name: family.samples[0].value for family in plain(told) if family.samples}
    assert 0.8 < values["process_resident_memory_bytes"] / sum(resident) < 1.3
    assert abs(values["process_open_fds"] - files) <= 4
    assert seconds <= values["process_cpu_seconds"] < seconds + 1
    assert values["process_start_time_seconds"] < 2**32
    assert values["kshot_queued_images"] == 2
