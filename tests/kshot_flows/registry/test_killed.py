"""Kill -9 in the middle of register and promote."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

POINTS = 20


def test_killed_at_random_calls_register_and_promote_are_put_right_by_the_next_command(
    new_project: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Of a first version and of a challenger. `killed.py TEMPLATE SCRATCH 0` tries all calls of MLflow's client."""
    template, scratch = new_project(tmp_path / "template"), tmp_path / "scratch"
    scratch.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "KSHOT_DATA")
    }
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(template), str(scratch), str(POINTS)],
        env=environment, capture_output=True, text=True, timeout=290,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == POINTS
    for left in found:
        made, champion = left["made"], left["champion"]
        assert left == {
            **left,
            "champion": made if left["stage"] == "Production" else made - 1,
            "disagreements": [],
            "in production": [champion],
            "served": champion,
            "versions": [*range(made, 0, -1)],
            "bundles": made,
            "runs": ["FINISHED"],
            "logged models": ["READY"] * made,
            "judged against itself": [],
            "adopted": [],
        }, left["killed"]
