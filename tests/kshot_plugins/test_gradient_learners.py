"""Learners by gradient on two-pixel images that a reader can work out by hand, and against plain definitions."""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from kshot import InnerLoop
from kshot.data.episodes import Episodes, Shape, sample_episodes
from kshot.export import Facts, export
from kshot.gradients import value_and_gradient
from kshot.testing import Pixels, Subject, toy_images
from kshot.training import Progress, Training, meta_train
from kshot_plugins.anil import ANIL
from kshot_plugins.gradient_learner import HEAD
from kshot_plugins.maml import MAML
from kshot_plugins.metalstm import Gate, MetaLSTM, preprocessed
from kshot_plugins.metasgd import MetaSGD
from kshot_plugins.reptile import Reptile, minibatches
from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin


def pixels(*rows: list[float]) -> torch.Tensor:
    """Images of two pixels each: (N, 1, 1, 2)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :]


# The head starts at zero, so both classes start at 1/2 and a row's gradient is (1/3) sum (p - y) x. For class 7, p - y
# is -1/2, -1/2, +1/2: the weight's sum is (-1 + 2, 2) = (1, 2) and the bias's -1/2; class 9 has the opposite.
SUPPORT, LABELS, CLASSES = pixels([0, 0], [2, 0], [4, 4]), torch.tensor([7, 7, 9]), torch.tensor([7, 9])
WEIGHT_GRADIENT = torch.tensor([[1.0, 2.0], [-1.0, -2.0]]) / 3
BIAS_GRADIENT = torch.tensor([-0.5, 0.5]) / 3


class ScaledPixels(Pixels):
    """Pixels times one weight: a backbone that trains and exports in no time."""

    def __init__(self, image: tuple[int, int, int]) -> None:
        super().__init__(image)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(images)


def batch(ways: int = 3, episodes: int = 2, dtype: torch.dtype = torch.float64) -> Episodes:
    return sample_episodes(toy_images(), Shape(ways, 2, 2), episodes, seed=5, step=0).to("cpu", dtype)


def test_a_value_comes_with_its_gradient_and_both_or_neither_can_be_differentiated_again():
    x = torch.tensor([3.0], requires_grad=True)
    value, gradients = value_and_gradient(lambda fast: (fast["x"] ** 2).sum(), {"x": x})
    assert (value.item(), gradients["x"].item()) == (9.0, 6.0)
    assert value.requires_grad
    assert torch.autograd.grad(gradients["x"], x)[0].item() == 2.0
    value, gradients = value_and_gradient(lambda fast: (fast["x"] ** 2).sum(), {"x": x}, first_order=True)
    assert not value.requires_grad
    assert not gradients["x"].requires_grad


# What they share


@pytest.mark.parametrize(
    ("name", "options", "norm"),
    [
        ("maml", {"steps": 3}, "group"),
        ("maml", {"first_order": True, "learn_rate": True}, "support"),
        ("metasgd", {}, "batch"),
    ],
)
def test_a_zero_heads_first_step_in_closed_form_is_the_step(tmp_path, monkeypatch, name, options, norm):
    learner, found = Subject(name, tmp_path, options, norm).build().double().train(), []
    for closed in (True, False):
        if not closed:
            monkeypatch.setattr(type(learner), "first", InnerLoop.first)
        loss = learner.meta_loss(batch())
        found.append((loss.detach(), torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True)))
    torch.testing.assert_close(*found)
    assert learner.closed_form_start


@pytest.mark.parametrize("head", ["zero", "prototypes"])
def test_inner_steps_are_the_same_in_training_and_evaluation(tmp_path, head):
    """A prototype depends on the weights; the inner gradient of the weights is taken with the head as it stands."""
    options = {"head": head, "length": 3.0, "steps": 3, "rate": 0.3}
    learner, episode = Subject("maml", tmp_path, options, "group").build().double(), batch()[0]
    trained = learner.train().query_loss(episode)
    with torch.no_grad():
        torch.testing.assert_close(learner.eval().query_loss(episode), trained.detach())


def test_a_head_of_prototypes_starts_at_negative_squared_distances():
    """The means are (1, 0) and (4, 4). |q|² is left out, which the classes share."""
    learner = MAML(Pixels((1, 1, 2)), MAML.Config(head="prototypes")).eval()
    state = learner.adapt(SUPPORT, LABELS, CLASSES, steps=0)
    assert state["head.weight"].tolist() == [[2, 0], [8, 8]]
    assert state["head.bias"].tolist() == [-1, -32]
    assert learner.classify(state, pixels([1, 1])).tolist() == [[2 - 1, 2 - 18]]
    assert not learner.closed_form_start


def test_features_are_scaled_to_a_length_before_the_head():
    learner = ANIL(Pixels((1, 1, 2)), ANIL.Config(head="prototypes", length=10)).eval()
    torch.testing.assert_close(learner.scaled(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[6.0, 8], [0, 0]]))
    state = learner.adapt(pixels([3, 4], [-9, -12]), torch.tensor([0, 1]), torch.arange(2), steps=0)
    torch.testing.assert_close(state["head.weight"], 2 * torch.tensor([[6.0, 8.0], [-6.0, -8.0]]))
    torch.testing.assert_close(state["head.bias"], torch.tensor([-100.0, -100.0]))


def test_a_length_of_the_features_bounds_the_rate_at_which_the_head_cannot_diverge():
    """4 / (3² + 1) is 0.4, and two ways double the rate. At twenty times the rate the loss of these images rises."""
    support, labels = pixels([1, 0], [1, 0.1], [90, 1], [5, 0.2]), torch.tensor([0, 1, 1, 1])
    rises = []
    for rate in (0.19, 3.8):
        learner = ANIL(Pixels((1, 1, 2)), ANIL.Config(rate=rate, length=3)).eval()
        states = [learner.adapt(support, labels, torch.arange(2), steps=steps) for steps in range(20)]
        losses = [float(learner.support_loss(state, support, labels, torch.arange(2))) for state in states]
        rises.append(any(after > before + 1e-6 for before, after in pairwise(losses)))
    assert rises == [False, True]


def test_later_steps_go_at_the_last_steps_rates():
    """Two steps have rates of their own; a learner with one rate takes the same steps one by one."""
    several = MAML(Pixels((1, 1, 2)), MAML.Config(steps=2, per_step=True)).eval()
    several.log_rates.copy_(torch.tensor([[0.3], [0.1]]).log().expand(2, 2))
    found = several.adapt(SUPPORT, LABELS, CLASSES, steps=3)
    one = MAML(Pixels((1, 1, 2)), MAML.Config()).eval()
    expected = one.begin(SUPPORT, LABELS, CLASSES)
    for rate in (0.3, 0.1, 0.1):
        one.log_rates.fill_(math.log(rate))
        expected = one.step(expected, SUPPORT, LABELS, CLASSES, torch.tensor(0))
    torch.testing.assert_close(found, expected)


def test_inner_steps_after_training_are_those_of_the_nearest_number_of_shots():
    """Three images of two classes are 1.5 of each: nearer to 1 than to 5."""
    learner = ANIL(Pixels((1, 1, 2)), ANIL.Config.model_validate({"steps": 4, "eval_steps": {"5": 2, "1": 0}})).eval()
    assert not learner.adapt(SUPPORT, LABELS, CLASSES)["head.weight"].any()
    assert [learner.steps_for(shots) for shots in (1, 2, 3, 100)] == [0, 0, 2, 2]
    assert learner.most_steps == 0  # chosen
    assert learner.train().steps_for(5) == 4
    assert ANIL(Pixels((1, 1, 2)), ANIL.Config(steps=4)).most_steps == 9


def test_the_support_set_is_not_measured_where_queries_use_none_of_its_statistics(tmp_path):
    """With no inner step: the statistics that `finish` takes are one pass, and the queries another."""
    for norm, training, passes in (("support", True, 2), ("batch", True, 1), ("batch", False, 2), ("group", True, 1)):
        learner, seen = Subject("maml", tmp_path, {"steps": 0, "eval_steps": 0}, norm).build().train(training), []
        learner.backbone.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        learner.query_loss(batch(dtype=torch.float32)[0])
        assert len(seen) == passes, norm


# ANIL


def test_an_anil_step_moves_each_row_towards_its_own_class():
    """Two ways make the rate 2 * 0.3."""
    learner = ANIL(Pixels((1, 1, 2)), ANIL.Config(rate=0.3)).eval()
    state = learner.adapt(SUPPORT, LABELS, CLASSES, steps=1)
    torch.testing.assert_close(state["head.weight"], -0.6 * WEIGHT_GRADIENT)
    torch.testing.assert_close(state["head.bias"], -0.6 * BIAS_GRADIENT)
    assert set(state) == {"head.weight", "head.bias"}


def test_an_anil_step_is_the_gradient_of_the_support_loss(tmp_path):
    """The written-out gradient against autograd's, from a head that is not zero any more."""
    learner, episode = Subject("anil", tmp_path).build().double(), batch(5)[0]
    given = episode.support, episode.support_labels, episode.classes
    state = learner.step(learner.begin(*given), *given, torch.tensor(0))
    after = learner.step(state, *given, torch.tensor(1))
    fast = {name: state[name].detach().requires_grad_() for name in ("head.weight", "head.bias")}
    torch.nn.functional.cross_entropy(learner.logits(fast, state["features"]), episode.support_labels).backward()
    for name, value in fast.items():
        torch.testing.assert_close(after[name], value - learner.log_rate.exp() * 5 * value.grad)


