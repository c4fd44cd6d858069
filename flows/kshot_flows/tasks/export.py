"""The task `export`: exports a learner as a bundle of ONNX graphs with a manifest, and compares it with torch."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from kshot import plugins
from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape
from kshot.plugins import Provided
from kshot.recipe import Recipe
from kshot_flows import project
from kshot_flows.console import progress
from kshot_flows.report import artifacts
from kshot_flows.store import embeddings, keys, learners
from kshot_flows.store.products import Exported, Pin, Scores, Trained
from kshot_flows.store.results import task
from kshot_flows.tasks import heads
from kshot_runtime import manifest
from kshot_runtime.bundle import Bundle
from kshot_runtime.manifest import MANIFEST


@task(keys.export, shows=artifacts.publish, tags={"compute"})
def export(recipe: Recipe, learner: Trained, score: Scores) -> Exported:
    """Export the learner as a bundle, and compare its predictions with torch."""
    from kshot import export as exporting  # imports the exporter's libraries, which take a second

    model, splits = learners.load(learner.learner.file), recipe.dataset
    shape = score.lines[0].shape
    folder = learner.folder / keys.export(recipe, learner, score).replace("export", "bundle")[:19]
    # left by a killed export: this process holds the key's lock
    for unfinished in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(unfinished)
    test = known = score.data.classes(splits.test)
    if recipe.training.refit and (base := heads.base(recipe, score.data)):
        known = base if heads.cross_validated(recipe) else ClassImages.joined([base, test])
        heads.learn_statistics(model, known, score.data.name)
    with progress.stage("tracing to ONNX, and comparing with torch"):
        report = exporting.export(
            model, folder, facts=_facts(learners.recipe(learner.learner.file), learner, score),
            data=test, shape=shape, seed=score.seed, store=embeddings.folder(),
        )  # fmt: skip
    parity = report.manifest.parity
    files = tuple(Pin.of(folder / name) for name in (MANIFEST, *report.manifest.files))
    return Exported(files, parity.agreement, parity.logit_difference, _latency(Bundle.open(folder), shape))


def _facts(recipe: Recipe, learner: Trained, score: Scores) -> manifest.Facts:
    """The provenance and expected accuracy in a bundle's manifest."""
    commit, dirty, _ = project.git()
    found = plugins.find()
    own, *others = score.data.refs(recipe.dataset)
    learned_from = [own.name, *(other.name for other in others if other.context == own.context)]
    return manifest.Facts(
        learner=_plugin(found.learner(recipe.learner.one), recipe.learner.options),
        backbone=_plugin(found.backbone(recipe.backbone.name), recipe.backbone.options),
        image=score.data.open().rule,
        calibration=tuple(
            manifest.Calibration(
                ways=fit.shape.ways, shots=fit.shape.shots, temperature=fit.temperature, by=fit.by,
                threshold=fit.threshold, accepted=fit.accepted, false_accepts=fit.false_accepts, auroc=fit.auroc,
                ece=fit.ece,
                points=tuple(manifest.OperatingPoint(**asdict(point)) for point in fit.points),
            )
            for fit in score.calibrations
        ),
        verification=None if score.verification is None else manifest.Verification(**asdict(score.verification)),
        expected=tuple(
            manifest.Accuracy(**asdict(line.shape), episodes=line.episodes, accuracy=line.accuracy, margin=line.margin)
            for line in score.lines
            if not line.transductive and line.protocol == score.lines[0].protocol
        ),
        source=manifest.Source(
            dataset="+".join(learned_from), dataset_hash=own.digest,
            commit=f"{commit}-dirty" if commit and dirty else commit or "", run_id=learner.run, recipe=recipe.name,
        ),
    )  # fmt: skip


def _plugin(provided: Provided, options: dict[str, Any]) -> manifest.Plugin:
    config = provided.value.Config.model_validate(options).model_dump(mode="json")
    return manifest.Plugin(
        name=provided.name, config=config, distribution=provided.distribution, version=provided.version
    )  # fmt: skip


def _latency(bundle: Bundle, shape: Shape) -> float:
    """Median latency of the bundle for one photo on this machine's CPU, in milliseconds."""
    photos = np.zeros((shape.ways * shape.shots, *bundle.manifest.image.shape), np.uint8)  # (S, C, H, W)
    labels = np.arange(shape.ways).repeat(shape.shots)
    state = bundle.adapt_arrays(photos, labels, np.arange(shape.ways))
    took = []
    for _ in range(30):
        began = time.perf_counter()
        bundle.logits(state, photos[:1])
        took.append(1000 * (time.perf_counter() - began))
    return float(np.median(took))
