"""The conformance kit: checks of the contract that every learner must keep, each on a toy problem.

The first paragraph of a check's docstring states the rule, the others what to do if it fails; `kshot plugin check NAME`
prints both. A check returns the reason if the learner is exempt from it. With pytest:

    from kshot.testing import CHECKS, Subject

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_learner_keeps_the_contract(check, tmp_path):
        check(Subject("my-learner", folder=tmp_path))
"""

from kshot.testing.contract import (
    accuracy_without_information_is_chance,
    adapting_leaves_the_learner_as_it_was,
    any_ways_and_uneven_shots_fit,
    config_round_trips,
    state_is_flat_and_logits_are_finite,
)
from kshot.testing.export import onnx_agrees_with_torch
from kshot.testing.gradients import (
    a_batch_may_be_split_unless_coupled,
    evaluation_keeps_no_graph,
    meta_gradient_agrees_with_finite_differences,
)
from kshot.testing.helpers import Check
from kshot.testing.invariance import (
    a_query_is_seen_through_embed_only,
    episodes_of_a_batch_are_fitted_as_one_by_one,
    one_query_does_not_depend_on_its_companions,
    order_of_the_support_set_does_not_matter,
    permuting_the_classes_permutes_the_logits,
)
from kshot.testing.subject import SIDE, Pixels, Subject, toy_images
from kshot.testing.training import GAIN, learns_a_toy_problem, more_shots_never_cost_accuracy

CHECKS: list[Check] = [
    state_is_flat_and_logits_are_finite,
    any_ways_and_uneven_shots_fit,
    adapting_leaves_the_learner_as_it_was,
    evaluation_keeps_no_graph,
    order_of_the_support_set_does_not_matter,
    permuting_the_classes_permutes_the_logits,
    one_query_does_not_depend_on_its_companions,
    a_query_is_seen_through_embed_only,
    episodes_of_a_batch_are_fitted_as_one_by_one,
    a_batch_may_be_split_unless_coupled,
    accuracy_without_information_is_chance,
    config_round_trips,
    meta_gradient_agrees_with_finite_differences,
    learns_a_toy_problem,
    more_shots_never_cost_accuracy,
    onnx_agrees_with_torch,
]
"""All checks, in the order in which they run."""

__all__ = [
    "CHECKS",
    "GAIN",
    "SIDE",
    "Check",
    "Pixels",
    "Subject",
    "a_batch_may_be_split_unless_coupled",
    "a_query_is_seen_through_embed_only",
    "accuracy_without_information_is_chance",
    "adapting_leaves_the_learner_as_it_was",
    "any_ways_and_uneven_shots_fit",
    "config_round_trips",
    "episodes_of_a_batch_are_fitted_as_one_by_one",
    "evaluation_keeps_no_graph",
    "learns_a_toy_problem",
    "meta_gradient_agrees_with_finite_differences",
    "more_shots_never_cost_accuracy",
    "one_query_does_not_depend_on_its_companions",
    "onnx_agrees_with_torch",
    "order_of_the_support_set_does_not_matter",
    "permuting_the_classes_permutes_the_logits",
    "state_is_flat_and_logits_are_finite",
    "toy_images",
]