@pytest.mark.parametrize("norm", ["group", "support"])
def test_with_one_step_anil_is_maml_down_to_the_second_order_gradient_of_the_body(tmp_path, norm):
    """MAML's first step moves the head only, for the head starts at zero. Trap 24: the body learns through it too."""
    gradients, losses = [], []
    for name, rates in (("anil", {"rate": 0.3}), ("maml", {"rate": 5.0, "head_rate": 0.3})):
        learner = Subject(name, tmp_path, {"steps": 1, **rates}, norm).build().double().train()
        loss = learner.meta_loss(batch())
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(learner.backbone.parameters())))
    torch.testing.assert_close(*losses)
    for anil, maml in zip(*gradients, strict=True):
        torch.testing.assert_close(anil, maml, rtol=1e-6, atol=1e-10)


# First-order MAML


def test_first_order_maml_passes_the_query_gradient_at_the_adapted_weights_to_the_initial_ones(tmp_path):
    options = {"steps": 3, "first_order": True}
    learner = Subject("maml", tmp_path, options, "group").build().double().train()
    episode = batch(episodes=1)[0]
    parameters = list(learner.backbone.parameters())
    ours = torch.autograd.grad(learner.query_loss(episode), parameters)
    state = learner.adapt(episode.support, episode.support_labels, episode.classes)
    adapted = {name: value.detach().requires_grad_() for name, value in state.items()}
    torch.nn.functional.cross_entropy(learner.classify(adapted, episode.query), episode.query_labels).backward()
    for mine, name in zip(ours, learner.weights(), strict=True):
        torch.testing.assert_close(mine, adapted[name].grad)


