"""Logs an experiment to its MLflow run: metrics while training, then scores, files and pictures."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kshot.evaluation.scores import answers
from kshot.evaluation.scores import drawn as draw
from kshot_flows import registry
from kshot_flows.registry import CLAIM
from kshot_flows.report import card
from kshot_flows.store import embeddings, learners
from kshot_flows.store.products import DataVersion, Line, Promotion, Registered, Scores, Trained
from kshot_flows.tracking import curves, runs, stores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kshot.recipe import Recipe

_MAPPED_WAYS = 5  # classes in the pictures of one episode: more cannot be told apart by eye
_TRAINING, _RECIPE = "kshot.training", "kshot.recipe.sha256"  # tags of a run


@contextmanager
def training_run(recipe: Recipe, data: DataVersion, folder: Path) -> Iterator[runs.Run]:
    """The MLflow run of a training: a new one, or the one that an interrupted process began in this folder."""
    note = folder / "mlflow-run.txt"
    if not note.exists() or not note.read_text():
        note.write_text(uuid.uuid4().hex)  # before the run is created, so that it is found after a kill at any time
    mark = (_TRAINING, note.read_text())
    with _run(recipe, data, mark, again=_find(recipe, mark, free=True), patient=True) as run:
        yield run


@contextmanager
def version_run(recipe: Recipe, data: DataVersion, learner: Trained, bundle: str) -> Iterator[runs.Run]:
    """The MLflow run of a bundle's version: an existing one, else that of its training, else a new one.

    The training's run is not used if it belongs to another bundle or recipe, or was deleted.
    """
    mark = (CLAIM, bundle)
    again = _find(recipe, mark)
    if again is None and _is_free(learner.run, recipe):
        again = learner.run
        stores.client().set_tag(again, *mark)
    with _run(recipe, data, mark, again) as run:
        curves.send_missing(run, curves.read(learner.folder / "curve.jsonl"))
        yield run


def log_scores(run: runs.Run, recipe: Recipe, learner: Trained, scores: Scores, model: str) -> dict[str, bytes]:
    """Log all measurements of a learner: metrics, tables, files. Returns the pictures, PNG by name.

    Metrics of validation and test are also logged to its logged model, with the name of the data set.
    """
    from mlflow.entities import Metric

    from kshot_flows.report import pictures  # brings matplotlib

    kept = {"training.seconds": learner.seconds, **({"training.bytes": learner.memory} if learner.memory else {})}
    if learner.validation is not None:
        kept["best.validation.accuracy"] = learner.validation
    for line in scores.lines:
        values = {"accuracy": line.accuracy, "margin": line.margin, "ece": line.ece, **_unknown(line)}
        kept |= {f"test.{line.key}.{name}": value for name, value in values.items()}
    for fit in scores.calibrations:
        values = {"temperature": fit.temperature, "auroc": fit.auroc, "false_accepts": fit.false_accepts}
        size = f"{fit.shape.ways}w{fit.shape.shots}s"
        kept |= {f"calibration.{size}.{name}": value for name, value in values.items() if np.isfinite(value)}
    tested = {ref.name: ref.digest for ref in scores.data.refs(recipe.dataset)}
    data = scores.data.parts(recipe.dataset.test)[0][0].name
    when = int(1000 * scores.report.file.stat().st_mtime)  # so that repeated logging gives one entry
    metrics = [
        Metric(name, value, when, learner.best_step, model, *((data, tested[data]) if name.startswith("test.") else ()))
        for name, value in kept.items()
    ]
    for name in ("validation.accuracy", "validation.margin"):  # of each checkpoint, as the run has them
        points = run.client.get_metric_history(run.id, name)
        metrics += [Metric(name, point.value, point.timestamp, point.step, model) for point in points]
    run.log(metrics)
    run.table(
        "scores",
        [
            {
                "episodes": str(line.shape), "protocol": line.protocol, "transductive": line.transductive,
                "count": line.episodes, "accuracy": line.accuracy, "margin": line.margin, "ece": line.ece,
                **_unknown(line),
            }
            for line in scores.lines
        ],
    )  # fmt: skip
    if learner.tried:
        run.table("heads", [asdict(one) for one in learner.tried])
    for pin in (scores.report, scores.arrays, learner.learner):
        run.file(pin.file)
    drawn = {name: pictures.png(figure) for name, figure in _figures(recipe, learner, scores)}
    run.pictures(drawn)
    return drawn


def log_verdict(version: Registered, promotion: Promotion) -> None:
    """Add the gate's verdict to the report of a version, in its folder and in the MLflow run."""
    report = version.evidence.file.with_name(card.REPORT)
    if card.add_verdict(report, promotion, registry.gate_report(version.name, version.version)):
        stores.client().log_artifact(version.run, str(report))


