"""The task `evaluate`: calibrates on validation episodes, and scores on the test episodes that all learners share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape, protocols
from kshot.evaluation.calibration import Calibration, calibrate
from kshot.evaluation.open_set import open_set
from kshot.evaluation.scores import Score
from kshot.evaluation.verification import Verification, verification
from kshot.recipe import Recipe
from kshot.selection import evaluate_folds, fitting
from kshot_flows.console import profiling, progress
from kshot_flows.report import artifacts
from kshot_flows.store import embeddings, keys, learners
from kshot_flows.store.products import DataVersion, Line, Pin, Scores, Trained
from kshot_flows.store.results import task
from kshot_flows.tasks import heads
from kshot_flows.tasks.data import test_classes

_TRACED = 4  # traced episodes if the run is profiled


@task(keys.evaluate, shows=artifacts.publish, tags={"compute"})
def evaluate(recipe: Recipe, data: DataVersion, learner: Trained) -> Scores:
    """Calibrate on validation episodes, then score on the seeded test episodes that all learners share."""
    test = test_classes(recipe, data)
    model, where = learners.load(learner.learner.file).to(embeddings.device()), embeddings.device()
    (trials, seen), shapes = heads.trials(model, recipe, data), recipe.evaluation.shapes
    fits, pairs = dict[Shape, Calibration](), None
    if not trials:
        progress.say("  no validation classes: probabilities are not calibrated, and nothing counts as unknown")
    for shape in shapes if trials else ():
        size = _calibrated_at(shape, [images for _, images in trials])
        with progress.stage(f"calibration on {_few(recipe)} validation episodes, {size}"):
            fits[shape] = calibrate(trials, size, _few(recipe), seed=keys.TEST_SEED, seen=seen, device=where)
    if trials:
        pairs = verification(trials, keys.VERIFICATION_PAIRS, seed=keys.TEST_SEED, device=where)
    scores, lines = [], []
    parts = heads.tested(model, recipe, data, test)
    crossed = ", cross-validated" if heads.cross_validated(recipe) else ""
    for shape in shapes:
        fit = fits.get(shape)
        for protocol in [images.protocol for images in protocols(parts[0][1], fitting(shape, parts[0][1]))]:
            drawn = [(learner, images.with_protocol(protocol)) for learner, images in parts]
            for transductive in (False, True) if model.backbone.norm == "batch" else (False,):
                with progress.stage(f"{recipe.evaluation.episodes} episodes, {shape}, {protocol}"):
                    score = evaluate_folds(
                        drawn, shape, recipe.evaluation.episodes, seed=keys.TEST_SEED, transductive=transductive,
                        temperature=fit.temperature if fit else 1.0, device=where,
                    )  # fmt: skip
                    unknown = None
                    if fit and not transductive:
                        smaller = fitting(shape, min((images for _, images in parts), key=len))
                        unknown = open_set(drawn, smaller, fit, _few(recipe), seed=keys.TEST_SEED, device=where)
                scores.append(score)
                lines.append(
                    Line(
                        score.shape, score.episodes, transductive, f"{protocol}{crossed}",
                        score.accuracy, score.margin, score.ece, unknown,
                    )
                )  # fmt: skip
    if profiling.active():
        # images instead of stored features, so that the trace includes the backbone
        few = [(head, heads.pixels(images)) for head, images in parts]
        with profiling.traced("evaluation", learner.folder / profiling.FOLDER):
            evaluate_folds(few, shapes[0], _TRACED, seed=keys.TEST_SEED, device=where)
    cosine = heads.cosine(parts, shapes[0], recipe.evaluation.episodes, data.name)
    return _keep(scores, lines, tuple(dict.fromkeys(fits.values())), pairs, cosine, recipe, data, learner)


def _calibrated_at(shape: Shape, parts: Sequence[ClassImages]) -> Shape:
    """The episode size to calibrate at: that of the test, if at least one class remains as unknown."""
    size = fitting(shape, min(parts, key=lambda images: int(images.counts.min())))
    return replace(size, ways=min(shape.ways, max(2, min(map(len, parts)) - 1)))


def _few(recipe: Recipe) -> int:
    """A smaller number of episodes, for estimates that need no narrow interval."""
    return min(keys.CALIBRATION_EPISODES, recipe.evaluation.episodes)


def _keep(
    scores: list[Score],
    lines: list[Line],
    calibrations: tuple[Calibration, ...],
    pairs: Verification | None,
    cosine: Score | None,
    recipe: Recipe,
    data: DataVersion,
    learner: Trained,
) -> Scores:
    """Write scores to files beside the learner: a JSON summary, and the results of every episode."""
    stem = learner.folder / f"scores-{keys.evaluate(recipe, data, learner).removeprefix('evaluate-')[:12]}"
    arrays, report = stem.with_suffix(".npz"), stem.with_suffix(".json")
    np.savez_compressed(
        arrays,
        allow_pickle=False,
        **{
            f"{line.key}.{name}": getattr(score, name)
            for line, score in zip(lines, scores, strict=True)
            for name in ("accuracies", "confidences", "right")
        },
        **({"cosine.accuracies": cosine.accuracies} if cosine else {}),
    )
    report.write_text(
        json.dumps(
            {
                "seed": keys.TEST_SEED,
                "split": recipe.dataset.test,
                "lines": [asdict(line) for line in lines],
                "calibrations": [asdict(calibration) for calibration in calibrations],
                "verification": None if pairs is None else asdict(pairs),
            },
            indent=2,
        )
    )
    return Scores(
        tuple(lines),
        calibrations,
        pairs,
        Pin.of(report),
        Pin.of(arrays),
        keys.TEST_SEED,
        recipe.dataset.test,
        learner,
        data,
    )
