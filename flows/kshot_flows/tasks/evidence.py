"""Measurements for the gate: challenger and champion evaluated on the same episodes."""

from __future__ import annotations

import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape
from kshot.evaluation.scores import evaluate
from kshot.norms import Norm
from kshot_flows import registry
from kshot_flows.console import progress
from kshot_flows.registry.gate import EpisodeSet, Evidence, MoreShots
from kshot_flows.store import learners
from kshot_flows.store.products import DataVersion, Exported, Scores
from kshot_flows.tracking import stores
from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError

EVIDENCE = "evidence.json"
_CROSS_VALIDATED = "cross-validated"  # in the name of a protocol


def evidence_of(data: DataVersion, scores: Scores, bundle: Exported) -> Evidence:
    """The measurements of a new version, at the first shape of its recipe."""
    first = scores.lines[0]
    like_first = [line for line in scores.lines if (line.protocol, line.transductive) == (first.protocol, False)]
    fit = scores.calibration_for(first.shape)
    with np.load(scores.arrays.file) as arrays:
        accuracies = {line: arrays[f"{line.key}.accuracies"] for line in scores.lines}
    split, rotations = data.split_of(scores.split)
    return Evidence(
        episodes=EpisodeSet(
            data.identity_of(scores.split),
            split,
            first.shape.ways,
            first.shape.shots,
            first.shape.queries,
            scores.seed,
            rotations,
            _protocol(first.protocol, scores),
        ),
        accuracies=accuracies[first],
        ece=first.ece,
        agreement=bundle.agreement,
        auroc=None if fit is None or math.isnan(fit.auroc) else fit.auroc,
        latency_ms=bundle.latency_ms,
        cosine=scores.cosine(),
        accepted=first.open_set.accepted if first.open_set else None,
        false_accepts=first.open_set.false_accepts if first.open_set else None,
        shots=tuple(
            MoreShots.between(a.shape.ways, a.shape.shots, b.shape.shots, (accuracies[a], accuracies[b]))
            for a, b in pairwise(sorted(like_first, key=lambda line: (line.shape.ways, line.shape.shots)))
            if a.shape.ways == b.shape.ways
        ),
    )


def _protocol(drawn: str, scores: Scores) -> str:
    """The protocol of the episodes, with the folds if they were cross-validated."""
    if _CROSS_VALIDATED not in drawn:
        return drawn
    recipe = learners.recipe(scores.learner.learner.file)
    return f"{drawn} over {recipe.training.folds} folds of seed {recipe.seed}"


def champions_evidence(name: str, version: int, challenger: Evidence, data: DataVersion, test: str) -> Evidence | None:
    """The champion's results on the challenger's episodes: the recorded ones if they match, else evaluated now.

    `test` is the split of `data` that the challenger's episodes were drawn from. None where they are cross-validated:
    the champion may have learned from their classes.
    """
    episodes, count = challenger.episodes, len(challenger.accuracies)
    kept = _on_record(name, version)
    if kept is not None and kept.episodes == episodes and len(kept.accuracies) == count:
        return kept
    if _CROSS_VALIDATED in episodes.protocol:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Bundle.open(registry.fetch_bundle(name, version, Path(scratch) / "champion"))
        images = data.classes(test)
        shape = Shape(episodes.ways, episodes.shots, episodes.queries)
        with progress.busy(f"version {version}, the champion, plays these {count} episodes"):
            return _play(bundle, version, images, episodes, shape, count)


def _on_record(name: str, version: int) -> Evidence | None:
    from mlflow.artifacts import download_artifacts

    run = next(known.run for known in registry.versions(name) if known.version == version)
    door = stores.client()
    if run is None or EVIDENCE not in {artifact.path for artifact in door.list_artifacts(run)}:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        file = download_artifacts(run_id=run, artifact_path=EVIDENCE, dst_path=scratch, tracking_uri=door.tracking_uri)
        return Evidence.from_dict({**json.loads(Path(file).read_text()), "version": version})


def _play(
    bundle: Bundle, version: int, images: ClassImages, episodes: EpisodeSet, shape: Shape, count: int
) -> Evidence:
    """Evaluate a bundle on `count` evaluation episodes, the same that torch was scored on."""
    from kshot.export.served import Served  # imports the exporter's libraries, which take a second

    wanted = bundle.manifest.image.shape
    if images.shape != tuple(wanted):
        raise KshotError(
            f"the champion, version {version}, takes images {wanted}, and these are {images.shape}: the two cannot "
            "play the same episodes. Give the recipe another name, or put the version into production by hand."
        )
    fit = bundle.manifest.calibration_for(shape.ways, shape.shots)
    temperature = fit.temperature if fit else 1.0
    manifest = bundle.manifest
    served = Served(bundle.graphs, images.shape, manifest.features, cast(Norm, manifest.norm), manifest.steps_for)
    played = evaluate(served, images, shape, count, seed=episodes.seed, temperature=temperature)
    return Evidence(
        episodes=episodes,
        accuracies=played.accuracies,
        ece=played.ece,
        auroc=fit.auroc if fit else None,
        version=version,
    )