# Reptile


def test_the_first_reptile_step_is_as_long_as_the_rate_whatever_the_gradient():
    """Adam without momentum: gradient / sqrt(gradient^2), and nothing where there is no gradient."""
    learner = Reptile(Pixels((1, 1, 2)), Reptile.Config(rate=0.1)).eval()
    state = learner.adapt(SUPPORT, LABELS, CLASSES, steps=1)
    torch.testing.assert_close(state["head.weight"], -0.1 * WEIGHT_GRADIENT.sign(), rtol=1e-3, atol=0)
    torch.testing.assert_close(state["head.bias"], -0.1 * BIAS_GRADIENT.sign(), rtol=1e-3, atol=0)
    assert set(state) == {"head.weight", "head.bias"}


def test_reptiles_inner_loop_is_one_adam_without_momentum_through_all_episodes(tmp_path, monkeypatch):
    """Weights start anew in each episode, Adam's second moments and its count of steps do not; adapting goes on there.

    A head has a row for each class, so a new one starts from the mean moment of the rows of the last.
    """
    learner = Subject("reptile", tmp_path, {"rate": 0.01, "steps": 2, "batch": 12}).build().double().train()
    monkeypatch.setattr(torch, "randperm", torch.arange)  # each minibatch is the whole episode of 12 images
    first, second = batch(3)
    whole = [
        (torch.cat([e.support, e.query]), torch.cat([e.support_labels, e.query_labels]), e.classes)
        for e in (first, second)
    ]
    before = {
        **learner.weights(),
        **learner.new_head(first.support.new_zeros(0, learner.backbone.features), *whole[0][1:]),
    }
    fast = {name: value.detach().clone().requires_grad_() for name, value in before.items()}
    adam = torch.optim.Adam(fast.values(), 0.01, betas=(0.0, 0.999), eps=1e-5)
    for images, labels, _ in whole:
        with torch.no_grad():
            for name, value in fast.items():
                value.copy_(before[name])
        for _ in range(2):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(learner.classify(fast, images), labels).backward()
            adam.step()
        for name in HEAD:
            moment = adam.state[fast[name]]["exp_avg_sq"]
            moment.copy_(moment.mean(0, keepdim=True).expand_as(moment))
    learner.meta_loss(batch(3))
    assert learner.inner_steps == 4
    for moment, (name, value) in zip(learner.moments.buffers(), fast.items(), strict=True):
        expected = adam.state[value]["exp_avg_sq"]
        torch.testing.assert_close(moment, 9 * expected[0] if name in HEAD else expected)
    held = copy.deepcopy(learner.state_dict())
    state = learner.eval().adapt(*whole[0], steps=3)
    learner.meta_loss(batch(3))
    assert all(torch.equal(value, held[name]) for name, value in learner.state_dict().items())
    with torch.no_grad():
        for name, value in fast.items():
            value.copy_(before[name])
    for _ in range(3):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(learner.classify(fast, whole[0][0]), whole[0][1]).backward()
        adam.step()
    for name in ("backbone.blocks.0.weight", "head.weight"):
        torch.testing.assert_close(state[name], fast[name].detach())


