"""A profile: what steps and stages took, and torch's operations in some of the work."""

import csv
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch

from kshot_flows.console import profiling


def test_a_peak_belongs_to_the_stage_that_had_it_and_to_its_step(tmp_path: Path) -> None:
    with profiling.profiled() as profile, profiling.measured("step"):
        with profiling.measured("large"):
            np.ones(25_000_000).sum()  # 200 MB, for a moment
        with profiling.measured("small"):
            time.sleep(0.1)
    step, large, small = profile.measured
    assert [one.what for one in profile.measured] == ["step", "large", "small"]
    assert step.peak == large.peak > small.peak + 150e6
    assert step.wall >= large.wall + small.wall >= 0.1
    assert small.cpu < 0.05 < small.wall
    profile.write(tmp_path)
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["depth"]) for row in rows] == [("step", "0"), ("large", "1"), ("small", "1")]


def test_a_few_outer_steps_are_traced_and_all_are_passed_on(tmp_path: Path) -> None:
    def work() -> None:
        torch.ones(8, 8) @ torch.ones(8, 8)

    with profiling.profiled():
        assert [work() or step for step in profiling.steps(iter(range(20)), tmp_path)] == list(range(20))
    operations = json.loads(gzip.decompress((tmp_path / "training.json.gz").read_bytes()))["traceEvents"]
    assert sum(one.get("name") == "aten::mm" for one in operations) == 5
    assert "aten::mm" in (tmp_path / "training.txt").read_text()


def test_without_a_profile_nothing_is_measured_or_traced(tmp_path: Path) -> None:
    with profiling.measured("step"):
        assert list(profiling.steps(iter("abc"), tmp_path / "none")) == ["a", "b", "c"]
    assert not (tmp_path / "none").exists()
