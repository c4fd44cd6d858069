"""The steps of the pipeline as plain functions: each one a few calls into kshot, versioning, tracking and registry.

They work without Prefect, hand files and hashes on (see `products`), and each can be run again alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from kshot import memory, plugins, training
from kshot.calibration import Calibration, Verification, calibrate, open_set, verification
from kshot.datasets import ClassImages, ImageSet
from kshot.episodes import Shape, check_shape, protocols
from kshot.evaluation import Score
from kshot.plugins import Provided
from kshot.recipe import Recipe
from kshot.selection import evaluate_folds, fitting
from kshot_flows import contest, curves, heads, keys, learners, progress, records, registry, tracking, versioning
from kshot_flows.gate import Evidence, GateSettings, judge
from kshot_flows.heads import TEST_SEED
from kshot_flows.products import DataVersion, Exported, Line, Packed, Pin, Promotion, Registered, Scores, Trained
from kshot_flows.stages import Stage, StageConflictError
from kshot_runtime import manifest
from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError
from kshot_runtime.manifest import MANIFEST

CALIBRATION_EPISODES = 200
VERIFICATION_PAIRS = 1000


def version_data(recipe: Recipe) -> DataVersion:
    """All data that the recipe names, brought in where they are missing, and the data folder recorded in data.dvc."""
    root, found = versioning.data_root(), []
    for name in recipe.dataset.names:
        source = recipe.dataset.source if name == recipe.dataset.name else None
        with progress.counting(f"making {name}") as watch:
            present = versioning.ensure(name, root, source, watch)
        if present.note:
            progress.say(escape(f"  {present.note}"))
        found.append(present.data_set)
    recorded = versioning.version_data(root)
    if recorded.why_not:
        progress.say(escape(f"  {recorded.why_not}"))
    own, *others = (Packed(packed.name, packed.version, packed.index.source) for packed in found)
    data = DataVersion(own, tuple(others), recorded.md5, recipe.dataset.rotations, recipe.dataset.protocol)
    _refuse_unlike(found)
    _refuse_seen(recipe, data)
    return data


def meta_train(recipe: Recipe, data: DataVersion) -> Trained:
    """Make a learner in `runs/RECIPE/KEY/learner.pt`: by meta-training, or without it by choosing a head.

    Meta-training goes on from the last checkpoint there if a run was cut off.
    """
    heads.device(), _tested(recipe, data)  # what cannot work is reported before hours are spent
    folder = tracking.home() / "runs" / recipe.name / keys.meta_train(recipe, data).removeprefix("train-")[:12]
    torch.manual_seed(recipe.seed)
    return (_trained if recipe.training.steps else _chosen)(recipe, data, folder)


def _trained(recipe: Recipe, data: DataVersion, folder: Path) -> Trained:
    splits, settings = recipe.dataset, recipe.training
    learner = recipe.build(data.open().rule.shape)
    position = _checkpoint(folder).get("step", 0)
    if position:
        progress.say(f"  goes on from the checkpoint at step {position} of {settings.steps}")
    curve = curves.Curve(folder / "curve.jsonl", settings.steps, position)
    with records.training_run(recipe, data, folder) as run:
        steps = training.meta_train(
            learner, data.classes(splits.train), data.classes(splits.validation), settings,
            folder=folder, seed=recipe.seed, recipe=keys.training_part(recipe), device=heads.device(),
            unlabelled=data.classes(splits.unlabelled) if splits.unlabelled else None, store=heads.store(),
        )  # fmt: skip
        for step in progress.training(steps):
            if point := curve.add(step):
                run.metrics(step.step, curves.metrics(point))
    heads.learn_statistics(learner, data.classes(splits.train), data.name)
    reached = _checkpoint(folder)
    learners.save(folder / "learner.pt", learner, recipe, data, reached["history"])
    best: dict[str, float] = next(point for point in reached["history"] if point["step"] == reached["best_step"])
    return Trained(
        Pin.of(folder / "learner.pt"), data, run.id, reached["step"], reached["best_step"],
        settings.validation_shape, best["validation"], best["margin"], reached["seconds"],
    )  # fmt: skip


def _chosen(recipe: Recipe, data: DataVersion, folder: Path) -> Trained:
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with records.training_run(recipe, data, folder) as run:
        chosen, learner, tried = heads.choose(recipe, data)
        best = next((one for one in tried if one.chosen), None)
        history = [] if best is None else [
            {"step": 0, "validation": best.accuracies[0], "margin": best.margins[0]}
        ]  # fmt: skip
        learners.save(folder / "learner.pt", learner, chosen, data, history)
        if tried:
            run.table("heads", [asdict(one) for one in tried])
    seconds = time.monotonic() - began
    learned = Pin.of(folder / "learner.pt"), data, run.id, 0, 0
    if best is None:
        return Trained(*learned, None, None, None, seconds)
    return Trained(*learned, best.shapes[0], best.accuracies[0], best.margins[0], seconds, best.label, tried)


def evaluate(recipe: Recipe, data: DataVersion, learner: Trained) -> Scores:
    """Score on the same seeded test episodes as everyone, after calibrating on validation episodes."""
    test = _tested(recipe, data)
    model, where = learners.load(learner.learner.file).to(heads.device()), heads.device()
    (trials, seen), shapes = heads.trials(model, recipe, data), recipe.evaluation.shapes
    fits, pairs = dict[Shape, Calibration](), None
    if not trials:
        progress.say("  no validation classes: probabilities are not calibrated, and nothing counts as unknown")
    for shape in shapes if trials else ():
        size = _calibrated_at(shape, [images for _, images in trials])
        with _stage(f"calibration on {_few(recipe)} validation episodes, {size}"):
            fits[shape] = calibrate(trials, size, _few(recipe), seed=TEST_SEED, seen=seen, device=where)
    if trials:
        pairs = verification(trials, VERIFICATION_PAIRS, seed=TEST_SEED, device=where)
    scores, lines = [], []
    parts = heads.tested(model, recipe, data, test)
    crossed = ", cross-validated" if heads.cross_validated(recipe) else ""
    for shape in shapes:
        fit = fits.get(shape)
        for protocol in [images.protocol for images in protocols(parts[0][1], fitting(shape, parts[0][1]))]:
            drawn = [(learner, images.with_protocol(protocol)) for learner, images in parts]
            for transductive in (False, True) if model.backbone.norm == "batch" else (False,):
                with _stage(f"{recipe.evaluation.episodes} episodes, {shape}, {protocol}"):
                    score = evaluate_folds(
                        drawn, shape, recipe.evaluation.episodes, seed=TEST_SEED, transductive=transductive,
                        temperature=fit.temperature if fit else 1.0, device=where,
                    )  # fmt: skip
                    unknown = None
                    if fit and not transductive:
                        smaller = fitting(shape, min((images for _, images in parts), key=len))
                        unknown = open_set(drawn, smaller, fit, _few(recipe), seed=TEST_SEED, device=where)
                scores.append(score)
                lines.append(
                    Line(
                        score.shape, score.episodes, transductive, f"{protocol}{crossed}",
                        score.accuracy, score.margin, score.ece, unknown,
                    )
                )  # fmt: skip
    cosine = heads.cosine(parts, shapes[0], recipe.evaluation.episodes, data.name)
    return _keep(scores, lines, tuple(dict.fromkeys(fits.values())), pairs, cosine, recipe, data, learner)


def export(recipe: Recipe, learner: Trained, score: Scores) -> Exported:
    """Write the learner as ONNX with all that serving needs to know, checked against torch."""
    from kshot import exporting  # brings the exporter's libraries, which take a second

    model, splits = learners.load(learner.learner.file), recipe.dataset
    shape = score.lines[0].shape
    folder = learner.folder / keys.export(recipe, learner, score).replace("export", "bundle")[:19]
    test = known = score.data.classes(splits.test)
    if recipe.training.refit and (base := heads.base(recipe, score.data)):
        known = base if heads.cross_validated(recipe) else ClassImages.joined([base, test])
        heads.learn_statistics(model, known, score.data.name)
    with _stage("tracing to ONNX, and comparing with torch"):
        report = exporting.export(
            model, folder, facts=_facts(learners.recipe(learner.learner.file), learner, score),
            data=test, shape=shape, seed=score.seed, store=heads.store(),
        )  # fmt: skip
    parity = report.manifest.parity
    files = tuple(Pin.of(folder / name) for name in (MANIFEST, *report.manifest.files))
    return Exported(files, parity.agreement, parity.logit_difference, _latency(Bundle.open(folder), shape))


def register(recipe: Recipe, data: DataVersion, score: Scores, bundle: Exported) -> Registered:
    """Log everything of the experiment in one MLflow run, and make the bundle a version of the recipe's model."""
    evidence = json.dumps(contest.evidence_of(data, score, bundle).to_dict())
    first = score.lines[0]
    with progress.busy("metrics, pictures and files"), records.version_run(recipe, data, score.learner) as run:
        records.log_scores(run, recipe, score.learner, score)
        run.text(contest.EVIDENCE, evidence)
        version = registry.register(
            recipe.name,
            run.id,
            bundle.folder,
            tags={"accuracy": f"{first.accuracy:.6f}", "margin": f"{first.margin:.6f}"},
        )
        records.mark_registered(run, version)
    file = bundle.folder.with_suffix(".evidence.json")
    file.write_text(evidence)
    return Registered(recipe.name, version, run.id, tracking.public(tracking.store()), Pin.of(file), data)


