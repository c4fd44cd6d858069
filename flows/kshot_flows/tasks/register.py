"""The task `register`: logs the experiment to MLflow, and registers its bundle as a version of the recipe's model."""

from __future__ import annotations

import json

from kshot.recipe import Recipe
from kshot_flows import registry
from kshot_flows.console import progress
from kshot_flows.report import artifacts, card, experiment
from kshot_flows.store import keys
from kshot_flows.store.products import DataVersion, Exported, Pin, Registered, Scores
from kshot_flows.store.results import RETRIED, task
from kshot_flows.tasks import evidence
from kshot_flows.tracking import stores


@task(
    keys.register,
    shows=artifacts.publish,
    assets=lambda recipe, *made: [f"kshot://models/{recipe.name}"],
    tags={"registry"},
    **RETRIED,
    timeout_seconds=1800,
)
def register(recipe: Recipe, data: DataVersion, score: Scores, bundle: Exported) -> Registered:
    """Log the experiment in one MLflow run, and register the bundle as a version of the recipe's model."""
    judged_by = json.dumps(evidence.evidence_of(data, score, bundle).to_dict())
    folder, files, first = score.learner.folder, bundle.folder, score.lines[0]
    identity = registry.identity(files)
    with (
        progress.busy("metrics, pictures and files"),
        experiment.version_run(recipe, data, score.learner, identity) as run,
    ):
        known = card.facts(recipe, score, bundle, run)
        words = card.card(known)
        model = registry.log_model(recipe.name, run.id, files, words)
        pictures = experiment.log_scores(run, recipe, score.learner, score, model)
        run.tag("mlflow.note.content", words)
        run.text(evidence.EVIDENCE, judged_by)
        accuracy = {"accuracy": f"{first.accuracy:.6f}", "margin": f"{first.margin:.6f}"}
        version = registry.register(recipe.name, run.id, files, tags=accuracy, card=words)
        for name, text in ((card.CARD, words), (card.REPORT, card.html(known, pictures, version))):
            (folder / name).write_text(text)
            run.file(folder / name)
    file = files.with_suffix(".evidence.json")
    file.write_text(judged_by)
    return Registered(recipe.name, version, run.id, stores.label(), Pin.of(file), data)
