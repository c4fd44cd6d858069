"""What of an experiment goes into its MLflow run: numbers while it trains, then scores, files and pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kshot.evaluation import answers, drawn
from kshot_flows.console.tables import TRUST, trust
from kshot_flows.store import embeddings, learners
from kshot_flows.store.products import DataVersion, Line, Scores, Trained
from kshot_flows.tracking import curves, runs, stores

if TYPE_CHECKING:
    from kshot.recipe import Recipe

_MAPPED_WAYS = 5  # classes in the pictures of one episode: more cannot be told apart by eye
_REGISTERED = "kshot.version"


@contextmanager
def training_run(recipe: Recipe, data: DataVersion, folder: Path) -> Iterator[runs.Run]:
    """The run of a training: a new one, or the one that a process which was cut off began in this folder."""
    note, store, begun = folder / "mlflow-run.json", stores.label(), {}
    with suppress(FileNotFoundError, ValueError):  # none yet, or cut off
        begun = json.loads(note.read_text())
    if begun.get("store") == store and _open_for(begun["run"], recipe):
        with runs.reopen(begun["run"], patient=True) as run:
            yield run
        return
    with _new_run(recipe, data, patient=True) as run:
        note.write_text(json.dumps({"store": store, "run": run.id}))
        yield run


@contextmanager
def version_run(recipe: Recipe, data: DataVersion, learner: Trained) -> Iterator[runs.Run]:
    """The run of a version: that of its training, unless that one is another version's, another recipe's or gone."""
    here = runs.reopen(learner.run) if _open_for(learner.run, recipe) else _new_run(recipe, data)
    with here as run:
        curves.send_missing(run, curves.read(learner.folder / "curve.jsonl"))
        yield run


def mark_registered(run: runs.Run, version: int) -> None:
    """From now on the run is this version's."""
    run.tag(_REGISTERED, version)


def log_scores(run: runs.Run, recipe: Recipe, learner: Trained, scores: Scores) -> None:
    """Everything that was measured of a learner: metrics, tables, files, pictures."""
    run.metrics(learner.best_step, {"training.seconds": learner.seconds})
    if learner.validation is not None:
        run.metrics(learner.best_step, {"best.validation.accuracy": learner.validation})
    for line in scores.lines:
        values = {"accuracy": line.accuracy, "margin": line.margin, "ece": line.ece, **_unknown(line)}
        run.metrics(learner.best_step, {f"test.{line.key}.{name}": value for name, value in values.items()})
    for fit in scores.calibrations:
        values = {"temperature": fit.temperature, "auroc": fit.auroc, "false_accepts": fit.false_accepts}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        size = f"{fit.shape.ways}w{fit.shape.shots}s"
        run.metrics(learner.best_step, {f"calibration.{size}.{name}": v for name, v in known.items()})
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
    run.tag("mlflow.note.content", _note(scores))
    for pin in (scores.report, scores.arrays, learner.learner):
        run.file(pin.file)
    _draw(run, recipe, learner, scores)


def _unknown(line: Line) -> dict[str, float]:
    """What was found of unknown classes, by the names that metrics and columns have."""
    found = line.open_set
    return {} if found is None else {
        "accepted": found.accepted, "false_accepts": found.false_accepts, "auroc": found.auroc,
    }  # fmt: skip


def _note(scores: Scores) -> str:
    """What MLflow's page of the run says first: how good it is, and where the pictures are. Markdown."""
    head = ["test episodes", "accuracy (95 % interval)", *(words.replace("\n", " ") for words in TRUST)]
    rows = [
        [scores.label(line), f"**{100 * line.accuracy:.2f} ± {100 * line.margin:.2f} %**",
         *trust(line.ece, line.open_set)]
        for line in scores.lines
    ]  # fmt: skip
    table = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    where = "Pictures are under Artifacts, in `pictures`; the served model is the bundle there."
    return "\n".join([*table, "", where])


def _draw(run: runs.Run, recipe: Recipe, learner: Trained, scores: Scores) -> None:
    from kshot_flows.report import pictures

    if points := curves.read(learner.folder / "curve.jsonl"):
        validated = [point for point in points if "validation" in point]
        run.picture(
            "learning-curve",
            pictures.learning_curve(
                [int(p["step"]) for p in points], [p["loss"] for p in points], [int(p["step"]) for p in validated],
                [p["validation"] for p in validated], [p["margin"] for p in validated], chosen=learner.best_step,
            ),
        )  # fmt: skip
    first = scores.lines[0]
    with np.load(scores.arrays.file) as arrays:
        for line in scores.lines:
            title = f"Accuracy by episode, {scores.label(line)}"
            run.picture(f"episodes-{line.key}", pictures.episode_accuracies(arrays[f"{line.key}.accuracies"], title))
        run.picture(
            "reliability",
            pictures.reliability(
                arrays[f"{first.key}.confidences"], arrays[f"{first.key}.right"],
                ece=first.ece, title=scores.label(first),
            ),
        )  # fmt: skip
    if first.open_set and (fit := scores.calibration_for(first.shape)):
        run.picture("unknown", pictures.unknown(fit, first.open_set, title=scores.label(first)))
    _draw_episode(run, recipe, learner, scores)


def _draw_episode(run: runs.Run, recipe: Recipe, learner: Trained, scores: Scores) -> None:
    """One test episode, the first, as one sees it and as the learner does."""
    from kshot_flows.report import pictures

    model = learners.load(learner.learner.file)
    images = scores.data.classes(recipe.dataset.test)
    shape = min((line.shape for line in scores.lines), key=lambda shape: abs(shape.ways - _MAPPED_WAYS))
    [episode] = drawn(images, shape, 1, seed=scores.seed)
    [(taken, logits)] = answers(model, embeddings.features(model, images, scores.data.name), shape, 1, seed=scores.seed)
    names = [images.names[i] for i in episode.source.tolist()]
    truth, predicted = episode.query_labels.numpy(), logits.argmax(1).numpy()
    support_labels = episode.support_labels.numpy()
    with torch.no_grad():
        state = model.adapt(taken.support, taken.support_labels, taken.classes)
        features = [model.embed(part, state).flatten(1).numpy() for part in (taken.support, taken.query)]
    support, query = ((part * 255).round().byte().numpy() for part in (episode.support, episode.query))
    title = f"One {shape.ways}-way {shape.shots}-shot episode"
    run.picture("confusion", pictures.confusion(truth, predicted, names, title))
    run.picture(
        "embeddings",
        pictures.embedding_map(features[0], support_labels, features[1], truth, names, f"Embeddings: {title}"),
    )
    run.picture(
        "episode", pictures.episode_sheet(support, support_labels, query, truth, predicted, names, title=title)
    )  # fmt: skip


def _new_run(recipe: Recipe, data: DataVersion, patient: bool = False):  # type: ignore[no-untyped-def]  # a context manager of a Run
    own, *others = data.refs(recipe.dataset)
    return runs.run(
        recipe.name, recipe=recipe.model_dump(mode="json"), data=own, others=others, seed=recipe.seed,
        tags={"kshot.recipe.sha256": _hash(recipe)}, patient=patient,
    )  # fmt: skip


def _open_for(run_id: str, recipe: Recipe) -> bool:
    """Whether a run is there, of this very recipe, and of no version yet."""
    from mlflow.exceptions import MlflowException

    try:
        run = stores.client().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False  # deleted for good, or in another store
    tags = run.data.tags
    return (
        run.info.lifecycle_stage == "active"
        and _REGISTERED not in tags
        and tags.get("kshot.recipe.sha256") == _hash(recipe)
    )


def _hash(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()