def unregister(version: Registered) -> None:
    """Take a version back out of the registry."""
    tracking.client().delete_model_version(version.name, str(version.version))


def remove_bundle(bundle: Exported) -> None:
    """Take a bundle's files away."""
    shutil.rmtree(bundle.folder, ignore_errors=True)


def promote(recipe: Recipe, version: Registered) -> Promotion:
    """Let a version meet the champion: into production if the gate opens, and else it waits in staging.

    A version that someone archived stays there: what a person took out of service, no schedule puts back.
    """
    settings = GateSettings.of(recipe.gate)
    name, number = version.name, version.version
    stage = next(one.stage for one in registry.versions(name) if one.version == number)
    if stage is Stage.PRODUCTION:
        known = registry.gate_report(name, number)
        warnings = known.warnings if known else ()
        return Promotion(name, number, stage, number, "it is in production already", warnings=warnings)
    if stage is Stage.ARCHIVED:
        why = f"it was archived, and only a person brings it back: kshot promote {name} {number} production"
        return Promotion(name, number, stage, registry.champion(name), why)
    if stage is Stage.NONE:
        registry.move(name, number, Stage.STAGING, why="made by the pipeline")
    challenger = Evidence.from_dict({**json.loads(version.evidence.file.read_text()), "version": number})
    while True:
        champion = registry.champion(name)
        try:
            other = None
            if champion is not None:
                other = contest.champions_evidence(name, champion, challenger, version.data, recipe.dataset.test)
        except KshotError as error:
            return Promotion(name, number, Stage.STAGING, champion, str(error), judged=False)
        report = judge(challenger, other, settings, champion if other is None else None)
        registry.record_gate(name, number, report.to_dict())
        if not report.passed:
            return Promotion(name, number, Stage.STAGING, champion, "; ".join(report.failures))
        with suppress(StageConflictError):  # another version came first: meet that one
            first = "the first version" if champion is None else f"not compared with version {champion}"
            why = "passed the gate" + (f" against version {champion}" if other else f", {first}")
            registry.promote(name, number, Stage.PRODUCTION, why=why)
            return Promotion(name, number, Stage.PRODUCTION, champion, why, warnings=report.warnings)


