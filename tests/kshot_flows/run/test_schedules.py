"""Schedules: one fires and its run finishes, for real; the declared deployment is accepted by Prefect."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from kshot_flows import recipes
from kshot_flows.run import schedules
from kshot_runtime.errors import KshotError

ROOT = Path(__file__).parents[3]


def test_the_next_times_are_in_the_time_zone_that_was_asked_for() -> None:
    [first, second] = schedules.next_times("0 3 * * *", "Europe/Berlin", 2)
    assert (first.hour, first.minute, first.tzname()) in ((3, 0, "CET"), (3, 0, "CEST"))
    assert (second.date() - first.date()).days == 1


@pytest.mark.parametrize("cron", ["every night", "61 * * * *", "* * * *", "0 0 30 2 *", ""])
def test_an_expression_that_names_no_time_is_refused_with_an_example(cron: str) -> None:
    with pytest.raises(KshotError, match=r"names no time.*'0 3 \* \* \*'"):
        schedules.next_times(cron, "UTC", 1)


def test_an_unknown_time_zone_is_refused() -> None:
    with pytest.raises(KshotError, match=r"no time zone 'Mars'.*Europe/Berlin"):
        schedules.next_times("0 3 * * *", "Mars", 1)


def finished(home: Path) -> int:
    """How many of the project's Prefect runs have completed."""
    database = home / ".kshot" / "prefect.db"
    if not database.exists():
        return 0
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as records, suppress(sqlite3.OperationalError):
        [[count]] = records.execute("select count(*) from flow_run where state_type = 'COMPLETED'")
        return int(count)
    return 0  # its tables are still being made


def test_a_schedule_fires_and_its_run_finishes(new_project: Callable[[Path], Path], tmp_path: Path) -> None:
    home = new_project(tmp_path / "project")
    code = "from kshot_flows.cli.main import main; main()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KSHOT_", "MLFLOW_"))}
    # A sixth part is seconds: due every five, so that the test need not wait for a minute to begin.
    serving = subprocess.Popen(
        [sys.executable, "-c", code, "schedule", "tiny.toml", "--cron", "* * * * * */5"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home, start_new_session=True,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background run ignores it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 150
        while not finished(home):
            assert serving.poll() is None, serving.communicate()[0]
            assert time.monotonic() < deadline, "no run finished"
            time.sleep(0.5)
        serving.send_signal(signal.SIGINT)
        shown, _ = serving.communicate(timeout=60)
    finally:
        if serving.poll() is None:
            os.killpg(serving.pid, signal.SIGKILL)
            serving.communicate()
    assert "tiny runs at * * * * * */5 (UTC)" in shown
    assert "Stopped: nothing is scheduled any more." in shown
    assert list(home.glob("runs/tiny/*/bundle-*/adapt.onnx"))
    assert list(home.glob(".kshot/steps/promote-*"))


def test_the_declared_deployment_names_a_flow_and_a_recipe_that_exist() -> None:
    declared = yaml.safe_load((ROOT / "flows" / "prefect.yaml").read_text())
    for deployment in declared["deployments"]:
        found = load_flow_from_entrypoint(deployment["entrypoint"])
        found.validate_parameters(deployment["parameters"])
        recipes.load(deployment["parameters"]["recipe"], deployment["parameters"]["changes"])
        assert all(schedules.next_times(s["cron"], s["timezone"], 1) for s in deployment["schedules"])
        assert deployment["concurrency_limit"]["limit"] == 1
