"""Every learner that is installed keeps every promise of the contract; discovery finds them, no list."""

import pytest

from kshot import plugins
from kshot.testing import CHECKS, Subject

EVERY = [(p.name, {}) for p in plugins.find().of("learners")]
NORMS = [(name, {"norm": norm}) for name in ("maml", "protonet") for norm in ("group", "transductive")]
FURTHER = [("maml", {"first_order": True}), ("maml", {"learn_rate": True, "norm": "running"})]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "options"), EVERY + NORMS + FURTHER, ids=str)
def test_the_learner_keeps_the_contract(check, name, options, tmp_path):
    check(Subject(name, tmp_path, options))