def _facts(recipe: Recipe, learner: Trained, score: Scores) -> manifest.Facts:
    """What a bundle says of where it comes from and of what to expect of it."""
    commit, dirty, _ = tracking.git()
    found = plugins.find()
    own, *others = score.data.refs(recipe.dataset)
    learned_from = [own.name, *(other.name for other in others if other.context == own.context)]
    return manifest.Facts(
        learner=_plugin(found.learner(recipe.learner.one), recipe.learner.options),
        backbone=_plugin(found.backbone(recipe.backbone.name), recipe.backbone.options),
        image=score.data.open().rule,
        calibration=tuple(
            manifest.Calibration(
                ways=fit.shape.ways, shots=fit.shape.shots, temperature=fit.temperature, by=fit.by,
                threshold=fit.threshold, auroc=fit.auroc, false_accepts=fit.false_accepts, ece=fit.ece,
                points=tuple(manifest.OperatingPoint(**asdict(point)) for point in fit.points),
            )
            for fit in score.calibrations
        ),
        verification=None if score.verification is None else manifest.Verification(**asdict(score.verification)),
        expected=tuple(
            manifest.Accuracy(**asdict(line.shape), episodes=line.episodes, accuracy=line.accuracy, margin=line.margin)
            for line in score.lines
            if not line.transductive and line.protocol == score.lines[0].protocol
        ),
        source=manifest.Source(
            dataset="+".join(learned_from), dataset_hash=own.digest,
            commit=f"{commit}-dirty" if commit and dirty else commit or "", run_id=learner.run, recipe=recipe.name,
        ),
    )  # fmt: skip


def _plugin(provided: Provided, options: dict[str, Any]) -> manifest.Plugin:
    config = provided.value.Config.model_validate(options).model_dump(mode="json")
    return manifest.Plugin(
        name=provided.name, config=config, distribution=provided.distribution, version=provided.version
    )  # fmt: skip


