"""The pipeline as a Prefect flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed, State
from pydantic import Field

from kshot_flows.steps import from_recipe_to_promotion
from kshot_flows.store.products import Promotion

Recipe = Annotated[str, Field(min_length=1)]
Change = Annotated[str, Field(pattern=r"^\s*[\w-]+(\.[\w-]+)*\s*=.*\S")]  # validated on Prefect's page


def _name() -> str:
    return Path(flow_run.parameters["recipe"]).stem


@flow(name="kshot", flow_run_name=_name, persist_result=False)
def pipeline(recipe: Recipe, changes: list[Change] | None = None) -> Promotion | State[Promotion]:
    """Run a recipe up to a version and its stage; the state is Blocked if the gate keeps it out of production.

    Args:
        recipe: A TOML file, or the name of a bundled recipe.
        changes: Values to override, such as training.lr=0.01.
    """
    promotion = from_recipe_to_promotion(recipe, changes or [])
    if promotion.stage != "Production":
        return Completed(name="Blocked", message=promotion.why, data=promotion)
    return promotion