def test_reptiles_moments_are_in_its_checkpoints_and_in_its_bundle(tmp_path):
    """Stopped and resumed, training ends with the same bits. The bundle is one that answers as torch does, or none."""
    settings = Training(
        ways=3,
        queries=2,
        steps=4,
        lr=0.5,
        optimizer="sgd",
        momentum=0,
        validate_every=2,
        validation_episodes=2,
        validation_queries=2,
    )

    def training(folder: str) -> tuple[Reptile, Iterator[Progress]]:
        learner = Reptile(ScaledPixels((1, 16, 16)), Reptile.Config(eval_steps=3))
        data = toy_images(), toy_images(seed=1)
        return learner, meta_train(learner, *data, settings, folder=tmp_path / folder, seed=3)

    whole, steps = training("whole")
    list(steps)
    _, steps = training("stopped")
    for _ in range(3):
        next(steps)
    resumed, steps = training("stopped")
    assert next(steps).step == 3
    list(steps)
    assert whole.inner_steps in (10, 20)  # at the best of two validations
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert all(moment.max() > 0 for moment in whole.moments.buffers())

    def without_moments() -> Reptile:
        bare = copy.deepcopy(whole)
        for moment in (bare.inner_steps, *bare.moments.buffers()):
            moment.zero_()
        return bare

    facts = Facts(
        learner=Plugin(name="reptile", config=whole.config.model_dump(mode="json")),
        backbone=Plugin(name="scaled-pixels"),
        image=ImageRule(size=16, channels=1),
    )
    export(whole, tmp_path / "bundle", facts=facts, data=toy_images(), shape=Shape(5, 1, 2), seed=0, episodes=3)
    episode = sample_episodes(toy_images(), Shape(5, 1, 2), 1, seed=5, step=0)[0]
    given = episode.support, episode.support_labels, episode.classes
    bundle, (support, query) = (
        Bundle.open(tmp_path / "bundle"),
        ((images * 255).round().byte().numpy() for images in (episode.support, episode.query)),
    )
    served = bundle.logits(bundle.adapt_arrays(support, *(ids.numpy() for ids in given[1:])), query)
    for learner, same in ((whole, True), (without_moments(), False)):
        with torch.no_grad():
            logits = learner.classify(learner.adapt(*given), episode.query)
        assert torch.allclose(logits, torch.from_numpy(served), rtol=1e-3, atol=1e-4) is same


