"""Our learners on inputs that a reader can work out by hand, and against plain definitions of the same."""

import itertools

import pytest
import torch

from kshot.data.episodes import Shape, sample_episodes
from kshot.evaluation.scores import evaluate
from kshot.testing import Pixels, Subject, toy_images
from kshot_plugins.finetune import FineTune
from kshot_plugins.maml import MAML
from kshot_plugins.protonet import ProtoNet


def pixels(*rows: list[float]) -> torch.Tensor:
    """Images of two pixels each: (N, 1, 1, 2)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :]


LABELS, CLASSES = torch.tensor([7, 7, 9]), torch.tensor([7, 9])


def test_prototypes_are_class_means_and_logits_negative_squared_distances():
    """Trap 28: squared Euclidean distance, not its root."""
    learner = ProtoNet(Pixels((1, 1, 2)), ProtoNet.Config())
    state = learner.adapt(pixels([0, 0], [2, 0], [4, 4]), LABELS, CLASSES)
    assert torch.equal(state["prototypes"], torch.tensor([[1.0, 0.0], [4.0, 4.0]]))
    assert torch.equal(learner.classify(state, pixels([1, 4])), torch.tensor([[-16.0, -9.0]]))


def test_one_maml_step_from_equal_rows_moves_each_row_towards_its_own_class():
    """Softmax starts at 1/2, so a row's gradient is (1/3) sum (p - y) x; two ways make the head's rate 2 * 0.3."""
    learner = MAML(Pixels((1, 1, 2)), MAML.Config(head_rate=0.3)).eval()
    state = learner.adapt(pixels([0, 0], [2, 0], [4, 4]), LABELS, CLASSES, steps=1)
    # class 7: p - y is -1/2, -1/2, +1/2, so the sum is (-1 + 2, 2) = (1, 2); class 9 has the opposite
    expected = -0.6 / 3 * torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    torch.testing.assert_close(state["head.weight"], expected)
    torch.testing.assert_close(state["head.bias"], -0.6 / 3 * torch.tensor([-0.5, 0.5]))


def test_the_first_maml_step_leaves_the_backbone_and_the_second_does_not(tmp_path):
    learner = Subject("maml", tmp_path).build()
    episode = Subject("maml", tmp_path).episode()
    with torch.no_grad():
        states = [learner.adapt(episode.support, episode.support_labels, episode.classes, steps=n) for n in (1, 2)]
    for state, moves in zip(states, (False, True), strict=True):
        distance = max(float((state[name] - weight.detach()).abs().max()) for name, weight in learner.weights().items())
        assert (distance > 1e-4) is moves


def plain_maml_loss(learner: MAML, batch, steps: int) -> torch.Tensor:
    """MAML as a textbook loop over episodes and steps: torch.autograd.grad on a functional network, nothing shared."""
    losses = []
    for episode in batch:
        weights = dict(learner.backbone.named_parameters())
        head = torch.zeros(batch.shape.ways, learner.backbone.features, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(batch.shape.ways, dtype=torch.float64, requires_grad=True)
        fast = [*weights.values(), head, bias]
        for _ in range(steps):
            features = torch.func.functional_call(
                learner.backbone, dict(zip(weights, fast[:-2], strict=True)), (episode.support,)
            )
            loss = torch.nn.functional.cross_entropy(features @ fast[-2].t() + fast[-1], episode.support_labels)
            grads = torch.autograd.grad(loss, fast, create_graph=True)
            rates = [r * (1 if k < len(weights) else batch.shape.ways) for k, r in enumerate(learner.log_rates.exp())]
            fast = [value - rate * g for value, rate, g in zip(fast, rates, grads, strict=True)]
        features = torch.func.functional_call(
            learner.backbone, dict(zip(weights, fast[:-2], strict=True)), (episode.query,)
        )
        logits = features @ fast[-2].t() + fast[-1]
        losses.append(torch.nn.functional.cross_entropy(logits, episode.query_labels))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_second_order_meta_gradient_equals_a_plain_loops_in_float64(tmp_path, norm, steps):
    """speed.md 2.3: a second-order gradient can be silently wrong while the loss and the first order are exact."""
    learner = Subject("maml", tmp_path, {"steps": steps}, norm).build().double().train()
    batch = sample_episodes(toy_images(), Shape(3, 2, 2), 2, seed=5, step=0).to("cpu", torch.float64)
    parameters = list(learner.parameters())
    ours, plain = learner.meta_loss(batch), plain_maml_loss(learner, batch, steps)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for mine, theirs in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_first_order_keeps_the_identity_path_and_differs_from_second_order(tmp_path):
    """Trap 23: detaching the parameters as well would give no meta-gradient at all."""
    batch = sample_episodes(toy_images(), Shape(3, 2, 2), 2, seed=5, step=0)
    gradients = []
    for first_order in (True, False):
        learner = Subject("maml", tmp_path, {"first_order": first_order, "steps": 2}).build().train()
        learner.meta_loss(batch).backward()
        gradients.append(learner.backbone.blocks[0].weight.grad)
    assert gradients[0].abs().max() > 0
    assert not torch.allclose(*gradients)


def test_maml_keeps_the_graph_of_inner_gradients_for_second_order_training_only(tmp_path, monkeypatch):
    """Trap 22: second-order graphs in evaluation cost memory for nothing. The first of 3 steps is in closed form."""
    kept, real = [], torch.autograd.grad

    def grad(*arguments, create_graph=False, **others):
        kept.append(create_graph)
        return real(*arguments, create_graph=create_graph, **others)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    batch = sample_episodes(toy_images(), Shape(3, 2, 2), 1, seed=5, step=0)
    learner = Subject("maml", tmp_path, {"steps": 2}).build()
    evaluate(learner, toy_images(), Shape(3, 1, 2), 2, seed=0)
    assert kept
    assert not any(kept)
    for first_order in (True, False):
        kept.clear()
        Subject("maml", tmp_path, {"steps": 3, "first_order": first_order}).build().train().meta_loss(batch)
        assert kept == [not first_order] * 2


def test_protonets_batched_loss_equals_the_plain_definition_where_normalisation_allows(tmp_path):
    learner = Subject("protonet", tmp_path, norm="group").build().train()
    batch = sample_episodes(toy_images(), Shape(4, 2, 3), 3, seed=5, step=0)
    plain = torch.stack([learner.query_loss(episode) for episode in batch]).mean()
    torch.testing.assert_close(learner.meta_loss(batch), plain)


def test_fine_tuning_separates_what_a_line_can_separate_and_stays_finite():
    learner = FineTune(Pixels((1, 1, 2)), FineTune.Config()).eval()
    state = learner.adapt(pixels([0, 1], [0.1, 1], [1, 0]), LABELS, CLASSES)
    assert set(state) == {"head.weight", "head.bias"}
    probabilities = learner.classify(state, pixels([0, 2], [3, 0])).softmax(1)
    assert probabilities[0, 0] > 0.9
    assert probabilities[1, 1] > 0.9


def test_fine_tunings_step_size_cannot_diverge():
    """Descent on a softmax head is stable under 2 / (|x|² / 2): with scale 10 that is 0.04. One image as two classes
    has the largest slope that there is, and two classes of many images the largest curvature.
    """
    learner = FineTune(Pixels((1, 1, 2)), FineTune.Config()).eval()
    for images in (
        pixels([1, 0], [1, 0], [1, 0]),
        pixels([1, 0], [1, 0], [-1, 0]),
        pixels([1, 0], [1, 0.01], [1, 0.02]),
    ):
        state, losses = learner.start(images.flatten(1), LABELS, CLASSES), []
        for _ in range(learner.steps):
            losses.append(float(torch.nn.functional.cross_entropy(learner.classify(state, images), (LABELS - 7) // 2)))
            state = learner.update(state, images.flatten(1), LABELS, CLASSES)
        assert all(after <= before + 1e-6 for before, after in itertools.pairwise(losses))


def test_base_classes_are_what_fine_tuning_is_meta_trained_on():
    learner = FineTune(Pixels((1, 16, 16)), FineTune.Config())
    learner.prepare([30])
    batch = sample_episodes(toy_images(), Shape(5, 1, 2), 2, seed=0, step=0)
    images = torch.cat([batch.support.flatten(0, 1), batch.query.flatten(0, 1)])
    labels = torch.cat([batch.source.flatten(), batch.source.repeat_interleave(2, 1).flatten()])
    expected = torch.nn.functional.cross_entropy(learner.base(learner.embed(images)), labels)
    torch.testing.assert_close(learner.meta_loss(batch), expected)
