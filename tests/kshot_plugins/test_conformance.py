"""Every learner that is installed keeps every promise of the contract; discovery finds them, no list."""

from functools import cache

import pytest

from kshot import plugins
from kshot.testing import CHECKS, Subject

EVERY = [p.name for p in plugins.find().of("learners")]
FASTER = {"reptile": {"eval_steps": 15}}  # of 50 steps that are all alike
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
    check(Subject(name, folder_of(name), FASTER.get(name, {})))


@pytest.mark.parametrize(("check", "name", "options", "norm"), IN_VARIANTS)
def test_the_learner_keeps_the_contract_in_its_variants(check, name, options, norm, tmp_path):
    check(Subject(name, tmp_path, options, norm))
