"""Every learner that is installed keeps every promise of the contract; discovery finds them, no list."""

from functools import cache

import pytest
import torch

from kshot import plugins
from kshot.data.episodes import Shape
from kshot.evaluation.scores import evaluate
from kshot.ops import one_hot
from kshot.testing import CHECKS, SIDE, Subject, toy_images

EVERY = [p.name for p in plugins.find().of("learners")]
# Settings that change the mathematics, for the checks that these can break. A norm by itself is a variant for training
# only: all cheap checks run under every norm, and export has tests of its own for each.
VARIANTS = [
    ("anil", {"learn_rate": True}, "batch"),
    ("baselinepp", {"learn_scale": True, "steps": 20}, None),
    ("clusters", {}, "support"),
    ("cnp", {}, "batch"),
    ("maml", {}, "group"),
    ("maml", {"head": "prototypes", "length": 3.0, "per_step": True, "learn_rate": True}, "batch"),
    ("maml", {"learn_rate": True}, "running"),
    ("maml", {"first_order": True, "steps": 2}, None),
    ("matching", {"fce": True}, None),
    ("metabaseline", {"pretrain": 0}, None),
    ("metagan", {}, "support"),
    ("metalstm", {"steps": 2}, "group"),
    ("cnaps", {}, "group"),
    ("cnaps", {}, "support"),
    ("metasgd", {"steps": 3}, "group"),
    ("protonet", {}, "support"),
    ("relation", {"loss": "cross_entropy"}, "support"),
    ("reptile", {"eval_steps": 5}, "group"),
]
TRAINED = ("meta_gradient_agrees_with_finite_differences", "learns_a_toy_problem")
TOUCHED = (
    *TRAINED,
    "adapting_leaves_the_learner_as_it_was",
    "permuting_the_classes_permutes_the_logits",
    "one_query_does_not_depend_on_its_companions",
    "episodes_of_a_batch_are_fitted_as_one_by_one",
)
IN_VARIANTS = [
    pytest.param(check, *variant, id=f"{'-'.join(map(str, variant))}-{check.__name__}")
    for variant in VARIANTS
    for check in CHECKS
    if check.__name__ in (TOUCHED if variant[1] else TRAINED)
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder for each learner, so that checks of its trained self share one training."""
    return cache(tmp_path_factory.mktemp)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EVERY)
def test_the_learner_keeps_the_contract(check, name, folder_of):
    check(Subject(name, folder_of(name)))


@pytest.mark.parametrize(("check", "name", "options", "norm"), IN_VARIANTS)
def test_the_learner_keeps_the_contract_in_its_variants(check, name, options, norm, tmp_path):
    check(Subject(name, tmp_path, options, norm))


def test_without_training_no_learner_passes_for_one_that_learns(tmp_path):
    """The toy problem is one that an untrained learner hardly solves, and no training is no gain."""
    problem = toy_images(seed=2, stripes=True)
    for name in ("protonet", "cnaps", "cosine"):
        torch.manual_seed(0)
        learner = Subject(name, tmp_path).recipe.build((1, SIDE, SIDE))
        assert evaluate(learner, problem, Shape(5, 1, 9), 25, seed=0).accuracy < 0.5
    [learns] = [check for check in CHECKS if check.__name__ == "learns_a_toy_problem"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kshot.testing.meta_train", lambda *_, **__: iter(()))
        with pytest.raises(AssertionError, match=r"lift accuracy from .* by 0\.0 ± 0\.0 points"):
            learns(Subject("protonet", tmp_path))


def test_a_learner_that_forgets_to_divide_by_the_shots_is_found_at_more_of_them(tmp_path, monkeypatch):
    """Sums of features are means at 1 shot, where it is trained, and five times too long at 5."""

    def sums(features, labels, classes):
        return one_hot(labels, classes).t() @ features

    [loses_none] = [check for check in CHECKS if check.__name__ == "more_shots_never_cost_accuracy"]
    monkeypatch.setattr("kshot_plugins.protonet.class_means", sums)
    with pytest.raises(AssertionError, match=r"5 shots change accuracy from .* by -"):
        loses_none(Subject("protonet", tmp_path))