def _unknown(line: Line) -> dict[str, float]:
    """Results on unknown classes, by the names of metrics and columns."""
    found = line.open_set
    return {} if found is None else {
        "accepted": found.accepted, "false_accepts": found.false_accepts, "auroc": found.auroc,
    }  # fmt: skip


def _figures(recipe: Recipe, learner: Trained, scores: Scores) -> Iterator[tuple[str, Figure]]:
    from kshot_flows.report import pictures

    if points := curves.read(learner.folder / "curve.jsonl"):
        validated = [point for point in points if "validation" in point]
        yield "learning-curve", pictures.learning_curve(
            [int(p["step"]) for p in points], [p["loss"] for p in points], [int(p["step"]) for p in validated],
            [p["validation"] for p in validated], [p["margin"] for p in validated], chosen=learner.best_step,
        )  # fmt: skip
    first = scores.lines[0]
    with np.load(scores.arrays.file) as arrays:
        for line in scores.lines:
            title = f"Accuracy by episode, {scores.label(line)}"
            yield f"episodes-{line.key}", pictures.episode_accuracies(arrays[f"{line.key}.accuracies"], title)
        confidences, right = arrays[f"{first.key}.confidences"], arrays[f"{first.key}.right"]
        yield "reliability", pictures.reliability(confidences, right, ece=first.ece, title=scores.label(first))
    if first.open_set and (fit := scores.calibration_for(first.shape)):
        yield "unknown", pictures.unknown(fit, first.open_set, title=scores.label(first))
    yield from _episode(recipe, learner, scores)


def _episode(recipe: Recipe, learner: Trained, scores: Scores) -> Iterator[tuple[str, Figure]]:
    """Pictures of the first test episode: its images, and its embeddings."""
    from kshot_flows.report import pictures

    model = learners.load(learner.learner.file)
    images = scores.data.classes(recipe.dataset.test)
    shape = min((line.shape for line in scores.lines), key=lambda shape: abs(shape.ways - _MAPPED_WAYS))
    [episode] = draw(images, shape, 1, seed=scores.seed)
    [(taken, logits)] = answers(model, embeddings.features(model, images, scores.data.name), shape, 1, seed=scores.seed)
    names = [images.names[i] for i in episode.source.tolist()]
    truth, predicted = episode.query_labels.numpy(), logits.argmax(1).numpy()
    support_labels = episode.support_labels.numpy()
    with torch.no_grad():
        state = model.adapt(taken.support, taken.support_labels, taken.classes)
        features = [model.embed(part, state).flatten(1).numpy() for part in (taken.support, taken.query)]
    support, query = ((part * 255).round().byte().numpy() for part in (episode.support, episode.query))
    title = f"One {shape.ways}-way {shape.shots}-shot episode"
    yield "confusion", pictures.confusion(truth, predicted, names, title)
    yield (
        "embeddings",
        pictures.embedding_map(features[0], support_labels, features[1], truth, names, f"Embeddings: {title}"),
    )
    yield "episode", pictures.episode_sheet(support, support_labels, query, truth, predicted, names, title=title)


def _run(
    recipe: Recipe, data: DataVersion, mark: tuple[str, str], again: str | None, patient: bool = False
) -> AbstractContextManager[runs.Run]:
    """A new run with this tag, or the run `again` that has it."""
    own, *others = data.refs(recipe.dataset)
    return runs.run(
        recipe.name, recipe=recipe.model_dump(mode="json"), data=own, others=others, seed=recipe.seed,
        tags=dict([mark, (_RECIPE, _hash(recipe))]), again=again, patient=patient,
    )  # fmt: skip


def _find(recipe: Recipe, mark: tuple[str, str], *, free: bool = False) -> str | None:
    """The run of this recipe with a tag; with `free`, only if it belongs to no bundle."""
    door = stores.client()
    if (experiment := door.get_experiment_by_name(recipe.name)) is None:
        return None
    tags = dict([mark, (_RECIPE, _hash(recipe))])
    query = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found = door.search_runs([experiment.experiment_id], query)
    return next((run.info.run_id for run in found if not (free and CLAIM in run.data.tags)), None)


def _is_free(run_id: str, recipe: Recipe) -> bool:
    """Whether a run exists, is of this recipe, and belongs to no version yet."""
    from mlflow.exceptions import MlflowException

    try:
        run = stores.client().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False  # permanently deleted, or in another store
    tags = run.data.tags
    return (
        run.info.lifecycle_stage == "active"
        and not tags.keys() & {CLAIM, "kshot.version"}  # the latter of runs from before there were claims
        and tags.get(_RECIPE) == _hash(recipe)
    )


def _hash(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()