def test_an_outer_step_of_plain_descent_is_reptiles_interpolation(tmp_path):
    """theta + epsilon (phi - theta), with phi the mean over the episodes of the weights that each leads to."""
    learner, episodes = Subject("reptile", tmp_path, {"rate": 0.01}).build().train(), batch(dtype=torch.float32)
    torch.manual_seed(3)
    again = copy.deepcopy(learner)  # with the same moments
    led_to = [again.trained(episode) for episode in episodes]
    before = {name: weight.detach().clone() for name, weight in learner.weights().items()}
    descent = torch.optim.SGD(learner.parameters(), lr=0.25)
    torch.manual_seed(3)  # for the same minibatches
    learner.meta_loss(episodes).backward()
    descent.step()
    for name, weight in learner.weights().items():
        phi = (led_to[0][name] + led_to[1][name]) / 2
        torch.testing.assert_close(weight.detach(), before[name] + 0.25 * (phi - before[name]))


def test_reptiles_minibatches_take_every_image_before_any_again():
    """4 minibatches of 3 from 6 images: two rounds."""
    drawn = [sorted(minibatch.tolist()) for minibatch in minibatches(6, 3, 4)]
    assert [len(minibatch) for minibatch in drawn] == [3, 3, 3, 3]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == [0, 1, 2, 3, 4, 5]


# Meta-SGD


def test_a_metasgd_step_has_a_rate_for_each_feature_of_the_head_and_may_go_uphill():
    learner = MetaSGD(Pixels((1, 1, 2)), MetaSGD.Config()).eval()
    with torch.no_grad():
        for rate, value in zip(learner.rates, (torch.tensor([0.3, -0.1]), torch.tensor(0.2)), strict=True):
            rate.copy_(value)
    state = learner.adapt(SUPPORT, LABELS, CLASSES, steps=1)
    torch.testing.assert_close(state["head.weight"], -2 * torch.tensor([0.3, -0.1]) * WEIGHT_GRADIENT)
    torch.testing.assert_close(state["head.bias"], -2 * 0.2 * BIAS_GRADIENT)


def test_metasgd_has_a_rate_for_every_scalar_weight_drawn_between_its_limits(tmp_path):
    """Trap 26."""
    learner = Subject("metasgd", tmp_path).recipe.build((1, 16, 16))
    weights = list(learner.weights().values())
    assert [rate.shape for rate in learner.rates] == [w.shape for w in weights] + [(learner.backbone.features,), ()]
    drawn = torch.cat([rate.detach().flatten() for rate in learner.rates])
    assert 0.005 <= drawn.min() < 0.006
    assert 0.099 < drawn.max() <= 0.1


def test_metasgd_with_equal_rates_is_maml(tmp_path):
    metasgd = Subject("metasgd", tmp_path, {"steps": 3}, "group").build().double().train()
    maml = Subject("maml", tmp_path, {"steps": 3, "rate": 0.2, "head_rate": 0.2}, "group").build().double().train()
    maml.backbone.load_state_dict(metasgd.backbone.state_dict())
    with torch.no_grad():
        maml.log_rates.fill_(math.log(0.2))  # again, in double precision
        for rate in metasgd.rates:
            rate.fill_(0.2)
    torch.testing.assert_close(metasgd.meta_loss(batch()), maml.meta_loss(batch()))


# Meta-LSTM


