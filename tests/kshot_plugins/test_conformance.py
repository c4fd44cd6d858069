"""Every learner that is installed keeps every promise of the contract; discovery finds them, no list."""

import pytest

from kshot import plugins
from kshot.testing import CHECKS, Subject

EVERY = [(p.name, {}) for p in plugins.find().of("learners")]
# Settings that change the mathematics, for the checks that these can break; export has tests of its own for each norm.
VARIANTS = [
    ("anil", {"norm": "transductive", "learn_rate": True}),
    ("baselinepp", {"learn_scale": True, "steps": 20}),
    ("clusters", {"norm": "support"}),
    ("cnp", {"norm": "transductive"}),
    ("maml", {"norm": "group"}),
    ("maml", {"norm": "transductive", "steps": 2}),
    ("maml", {"norm": "running", "learn_rate": True}),
    ("maml", {"first_order": True, "steps": 2}),
    ("matching", {"fce": True}),
    ("metabaseline", {"pretrain": 0}),
    ("metagan", {"norm": "support"}),
    ("metalstm", {"norm": "group", "steps": 2}),
    ("metanet", {"norm": "group"}),
    ("metanet", {"norm": "support"}),
    ("metasgd", {"norm": "group", "steps": 3}),
    ("protonet", {"norm": "support"}),
    ("relation", {"loss": "cross_entropy", "norm": "support"}),
    ("reptile", {"norm": "group", "eval_steps": 5}),
]
TOUCHED = [
    check
    for check in CHECKS
    if check.__name__
    in (
        "adapting_leaves_the_learner_as_it_was",
        "permuting_the_classes_permutes_the_logits",
        "one_query_does_not_depend_on_its_companions",
        "meta_gradient_agrees_with_finite_differences",
        "learns_a_toy_problem",
    )
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_the_learner_keeps_the_contract(check, name, options, tmp_path):
    check(Subject(name, tmp_path, options))


@pytest.mark.parametrize("check", TOUCHED, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_the_learner_keeps_the_contract_in_its_variants(check, name, options, tmp_path):
    check(Subject(name, tmp_path, options))
