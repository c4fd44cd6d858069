"""Runs flows from the command line, with the configured Prefect API or an embedded one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from kshot_flows.console import profiling, progress
from kshot_flows.steps import from_recipe_to_promotion
from kshot_flows.store import results
from kshot_flows.store.products import Promotion, Registered, Trained
from kshot_flows.store.results import Done
from kshot_flows.tracking import stores

if TYPE_CHECKING:
    from kshot_flows.console.profiling import Profile
    from kshot_flows.report.standings import Comparison


def unchanged(recipe: str, changes: Sequence[str] = ()) -> bool:
    """Whether every task has a reusable result."""
    return _recalled(recipe, changes) is not None


def run(recipe: str, changes: Sequence[str] = ()) -> list[Done]:
    """Run the pipeline; returns its tasks' results."""
    if done := _recalled(recipe, changes):
        return done
    from kshot_flows.pipeline import pipeline
    from kshot_flows.run import embedded

    with embedded.api(), results.journal() as done:
        try:
            pipeline(recipe, list(changes))
        except Exception as error:
            if not done or not isinstance(done[-1].product, Promotion):
                raise
            progress.say(escape(f"All is done, but Prefect does not show it: {stores.reason(error)}"))
    return done


def keep_profile(profile: Profile, done: Sequence[Done]) -> Path | None:
    """Write a profile beside the learner and to its MLflow run; returns its folder, or None if nothing ran."""
    trained = next((one.product for one in done if isinstance(one.product, Trained)), None)
    if trained is None or all(one.reused for one in done):
        return None
    folder = trained.folder / profiling.FOLDER
    profile.write(folder)
    versions = (one.product for one in done if isinstance(one.product, Registered))
    stores.client().log_artifacts(next((one.run for one in versions), trained.run), str(folder), profiling.FOLDER)
    return folder


def compare(asked: Sequence[str]) -> Comparison:
    """Compare recipes; see `kshot_flows.compare.entrants` for `asked`."""
    from kshot_flows.compare import comparison
    from kshot_flows.run import embedded

    found: list[Comparison] = []
    if not embedded.configured() and results.recalled(lambda: found.append(comparison.fn(list(asked)))) is not None:
        return found[0]
    with embedded.api():
        return comparison(list(asked))


def _recalled(recipe: str, changes: Sequence[str]) -> list[Done] | None:
    if _prefect_may_be_configured():
        from kshot_flows.run import embedded

        if embedded.configured():  # its pages list every run
            return None
    return results.recalled(lambda: from_recipe_to_promotion(recipe, changes))


def _prefect_may_be_configured() -> bool:
    """Whether Prefect's settings may be configured anywhere; if not, importing Prefect is avoided."""
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    places = {
        home / "profiles.toml": "",
        Path("prefect.toml"): "",
        Path("pyproject.toml"): "tool.prefect",
        Path(".env"): "prefect_",
    }
    return (
        "prefect" in sys.modules
        or any(os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"))
        or any(path.is_file() and sign in path.read_text(errors="replace").lower() for path, sign in places.items())
    )
