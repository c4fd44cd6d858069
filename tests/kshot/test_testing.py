"""The conformance kit finds every broken promise: each check has learners that break it, and must fail it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from kshot import (
    Episodes,
    FeatureLearner,
    InnerLoop,
    KshotError,
    Learner,
    LearnerConfig,
    State,
    class_means,
    cross_entropy,
    gradient,
    one_hot,
    plugins,
    squared_distances,
)
from kshot.gradients import value_and_gradient
from kshot.plugins import Found, Provided
from kshot.testing import CHECKS, Subject

KIT = {check.__name__: check for check in CHECKS}
MUTANTS: list[tuple[str, str, type[Learner]]] = []


def breaks(check: str, message: str) -> Callable[[type[Learner]], type[Learner]]:
    """A learner that breaks the promise of this check, which says so in a message with these words."""

    def add(learner: type[Learner]) -> type[Learner]:
        MUTANTS.append((check, message, learner))
        return learner

    return add


class Means(FeatureLearner):
    """Keeps every promise: a query belongs to the nearest mean."""

    name = "mutant"

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": class_means(features, labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return -squared_distances(features, state["means"])


class Descent(InnerLoop):
    """Keeps every promise: each class starts at one learned row, and takes one step of gradient descent from there."""

    name = "mutant"
    steps: ClassVar[int] = 1  # type: ignore[assignment]  # a constant is all that a property need be

    def __init__(self, backbone: Any, config: LearnerConfig) -> None:
        super().__init__(backbone, config)
        self.row = nn.Parameter(torch.zeros(backbone.features))

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"head": self.row.expand(classes.shape[0], -1)}

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        slopes = gradient(lambda fast: self.loss(fast, support, labels, classes), state)
        return {"head": state["head"] - slopes["head"]}

    def loss(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        return cross_entropy(self.classify(state, support), one_hot(labels, classes))

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return state | self.measure(support)[1]

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.embed(query, state) @ state["head"].t()


# The state


@breaks("state_is_flat_and_logits_are_finite", "adapt must return a dict|fit must return a dict")
class ReturnsNothing(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        self.means = class_means(features, labels, classes)
        return None  # type: ignore[return-value]  # the mutation


@breaks("state_is_flat_and_logits_are_finite", "these entries are not tensors: {'classes': 'a dict'}")
class NestsItsState(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"classes": super().fit(features, labels, classes)}  # type: ignore[dict-item]  # the mutation


@breaks("state_is_flat_and_logits_are_finite", "must be float32; these are not: {'means': torch.float64}")
class KeepsDoubles(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": class_means(features, labels, classes).double()}


@breaks("state_is_flat_and_logits_are_finite", "logits must be finite")
class DividesByZero(Means):
    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(state, features) / features.new_zeros(())


@breaks("state_is_flat_and_logits_are_finite", r"logits must be \(queries, ways\) = \(15, 5\); they are \(5, 15\)")
class TransposesItsLogits(Means):
    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(state, features).t()


# Sizes


@breaks("any_ways_and_uneven_shots_fit", "shape .* is invalid")
class WantsEqualShots(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        sorted_by_class = features[labels.argsort(stable=True)]
        return {"means": sorted_by_class.view(classes.shape[0], -1, features.shape[1]).mean(1)}


@breaks("any_ways_and_uneven_shots_fit", "2 ways gave logits|must match")
class HasFiveRows(Means):
    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(state, features) + features.new_zeros(5)


@breaks("any_ways_and_uneven_shots_fit", "gave logits that are not finite")
class TakesLabelsForNumbers(Means):
    """Labels are ids, and not the numbers of columns."""

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        members = one_hot(labels, torch.arange(classes.shape[0])).to(features.dtype)
        return {"means": members.t() @ features / members.sum(0)[:, None]}


# Memory


@breaks("adapting_leaves_the_learner_as_it_was", "adapting or classifying changed calls")
class CountsItsCalls(Means):
    def __init__(self, backbone: Any, config: LearnerConfig) -> None:
        super().__init__(backbone, config)
        self.calls = nn.Buffer(torch.tensor(0.0))

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        self.calls.add_(1)
        return super().fit(features, labels, classes)


@breaks("adapting_leaves_the_learner_as_it_was", "changed the logits of an earlier state")
class Remembers(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        self.last = super().fit(features, labels, classes)
        return {"nothing": features.new_zeros(1)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(self.last, features)


@breaks("adapting_leaves_the_learner_as_it_was", "the same episode gave other logits the second time")
class Draws(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        means = class_means(features, labels, classes)
        return {"means": means + 0.01 * torch.randn_like(means)}


@breaks("evaluation_keeps_no_graph", "create_graph=True")
class KeepsGraphs(Descent):
    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        head = state["head"].detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss({"head": head}, support, labels, classes)
            [slope] = torch.autograd.grad(loss, [head], create_graph=True)
        return {"head": state["head"] - slope}


# Order


@breaks("order_of_the_support_set_does_not_matter", "another support order")
class TakesTheFirstImage(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": features[one_hot(labels, classes).argmax(0)]}


@breaks("permuting_the_classes_permutes_the_logits", "classes in another order")
class HasARowForEachPlace(Descent):
    """A random row for each place in the list of classes, as in a network with a fixed head."""

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        drawn = torch.randn(100, self.backbone.features, generator=torch.Generator().manual_seed(0))
        return {"head": drawn[: classes.shape[0]].to(support.dtype)}


@breaks("permuting_the_classes_permutes_the_logits", "classes in another order")
class PrefersTheFirstClass(Means):
    def logits(self, state: State, features: Tensor) -> Tensor:
        logits = super().logits(state, features)
        return logits - 0.1 * torch.arange(logits.shape[1])


# Companions


@breaks("one_query_does_not_depend_on_its_companions", "a query by itself")
class CentresTheQueries(Means):
    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(state, features - features.mean(0))


@breaks("one_query_does_not_depend_on_its_companions", "a query by itself")
class ForgetsTheStatistics(Descent):
    """Queries are then normalised by their own batch under the norms `support` and `batch`."""

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return state


@breaks("a_query_is_seen_through_embed_only", "a query's features in its place|Dimension out of range")
class LooksAtPixels(Means):
    def classify(self, state: State, query: Tensor) -> Tensor:
        return super().classify(state, query) + query.mean((1, 2, 3))[:, None]


@breaks("a_query_is_seen_through_embed_only", "a support set's features in its place")
class EmbedsTheSupportItsOwnWay(Means):
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return self.fit(self.embed(support.flip(-1) if support.dim() == 4 else support), labels, classes)


@breaks("episodes_of_a_batch_are_fitted_as_one_by_one", r"item\(\)")
class TakesANumber(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": class_means(features, labels, classes) * (1 + 0 * features.sum().item())}


@breaks("a_batch_may_be_split_unless_coupled", "norm = 'running' is not in `coupled`, but .* changes the outer step")
class SaysThatABatchMayBeSplit(Means):
    coupled = ()


@breaks("a_batch_may_be_split_unless_coupled", "norm = 'support' is in `coupled`, but .* not change the outer step")
class SaysThatNoBatchMayBeSplit(Means):
    coupled = FeatureLearner.norms


# What can be known


@breaks("accuracy_without_information_is_chance", "shuffled support labels: .* labels leak")
class KnowsTheOrderOfTheSupport(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return super().fit(features, classes.repeat_interleave(labels.shape[0] // classes.shape[0]), classes)


@breaks("accuracy_without_information_is_chance", "no inner step: .* labels leak")
class StartsFromTheOrderOfTheQueries(Descent):
    """The first step hides it, so only an inner loop without one shows it."""

    def classify(self, state: State, query: Tensor) -> Tensor:
        logits = super().classify(state, query)
        places = torch.arange(logits.shape[0]) * logits.shape[1] // logits.shape[0]
        return logits + (state["head"] == self.row).all() * one_hot(places, torch.arange(logits.shape[1]))


# Settings


@breaks("config_round_trips", "must be frozen")
class CanBeChanged(Means):
    class Config(LearnerConfig):
        model_config = ConfigDict(frozen=False)


@breaks("config_round_trips", "refuse unknown keys")
class TakesAnyKey(Means):
    class Config(LearnerConfig):
        model_config = ConfigDict(extra="ignore")


@breaks("config_round_trips", "a round trip through JSON changed the settings")
class HasSettingsThatAreNoJSON(Means):
    class Config(LearnerConfig):
        pair: Any = Field((1, 2), description="a list, after JSON")


# Training


@breaks("meta_gradient_agrees_with_finite_differences", "the gradient says .*, finite differences say")
class CutsTheSupport(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return super().fit(features.detach(), labels, classes)


@breaks("meta_gradient_agrees_with_finite_differences", "the gradient says .*, finite differences say")
class IsSecretlyFirstOrder(Descent):
    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        slopes = value_and_gradient(lambda fast: self.loss(fast, support, labels, classes), state, first_order=True)[1]
        return {"head": state["head"] - slopes["head"].detach()}


@breaks("learns_a_toy_problem", "4 outer steps change accuracy from")
class LearnsNothing(Means):
    def meta_loss(self, episodes: Episodes) -> Tensor:
        return 0 * super().meta_loss(episodes)


class Centred(Means):
    """Keeps every promise: features less their mean over the base classes."""

    def __init__(self, backbone: Any, config: LearnerConfig) -> None:
        super().__init__(backbone, config)
        self.centre = nn.Buffer(torch.zeros(backbone.features))

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return super().fit(features - self.centre, labels, classes)

    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(state, features - self.centre)

    def learn_statistics(self, base: Any) -> None:
        self.centre = torch.stack([features.mean(0) for features in base]).mean(0)


@breaks("learns_a_toy_problem", "base classes in another order")
class LearnsTheLastClass(Centred):
    def learn_statistics(self, base: Any) -> None:
        self.centre = [features.mean(0) for features in base][-1] * torch.arange(self.centre.shape[0])

    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(state, features) * self.centre.square().sum()


@breaks("learns_a_toy_problem", "set the buffer centre to infinity or NaN")
class LearnsInfinity(Centred):
    def learn_statistics(self, base: Any) -> None:
        self.centre = self.centre / 0


@breaks("learns_a_toy_problem", "learn_statistics changed the parameter backbone")
class LearnsAParameter(Centred):
    def learn_statistics(self, base: Any) -> None:
        with torch.no_grad():
            next(self.backbone.parameters()).add_(1)


@breaks("learns_a_toy_problem", "should not lower it on unseen classes")
class LosesByItsStatistics(Centred):
    def logits(self, state: State, features: Tensor) -> Tensor:
        blind = self.centre.abs().sum() > 0
        return super().logits(state, torch.where(blind, 0 * features, features))


@breaks("more_shots_never_cost_accuracy", "5 shots change accuracy from .* by -")
class ForgetsToDivideByTheShots(Means):
    """Sums are means at 1 shot, where it is trained, and five times too long at 5."""

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": one_hot(labels, classes).t() @ features}


# Export


@breaks("onnx_agrees_with_torch", "works for one number of ways")
class BakesInTheWays(Means):
    def logits(self, state: State, features: Tensor) -> Tensor:
        return super().logits(state, features) / int(state["means"].shape[0])


@breaks("onnx_agrees_with_torch", "converts a tensor's value to a number")
class BakesInAValue(Means):
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        means = class_means(features, labels, classes)
        return {"means": means if float(means.sum()) > 0 else 2 * means}


@pytest.fixture
def subject_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Learner]], Subject]:
    def subject(learner: type[Learner]) -> Subject:
        provided = Provided("learners", learner.name, learner, "mutants", "tests", "0")
        found = Found([*plugins.find().of("backbones"), provided])
        monkeypatch.setattr(plugins, "find", lambda: found)
        return Subject(learner.name, tmp_path, steps=4)

    return subject


@pytest.mark.parametrize(
    ("check", "message", "mutant"), [pytest.param(*case, id=f"{case[2].__name__}-{case[0]}") for case in MUTANTS]
)
def test_a_learner_that_breaks_a_promise_is_found(check, message, mutant, subject_of):
    with pytest.raises((AssertionError, KshotError, RuntimeError, IndexError), match=message) as found:
        KIT[check](subject_of(mutant))
    if mutant is ForgetsTheStatistics:
        assert found.value.__notes__ == ["with [backbone] norm = 'support'"]


def test_every_check_has_a_learner_that_must_fail_it():
    assert {check for check, _, _ in MUTANTS} == set(KIT)


@pytest.mark.parametrize("learner", [Means, Descent, Centred])
def test_the_learners_that_were_not_broken_keep_their_promises(learner, subject_of):
    subject = subject_of(learner)
    for name in KIT.keys() - {"onnx_agrees_with_torch", "learns_a_toy_problem"}:
        KIT[name](subject)
