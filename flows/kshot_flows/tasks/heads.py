"""Selection on validation episodes: heads by cross-validation over classes, and numbers of inner steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from kshot import plugins, selection
from kshot.backbones import Backbone, PretrainedBackbone
from kshot.data.datasets import ClassImages, splits_of
from kshot.data.embeddings import ClassFeatures
from kshot.data.episodes import Shape
from kshot.data.importing import Progress
from kshot.evaluation.calibration import Trial
from kshot.evaluation.scores import Score
from kshot.learner import FeatureLearner, InnerLoop, Learner
from kshot.norms import BY_ITSELF
from kshot.recipe import LearnerSettings, Recipe
from kshot.selection import Tried, select
from kshot_flows.console import progress
from kshot_flows.store import embeddings, keys
from kshot_flows.store.products import Attempt, DataVersion


def base(recipe: Recipe, data: DataVersion) -> ClassImages | None:
    """The base classes, for selecting a head and learning its statistics: those of training and validation.

    Test classes are excluded; None if no such split exists.
    """
    own, known = recipe.dataset.name, {packed.name: packed.open().splits for packed in data.all}
    tested = [] if cross_validated(recipe) else _single(recipe.dataset.test, own)
    there = [
        f"{name}:{split}"
        for reference in (recipe.dataset.train, recipe.dataset.validation)
        for name, split in _single(reference, own)
        if (name, split) not in tested and split in known.get(name, ())
    ]
    return data.classes("+".join(dict.fromkeys(there))) if there else None


def cross_validated(recipe: Recipe) -> bool:
    """Whether results are cross-validated over folds of the base classes, because there are no test classes."""
    return recipe.training.steps == 0 and recipe.dataset.test == recipe.dataset.train


def tested(learner: Learner, recipe: Recipe, data: DataVersion, test: ClassImages) -> list[Trial]:
    """Pairs of learner and test classes: one, or one per fold, with statistics of the other base classes."""
    classes = base(recipe, data) if cross_validated(recipe) else None
    if classes is None:
        return [(learner, embeddings.features(learner, test, data.name))]
    known = embeddings.features(learner, classes, data.name)
    return selection.trials(learner, selection.folds_of(known, recipe.training.folds, recipe.seed))


def _single(reference: str, own: str) -> list[tuple[str, str]]:
    """The (data set, split) pairs of a reference."""
    return [(name, split) for name, splits in splits_of(reference, own).items() for split in splits.split("+")]


def choose(recipe: Recipe, data: DataVersion) -> tuple[Recipe, Learner, tuple[Attempt, ...]]:
    """Select a head: the recipe with it and its settings, the learner with its statistics, and all candidates.

    Heads are compared by folds over the base classes, on the same episodes; of equal ones the first is selected.
    """
    image, classes = data.open().rule.shape, base(recipe, data)
    bodies: dict[str, Backbone] = {}  # per kind of features, shared by all its heads
    variants = []
    for variant in recipe.variants():
        kind = str(variant.backbone.options)
        body = bodies[kind] = bodies.get(kind) or variant.build_backbone(image)
        variants.append((variant, variant.build_head(body)))
    if classes is None:
        progress.say(f"  {data.name} has no classes to train or validate on: taken as it is, without a validation")
        return *variants[0], ()
    settings, tried = recipe.training, list[Tried]()
    learns = any(isinstance(head, FeatureLearner) and head.closed_form for _, head in variants)
    count = sum(len(head.choices()) if isinstance(head, FeatureLearner) else 1 for _, head in variants)
    with progress.counting("comparing heads") as watch:
        for one in select(
            variants, lambda head: embeddings.features(head, classes, data.name), settings.shapes,
            folds=settings.folds if learns or len(variants) > 1 else 1,
            episodes=settings.validation_episodes, seed=recipe.seed, device=embeddings.device(),
        ):  # fmt: skip
            tried.append(one)
            watch(Progress(len(tried), count, str(one)))
    best = selection.choose(tried)
    learner = next(head for variant, head in variants if variant is best.recipe)
    learner.config = learner.config.model_copy(update=best.settings)
    learn_statistics(learner, classes, data.name)
    name = best.recipe.learner.one
    chosen = LearnerSettings(name=name, **{**best.recipe.learner.options, **best.settings})
    attempts = tuple(_attempt(one, chosen=one is best) for one in tried)
    return best.recipe.model_copy(update={"learner": chosen}), learner, attempts


def choose_steps(recipe: Recipe, learner: Learner, data: DataVersion) -> Recipe:
    """The recipe with the numbers of inner steps that are best on validation episodes, if it does not set them."""
    if not (isinstance(learner, InnerLoop) and learner.most_steps):
        return recipe
    settings, classes = recipe.training, data.classes(recipe.dataset.validation)
    classes = classes.with_protocol("random photos")  # across groups, some shapes cannot be drawn
    shots = {1, 5, *(shape.shots for shape in settings.shapes)}
    shapes = [Shape(settings.validation_shape.ways, each, settings.validation_queries) for each in sorted(shots)]
    with progress.stage("inner steps for each number of shots"):
        chosen = selection.choose_steps(
            learner, embeddings.features(learner, classes, data.name), shapes,
            settings.validation_episodes, seed=recipe.seed, device=embeddings.device(),
        )  # fmt: skip
    options = LearnerSettings(name=recipe.learner.one, **{**recipe.learner.options, "eval_steps": chosen})
    return recipe.model_copy(update={"learner": options})


def trials(learner: Learner, recipe: Recipe, data: DataVersion) -> tuple[list[Trial], Trial | None]:
    """Pairs of learner and classes for calibration that it has not learned from; empty without such classes.

    Those are validation classes. Where statistics were learned from these, they are halves with the statistics of the
    other half, and the learner beside the classes that it has seen comes too.
    """
    if recipe.training.steps:
        return [(learner, embeddings.features(learner, data.classes(recipe.dataset.validation), data.name))], None
    classes = base(recipe, data)
    if classes is None:
        return [], None
    known = embeddings.features(learner, classes, data.name)
    if not (isinstance(learner, FeatureLearner) and learner.closed_form):
        return [(learner, known)], None
    return selection.trials(learner, selection.folds_of(known, 2, recipe.seed)), (learner, known)


def cosine(parts: Sequence[Trial], shape: Shape, episodes: int, what: str) -> Score | None:
    """The accuracy of cosines to class means on the last features of the same backbone, on the same episodes.

    None if an image's features depend on other images.
    """
    backbone = copy.copy(parts[0][0].backbone)  # the weights are shared
    if backbone.norm not in BY_ITSELF:
        return None
    if isinstance(backbone, PretrainedBackbone):
        backbone.selected = "last"
    kind = plugins.find().learner("cosine").value
    head: Learner = kind(backbone, kind.Config())
    baseline = [(head, _on(head, images, what)) for _, images in parts]
    return selection.evaluate_folds(baseline, shape, episodes, seed=keys.TEST_SEED, device=embeddings.device())


def _on(learner: Learner, images: ClassImages, what: str) -> ClassImages:
    """The same classes as features of another backbone or of other stages."""
    return embeddings.features(learner, pixels(images), what)


def pixels(images: ClassImages) -> ClassImages:
    """The same classes as images."""
    return images.pixels() if isinstance(images, ClassFeatures) else images


def learn_statistics(learner: Learner, classes: ClassImages, what: str) -> None:
    """Set the statistics of a closed-form learner from these classes; other learners are unchanged."""
    if not (isinstance(learner, FeatureLearner) and learner.closed_form):
        return
    known = embeddings.features(learner, classes, what)
    if isinstance(known, ClassFeatures):
        learner.learn_statistics(known.by_class)


def _attempt(tried: Tried, chosen: bool) -> Attempt:
    scores = tried.scores
    return Attempt(
        str(tried),
        tuple(score.shape for score in scores),
        tuple(score.accuracy for score in scores),
        tuple(score.margin for score in scores),
        tried.seconds,
        chosen,
    )
