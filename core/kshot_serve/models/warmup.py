"""Loads a bundle as a server runs it: each graph is run at every batch size, and its outputs are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kshot_runtime.bundle import Bundle, Device
from kshot_runtime.manifest import BundleError

_LARGEST = 256 << 20  # bytes in one batch


@dataclass(frozen=True)
class Loader:
    """How a server loads bundles; its fields are numbers and names, so that another process can do the same."""

    device: Device
    threads: int  # of one run
    adapt_threads: int
    sizes: Sequence[int]  # of batches

    def __call__(self, path: str | Path) -> Bundle:
        """A bundle with all that it will run warmed, or a BundleError. Takes seconds: call it in a thread."""
        # With an arena, measured: a sixth faster; sizes are few, so that it does not grow.
        bundle = Bundle.open(path, self.device, self.threads, adapt_threads=self.adapt_threads, arena=True)
        warm(bundle, self.sizes)
        return bundle


def warm(bundle: Bundle, buckets: Sequence[int]) -> None:
    """Run each graph at each size that will be run, and look at the answers: a BundleError says why it cannot serve."""
    graphs, manifest = bundle.graphs, bundle.manifest
    if (size := max(buckets) * math.prod(manifest.image.shape)) > _LARGEST:
        raise BundleError(f"a batch of {max(buckets)} images would have {size:,} bytes; at most {_LARGEST:,} are run")
    if graphs.takes_features and graphs.device != "cpu":
        graphs.fix(buckets)
    noise = np.random.default_rng(0).integers(0, 256, (max(2, *buckets), *manifest.image.shape), np.uint8)
    query = noise
    if graphs.takes_features:
        query = graphs.embed(noise)
        for size in buckets:
            _same(graphs.embed(noise[:size]), query[:size])
    ways = min(2, manifest.limits.ways, manifest.limits.support)
    graphs.views(noise[:ways])
    state = graphs.adapt(query[:ways], np.arange(ways), np.arange(ways), manifest.steps_for(1))
    outputs = graphs.classify(state, query)
    for size in buckets:
        part = graphs.classify(state, query[:size])
        for name in graphs.gives:
            _same(part[name], outputs[name][:size])


def _same(found: np.ndarray, expected: np.ndarray) -> None:
    """An image's answer is a finite number, and does not depend on its companions in a batch."""
    if found.shape != expected.shape:
        raise BundleError(f"the graph gives {found.shape} where it gave {expected.shape} in a larger batch")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise BundleError("the graph gives numbers that are not finite for plain noise")
    if not np.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max(initial=1e-6))):
        raise BundleError("the graph's answer for an image depends on the other images in its batch")