def test_preprocessing_keeps_size_and_sign_apart_and_is_linear_near_zero():
    """p = 10: (log|x| / 10, sign x) for |x| >= e^-10, and (-1, e^10 x) below."""
    size, sign = preprocessed(torch.tensor([1.0, -math.e, math.exp(-10) / 2, 0.0]))
    torch.testing.assert_close(size, torch.tensor([0.0, 0.1, -1.0, -1.0]))
    torch.testing.assert_close(sign, torch.tensor([1.0, -1.0, 0.5, 0.0]))


def test_a_gate_is_the_sigmoid_of_a_weighted_sum():
    gate = Gate(2, 0.5)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([2.0, -1.0]))
    assert gate(torch.tensor([1.0, 0.0]), torch.tensor(2.0)).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(2))])


def test_a_metalstm_whose_gates_stand_still_is_gradient_descent_with_forgetting(tmp_path):
    """theta <- 0.9 theta - 0.1 gradient, when no gate looks at anything."""
    learner = MetaLSTM(Pixels((1, 1, 2)), MetaLSTM.Config(rate=0.1, keep=0.9)).eval()
    with torch.no_grad():
        for gate in (learner.input_gate, learner.forget_gate):
            gate.weight.zero_()
    state = learner.adapt(SUPPORT, LABELS, CLASSES, steps=1)
    torch.testing.assert_close(state["head.weight"], -0.1 * 2 * WEIGHT_GRADIENT)
    assert set(state) == {"head.weight", "head.bias"}


def test_a_metalstm_gate_is_given_gradient_loss_weight_and_its_last_value(tmp_path):
    learner = MetaLSTM(Pixels((1, 1, 2)), MetaLSTM.Config()).eval()
    given = SUPPORT, LABELS, CLASSES
    first = learner.step(learner.begin(*given), *given, torch.tensor(0))
    second = learner.step(first, *given, torch.tensor(1))
    fast = {name: first[name].detach() for name in ("head.weight", "head.bias")}
    loss, gradients = value_and_gradient(lambda fast: learner.support_loss(fast, *given), fast)
    slope, weight = 2 * gradients["head.weight"], fast["head.weight"]
    for gate, name in ((learner.input_gate, "input_gate."), (learner.forget_gate, "forget_gate.")):
        seen = (*preprocessed(slope), *preprocessed(loss), weight, first[name + "head.weight"])
        torch.testing.assert_close(second[name + "head.weight"], gate(*seen))
    expected = second["forget_gate.head.weight"] * weight - second["input_gate.head.weight"] * slope
    torch.testing.assert_close(second["head.weight"], expected)


def test_the_metalstms_outer_gradient_is_a_plain_loops_whose_inner_gradients_are_constants(tmp_path):
    """Trap 27. Gates and initial weights alike get a gradient."""
    learner = Subject("metalstm", tmp_path, {"steps": 3}, "group").build().double().train()
    episode = batch(episodes=1)[0]
    given, parameters = (episode.support, episode.support_labels, episode.classes), list(learner.parameters())
    ours = torch.autograd.grad(learner.query_loss(episode), parameters)
    fast = {**learner.weights(), **learner.new_head(learner.embed(given[0]), *given[1:])}
    gates = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in fast.items()}
    for _ in range(3):
        leaves = {name: w.detach().requires_grad_() for name, w in fast.items()}
        loss = torch.nn.functional.cross_entropy(learner.classify(leaves, episode.support), episode.support_labels)
        loss.backward()
        for name, leaf in leaves.items():
            slope = leaf.grad * (3 if "head" in name else 1)
            seen = (*preprocessed(slope), *preprocessed(loss.detach()), fast[name])
            gates[name] = learner.input_gate(*seen, gates[name][0]), learner.forget_gate(*seen, gates[name][1])
            fast[name] = gates[name][1] * fast[name] - gates[name][0] * slope
    plain = torch.nn.functional.cross_entropy(learner.classify(fast, episode.query), episode.query_labels)
    for mine, theirs in zip(ours, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().max() > 0
