"""What is tried before a bundle serves, and with how many threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from kshot_runtime.bundle import Bundle
from kshot_runtime.manifest import BundleError
from kshot_serve.models.cores import _quotas, cores
from kshot_serve.models.warmup import warm

Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]


def constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return name


def not_a_number(graph: onnx.GraphProto) -> None:
    nan = constant(graph, "nan", np.array(np.nan, np.float32))
    graph.node.append(helper.make_node("Mul", ["plain", nan], ["features"]))


def looks_at_companions(graph: onnx.GraphProto) -> None:
    axes = constant(graph, "row_axis", np.array([0], np.int64))
    graph.node.append(helper.make_node("ReduceMean", ["plain", axes], ["mean"], keepdims=1))
    graph.node.append(helper.make_node("Sub", ["plain", "mean"], ["features"]))


def one_size_only(graph: onnx.GraphProto) -> None:
    shape = constant(graph, "frozen", np.array([2, -1], np.int64))
    graph.node.append(helper.make_node("Reshape", ["plain", shape], ["features"]))


def test_warming_runs_each_size_of_both_kinds_of_bundle(
    features_bundle: Path, images_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, graphs in ((features_bundle, ("embed", "classify")), (images_bundle, ("classify",))):
        bundle = Bundle.open(path)
        for graph in graphs:
            sizes: list[int] = []
            real = getattr(bundle.graphs, graph)

            def seen(*given: Any, real: Any = real, sizes: list[int] = sizes) -> Any:
                sizes.append(len(given[-1]))
                return real(*given)

            monkeypatch.setattr(bundle.graphs, graph, seen)
            warm(bundle, (1, 2, 4))
            assert set(sizes) == {1, 2, 4}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (not_a_number, "not finite"),
        (looks_at_companions, "depends on the other images"),
        (one_size_only, "the graph"),
    ],
)
def test_a_bundle_that_cannot_serve_is_found_before_it_does(
    features_bundle: Path, remake: Remake, tmp_path: Path, change: Callable[[onnx.GraphProto], None], why: str
) -> None:
    """gh:pytorch/pytorch#169178: an export that was simply wrong; gh:pytorch/pytorch#148886: the batch frozen."""
    bundle = Bundle.open(remake(features_bundle, tmp_path / "bundle", change))
    with pytest.raises(BundleError, match=why):
        warm(bundle, (1, 2, 4))


def test_threads_are_as_many_as_cores_that_may_be_used(tmp_path: Path) -> None:
    assert 1 <= cores() <= 4096
    assert list(_quotas(tmp_path)) == []
    for content, quota in (("max 100000", None), ("150000 100000", 1.5)):
        (tmp_path / "cpu.max").write_text(content + "\n")
        assert list(_quotas(tmp_path)) == ([] if quota is None else [quota])
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert list(_quotas(tmp_path)) == [1.5, 4.0]
