"""Run the flows from the command line: against the Prefect API that is set up, or an embedded one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from kshot_flows.compare import comparison
from kshot_flows.console import progress
from kshot_flows.pipeline import pipeline
from kshot_flows.report.standings import Comparison
from kshot_flows.run import embedded
from kshot_flows.store import results
from kshot_flows.store.products import Promotion
from kshot_flows.store.results import Done
from kshot_flows.tracking import stores


def unchanged(recipe: str, changes: Sequence[str] = ()) -> bool:
    """Whether every task has a result that can be used again."""
    return _recalled(recipe, changes) is not None


def run(recipe: str, changes: Sequence[str] = ()) -> list[Done]:
    """Run the pipeline, and say what each task gave."""
    if done := _recalled(recipe, changes):
        return done
    with embedded.api(), results.journal() as done:
        try:
            pipeline(recipe, list(changes))
        except Exception as error:
            if not done or not isinstance(done[-1].product, Promotion):
                raise
            progress.say(escape(f"All is done, but Prefect does not show it: {stores.reason(error)}"))
    return done


def compare(asked: Sequence[str]) -> Comparison:
    """Compare recipes; see `kshot_flows.compare.entrants` for `asked`."""
    found: list[Comparison] = []
    if not embedded.configured() and results.recalled(lambda: found.append(comparison.fn(list(asked)))) is not None:
        return found[0]
    with embedded.api():
        return comparison(list(asked))


def _recalled(recipe: str, changes: Sequence[str]) -> list[Done] | None:
    if embedded.configured():
        return None
    return results.recalled(lambda: pipeline.fn(recipe, list(changes)))
