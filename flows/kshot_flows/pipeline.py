"""The pipeline: from a recipe to a version in the registry that has met the champion."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow
from prefect.transactions import transaction

from kshot_flows import engine, keys, shipped, steps
from kshot_flows.engine import Done
from kshot_flows.products import Promotion

version_data = engine.step("data", keys.version_data)(steps.version_data)
meta_train = engine.step("meta-training", keys.meta_train)(steps.meta_train)
evaluate = engine.step("evaluation", keys.evaluate)(steps.evaluate)
export = engine.step("export", keys.export, undo=steps.remove_bundle)(steps.export)
register = engine.step("registration", keys.register, undo=steps.unregister)(steps.register)
promote = engine.step("promotion", keys.promote)(steps.promote)


@flow(name="kshot", flow_run_name="{recipe}", persist_result=False)
def pipeline(recipe: str, changes: list[str] | None = None) -> Promotion:
    """From a recipe (a path or a name), with changes such as `training.lr=0.01`, to a version and its stage."""
    experiment = shipped.load(recipe, changes or [])
    data = version_data(experiment)
    learner = meta_train(experiment, data)
    score = evaluate(experiment, data, learner)
    with transaction():  # a bundle that cannot be registered is taken back
        bundle = export(experiment, learner, score)
        version = register(experiment, data, score, bundle)
    return promote(experiment, version)


def unchanged(recipe: str, changes: Sequence[str] = ()) -> bool:
    """Whether every step has a result that can be used again."""
    return not engine.configured() and engine.recalled(lambda: pipeline.fn(recipe, list(changes))) is not None


def run(recipe: str, changes: Sequence[str] = ()) -> list[Done]:
    """Run the pipeline, against Prefect's API if one is set up and embedded if not, and say what each step gave."""
    if not engine.configured() and (done := engine.recalled(lambda: pipeline.fn(recipe, list(changes)))):
        return done
    with engine.api(), engine.journal() as done:
        pipeline(recipe, list(changes))
    return done
