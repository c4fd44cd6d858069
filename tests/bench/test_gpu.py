"""The measurement of a GPU runs on a CPU too, so that it works on the day that there is a GPU."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_what_a_gpu_would_run_runs_on_a_cpu(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke"])
    import gpu

    gpu.main()
    shown = capsys.readouterr().out
    assert "met     largest difference of features" in shown
    assert '"reached": true' in shown
    if not gpu.torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        with pytest.raises(SystemExit, match=r"no GPU here\. The same code on a CPU: python bench/gpu\.py --smoke"):
            gpu.main()