def _latency(bundle: Bundle, shape: Shape) -> float:
    """Milliseconds that the bundle takes for one photo, the median of some, on this machine's CPU."""
    photos = np.zeros((shape.ways * shape.shots, *bundle.manifest.image.shape), np.uint8)  # (S, C, H, W)
    labels = np.arange(shape.ways).repeat(shape.shots)
    state = bundle.adapt_arrays(photos, labels, np.arange(shape.ways))
    took = []
    for _ in range(30):
        began = time.perf_counter()
        bundle.logits(state, photos[:1])
        took.append(1000 * (time.perf_counter() - began))
    return float(np.median(took))


def _refuse_unlike(found: Sequence[ImageSet]) -> None:
    own = found[0]
    for other in found[1:]:
        if other.rule.shape != own.rule.shape:
            raise KshotError(
                f"data set {other.name!r} holds images {other.rule.shape} and {own.name!r} {own.rule.shape}; those of "
                f"one recipe must be alike. Import one again: kshot data import SOURCE {other.name} "
                f"--size {own.rule.size} --channels {own.rule.channels} --replace"
            )


def _refuse_seen(recipe: Recipe, data: DataVersion) -> None:
    """What is tested must be new to the learner. Within one data set, its import has seen to that."""
    for packed, splits in data.parts(recipe.dataset.test):
        tested = packed.open().hashes(splits)
        for setting in ("train", "validation", "unlabelled"):
            for other, seen in data.parts(getattr(recipe.dataset, setting)):
                if other != packed and (both := tested.keys() & other.open().hashes(seen).keys()):
                    raise KshotError(
                        f"{len(both)} of the {len(tested)} images of {packed.name}:{splits} in dataset.test are in "
                        f"{other.name}:{seen} of dataset.{setting} too, such as {min(tested[each] for each in both)}. "
                        "What is tested must be new to the learner: take other images for one of them."
                    )


def _tested(recipe: Recipe, data: DataVersion) -> ClassImages:
    """The test classes: all episodes that the recipe asks for can be drawn."""
    splits, training = recipe.dataset, recipe.training
    test = data.classes(splits.test)
    for shape in recipe.evaluation.shapes if not heads.cross_validated(recipe) else ():
        _fits(test, shape, splits.test, "evaluation.ways=[{}]", "evaluation.queries={}")
    if training.steps:
        validation, size = data.classes(splits.validation), training.validation_shape
        _fits(validation, size, splits.validation, "training.validation_ways={}", "training.validation_queries={}")
        for shape in training.shapes:
            _fits(data.classes(splits.train), shape, splits.train, "training.ways={}", "training.queries={}")
    return test


def _fits(images: ClassImages, shape: Shape, split: str, ways: str, queries: str) -> None:
    try:
        check_shape(images, shape, (ways, queries))
    except KshotError as error:
        raise KshotError(f"[{ways.partition('.')[0]}] asks for {shape} of {split!r}: {error}") from None


def _checkpoint(folder: Path) -> dict[str, Any]:
    """What the last checkpoint of a training says; nothing where there is none."""
    with suppress(FileNotFoundError):
        held: dict[str, Any] = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")
        return held
    return {}


@contextmanager
def _stage(what: str) -> Iterator[None]:
    """Long work that is told of; what it leaves free goes back to the system, or each stage would add to the last."""
    with progress.busy(what):
        yield
    memory.give_back()


def _calibrated_at(shape: Shape, parts: Sequence[ClassImages]) -> Shape:
    """The size of episode to calibrate at: as it is tested, if one class at least is left to be unknown."""
    size = fitting(shape, min(parts, key=lambda images: int(images.counts.min())))
    return replace(size, ways=min(shape.ways, max(2, min(map(len, parts)) - 1)))


def _few(recipe: Recipe) -> int:
    """Episodes for what needs no narrow interval: each of them has many queries."""
    return min(CALIBRATION_EPISODES, recipe.evaluation.episodes)


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
    """Write scores to files beside the learner: a summary to read, and the results of every episode."""
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
                "seed": TEST_SEED,
                "split": recipe.dataset.test,
                "lines": [asdict(line) for line in lines],
                "calibrations": [asdict(calibration) for calibration in calibrations],
                "verification": None if pairs is None else asdict(pairs),
            },
            indent=2,
        )
    )
    return Scores(
        tuple(lines), calibrations, pairs, Pin.of(report), Pin.of(arrays), TEST_SEED, recipe.dataset.test, learner, data
    )
