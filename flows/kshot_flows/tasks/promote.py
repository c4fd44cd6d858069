"""Let a version meet the champion: into production if the gate opens, and else it waits in staging."""

from __future__ import annotations

import json
from contextlib import suppress

from kshot.recipe import Recipe
from kshot_flows import registry
from kshot_flows.console import progress
from kshot_flows.registry.gate import Evidence, GateSettings, judge
from kshot_flows.registry.log import Stage, StageConflictError
from kshot_flows.report import artifacts, experiment
from kshot_flows.store import keys
from kshot_flows.store.products import Promotion, Registered
from kshot_flows.store.results import RETRIED, task
from kshot_flows.tasks import evidence
from kshot_runtime.errors import KshotError


@task(
    keys.promote,
    shows=artifacts.publish,
    tags={"registry"},
    **RETRIED,
    timeout_seconds=3600,
)
def promote(recipe: Recipe, version: Registered) -> Promotion:
    """Let a version meet the champion: into production if the gate opens, and else it waits in staging.

    An archived version stays archived: a schedule does not promote a version that a person took out of service.
    """
    promotion = _promoted(recipe, version)
    experiment.log_verdict(version, promotion)
    return promotion


def _promoted(recipe: Recipe, version: Registered) -> Promotion:
    settings = GateSettings.of(recipe.gate)
    name, number = version.name, version.version
    for sentence in registry.settle(name):
        progress.say(f"  {sentence}")
    stage = next(one.stage for one in registry.versions(name) if one.version == number)
    if stage is Stage.ARCHIVED:
        why = f"it was archived, and only a person brings it back: kshot promote {name} {number} production"
        return Promotion(name, number, stage, registry.champion(name), why)
    if stage is Stage.NONE:
        registry.move(name, number, Stage.STAGING, why="made by the pipeline")
    challenger = Evidence.from_dict({**json.loads(version.evidence.file.read_text()), "version": number})
    while True:
        champion = registry.champion(name)
        if champion == number:  # by an earlier attempt, or concurrently by another process
            known = registry.gate_report(name, number)
            why, warnings = "it is in production already", known.warnings if known else ()
            return Promotion(name, number, Stage.PRODUCTION, number, why, warnings=warnings)
        try:
            other = None
            if champion is not None:
                other = evidence.champions_evidence(name, champion, challenger, version.data, recipe.dataset.test)
        except KshotError as error:
            return Promotion(name, number, Stage.STAGING, champion, str(error), judged=False)
        report = judge(challenger, other, settings, champion if other is None else None)
        registry.record_gate(name, number, report.to_dict())
        if not report.passed:
            return Promotion(name, number, Stage.STAGING, champion, "; ".join(report.failures))
        with suppress(StageConflictError):  # another version was promoted first: compare with that one
            first = "the first version" if champion is None else f"not compared with version {champion}"
            why = "passed the gate" + (f" against version {champion}" if other else f", {first}")
            registry.promote(name, number, Stage.PRODUCTION, why=why)
            return Promotion(name, number, Stage.PRODUCTION, champion, why, warnings=report.warnings)
