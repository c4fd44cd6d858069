"""The steps of the pipeline: from a recipe to a registered version that was compared with the champion.

Separate from the Prefect flow (`kshot_flows.pipeline`), so that an unchanged run, whose steps only look up their
results, does not import Prefect.
"""

from __future__ import annotations

from collections.abc import Sequence

from kshot_flows import recipes
from kshot_flows.store.products import Promotion
from kshot_flows.tasks.data import version_data
from kshot_flows.tasks.evaluate import evaluate
from kshot_flows.tasks.export import export
from kshot_flows.tasks.promote import promote
from kshot_flows.tasks.register import register
from kshot_flows.tasks.train import meta_train


def from_recipe_to_promotion(recipe: str, changes: Sequence[str] = ()) -> Promotion:
    """Load a recipe with overrides, and run every step."""
    experiment = recipes.load(recipe, changes)
    data = version_data(experiment)
    learner = meta_train(experiment, data)
    score = evaluate(experiment, data, learner)
    bundle = export(experiment, learner, score)
    version = register(experiment, data, score, bundle)
    return promote(experiment, version)
