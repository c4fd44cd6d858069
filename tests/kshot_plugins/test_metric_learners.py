"""Matching, relation and Siamese networks, on numbers that a reader can work out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kshot import KshotError
from kshot.data.episodes import Shape, sample_episodes
from kshot.export import Facts, export
from kshot.recurrence import bidirectional_lstm
from kshot.testing import (
    SIDE,
    Pixels,
    Subject,
    onnx_agrees_with_torch,
    order_of_the_support_set_does_not_matter,
    toy_images,
)
from kshot_plugins.matching import MatchingNet
from kshot_plugins.protonet import ProtoNet
from kshot_plugins.relation import RelationNet
from kshot_plugins.siamese import Siamese
from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin

LABELS, CLASSES = torch.tensor([7, 7, 9]), torch.tensor([7, 9])


def pixels(*rows: list[float]) -> torch.Tensor:
    """Images of two pixels each: (N, 1, 1, 2)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :]


def two_pixels(cls, **options):
    return cls(Pixels((1, 1, 2)), cls.Config(**options)).eval()


class UnitPixels(Pixels):
    """Pixels brought to length 1, for which a squared distance is 2 - 2 cos."""

    def forward(self, images):
        return F.normalize(super().forward(images), dim=1)


# What every learner of the family shares


@pytest.mark.parametrize("norm", ["group", "support", "batch"])
@pytest.mark.parametrize(("name", "options"), [("matching", {}), ("relation", {"loss": "cross_entropy"})])
def test_the_batched_loss_equals_the_plain_definition(tmp_path, name, options, norm):
    learner = Subject(name, tmp_path, options, norm).build().train()
    batch = sample_episodes(toy_images(), Shape(4, 2, 3), 3, seed=5, step=0)
    plain = torch.stack([learner.query_loss(episode) for episode in batch]).mean()
    torch.testing.assert_close(learner.meta_loss(batch), plain)


def test_running_averages_are_of_all_images_of_a_batch_together(tmp_path):
    learner = Subject("siamese", tmp_path).build().train()
    batch = sample_episodes(toy_images(), Shape(3, 1, 2), 2, seed=5, step=0)
    first = learner.backbone.blocks[1]
    list(learner.embed_episodes(batch))
    assert int(first.num_batches_tracked) == 1
    maps = learner.backbone.blocks[0](torch.cat([batch.support.flatten(0, 1), batch.query.flatten(0, 1)]))
    torch.testing.assert_close(first.running_mean, 0.1 * maps.mean((0, 2, 3)))


# Matching networks


def test_a_query_takes_the_classes_of_what_it_attends_to():
    """Cosines 1, 0 and 0 times log 2 make powers 2, 1 and 1, of which class 7 has three parts in four."""
    learner = two_pixels(MatchingNet, scale=math.log(2))
    state = learner.adapt(pixels([1, 0], [0, 1], [0, 3]), LABELS, CLASSES)
    torch.testing.assert_close(learner.classify(state, pixels([5, 0])).exp(), torch.tensor([[0.75, 0.25]]))


def test_with_one_shot_matching_is_a_prototypical_network_with_cosines():
    """Trap 29: on unit vectors, scale * cos is scale - scale / 2 * squared distance."""
    backbone, scale = UnitPixels((1, SIDE, SIDE)), 8.0
    matching, protonet = MatchingNet(backbone, MatchingNet.Config(scale=scale)), ProtoNet(backbone, ProtoNet.Config())
    episode = sample_episodes(toy_images(), Shape(5, 1, 4), 1, seed=0, step=0)[0]
    found, near = (
        learner.classify(learner.adapt(episode.support, episode.support_labels, episode.classes), episode.query)
        for learner in (matching, protonet)
    )
    torch.testing.assert_close(found, (scale / 2 * near).log_softmax(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(1), near.argmax(1))


def test_attention_stays_finite_at_its_sharpest_and_for_a_class_without_images():
    """Opposite vectors at scale 40: a probability of about exp(-80)."""
    learner = two_pixels(MatchingNet, scale=40)
    state = learner.adapt(pixels([1, 0], [1, 0], [-1, 0]), LABELS, torch.tensor([7, 9, 11]))
    logits = learner.classify(state, pixels([1, 0])).detach()
    torch.testing.assert_close(logits[0, :2], torch.tensor([0.0, -80 - math.log(2)]), rtol=0, atol=0.01)
    assert float(logits[0, 2]) == pytest.approx(math.log(1e-37) - math.log(2), abs=0.1)


def test_full_context_embeddings_see_the_other_images_and_not_their_order(tmp_path):
    subject = Subject("matching", tmp_path, {"fce": True})
    order_of_the_support_set_does_not_matter(subject)
    learner, episode = subject.build(), subject.episode()
    with torch.no_grad():
        features = learner.embed(episode.support)
        context = learner.in_context(features)
        with_others = learner.in_context(torch.cat([features[:1], features[1:] * 2]))
    assert (context[0] - with_others[0]).abs().max() > 1e-3


def test_two_copies_of_an_image_have_one_context(tmp_path):
    """Nothing tells which of them came first, so whichever class has which of them must not count."""
    learner = Subject("matching", tmp_path, {"fce": True}).build()
    features = torch.rand(4, 8)[[0, 1, 2, 1, 3]]
    context = learner.in_context(features)
    torch.testing.assert_close(context[1], context[3])
    assert (context[0] - context[1]).abs().max() > 1e-3


def test_the_recurrence_is_the_same_with_a_gradient_and_without():
    lstm = nn.LSTM(3, 3, bidirectional=True).double()
    items = torch.randn(6, 3, dtype=torch.float64)
    with_gradient = bidirectional_lstm(lstm, items)
    with torch.no_grad():
        torch.testing.assert_close(bidirectional_lstm(lstm, items), with_gradient)
    cell = nn.LSTMCell(3, 3).double()
    cell.load_state_dict({name: getattr(lstm, f"{name}_l0") for name in cell.state_dict()})
    torch.testing.assert_close(with_gradient[0, 0], cell(items[:1])[0][0])  # forwards, the first item is read first


def test_full_context_embeddings_export(tmp_path):
    onnx_agrees_with_torch(Subject("matching", tmp_path, {"fce": True}))


# Relation networks


def told_to_measure(**options) -> RelationNet:
    """A relation module of two channels whose weights make it 4 - sum of relu(query - class)."""
    learner = two_pixels(RelationNet, width=2, hidden=1, **options)
    centre = torch.zeros(2, 2, 3, 3)
    centre[[0, 1], [0, 1], 1, 1] = 1.0
    convolution, (gather, score) = learner.relate[2], (learner.relate[6], learner.relate[8])
    with torch.no_grad():
        for layer, weight in ((learner.of_query, centre), (learner.of_class, -centre), (convolution, centre)):
            layer.weight.copy_(weight)
        for layer, weight, bias in ((gather, 1.0, 0.0), (score, -1.0, 4.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    return learner


def test_a_class_is_the_mean_of_its_maps_and_logits_are_scores_before_the_sigmoid():
    """Class 7 is at (1, 0): the query (3, 1) exceeds it by 2 + 1, and class 9 by 1."""
    learner = told_to_measure()
    state = learner.adapt(pixels([0, 0], [2, 0], [2, 4]), LABELS, CLASSES)
    assert torch.equal(state["class_features"], torch.tensor([[1.0, 0.0], [2.0, 4.0]]))
    logits = learner.classify(state, pixels([3, 1], [0, 0]))
    torch.testing.assert_close(logits, torch.tensor([[1.0, 3.0], [4.0, 4.0]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("loss", "expected"), [("mse", 0.25), ("cross_entropy", math.log(3))])
def test_the_loss_of_a_relation_module_that_says_nothing(tmp_path, loss, expected):
    """A score of 0 is a sigmoid of 1/2, which is 1/2 from 0 and from 1, and one of three equal logits."""
    learner = Subject("relation", tmp_path, {"loss": loss}).build()
    nn.init.zeros_(learner.relate[-1].weight)
    nn.init.zeros_(learner.relate[-1].bias)
    batch = sample_episodes(toy_images(), Shape(3, 1, 2), 2, seed=5, step=0)
    assert learner.meta_loss(batch).item() == pytest.approx(expected)


def test_one_convolution_of_each_map_is_the_papers_convolution_of_both():
    learner = two_pixels(RelationNet)
    learner.grid = (2, 5, 5)
    query, classes = torch.randn(3, 50), torch.randn(2, 50)
    both = torch.cat([learner.of_query.weight, learner.of_class.weight], 1)
    plain = [[F.conv2d(torch.cat([q, c]).view(1, 4, 5, 5), both, padding=1) for c in classes] for q in query]
    learner.relate = nn.Sequential(nn.Flatten(), nn.Linear(64 * 25, 1))
    expected = torch.stack([torch.cat([learner.relate(maps)[0] for maps in row]) for row in plain])
    torch.testing.assert_close(learner.logits({"class_features": classes}, query), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "last"), [((8, 7, 7), 64), ((8, 21, 21), 64 * 25), ((8, 2, 2), 64), (None, 64)])
def test_the_relation_module_pools_where_there_is_something_to_pool(grid, last):
    backbone = Pixels(grid or (8, 1, 1))
    backbone.grid = grid
    learner = RelationNet(backbone, RelationNet.Config())
    assert next(layer for layer in learner.relate if isinstance(layer, nn.Linear)).in_features == last
    classes = {"class_features": torch.rand(2, backbone.features)}
    assert learner.logits(classes, torch.rand(3, backbone.features)).shape == (3, 2)


# Siamese networks


def told_to_weigh() -> Siamese:
    """3 - |difference of the first pixel| - 2 |difference of the second|."""
    learner = two_pixels(Siamese)
    with torch.no_grad():
        learner.score.weight.copy_(torch.tensor([[-1.0, -2.0]]))
        learner.score.bias.fill_(3.0)
    return learner


def test_a_class_scores_the_mean_over_its_images():
    """Trap 31: from (1, 1), class 7 has images at distance 1 + 2 and 0 + 2, class 9 one at 3 + 0."""
    learner = told_to_weigh()
    state = learner.adapt(pixels([0, 0], [1, 0], [4, 1]), LABELS, CLASSES)
    torch.testing.assert_close(learner.classify(state, pixels([1, 1])), torch.tensor([[(0.0 + 1.0) / 2, 0.0]]))


def test_verification_says_how_likely_two_images_show_one_class():
    """Pair by pair, the same either way round: scores 3 and 3 - 3 - 2 = -2."""
    learner = told_to_weigh()
    a, b = pixels([1, 1], [0, 0]), pixels([1, 1], [3, 1])
    expected = torch.tensor([3.0, -2.0]).sigmoid()
    torch.testing.assert_close(learner.verify(a, b), expected)
    torch.testing.assert_close(learner.verify(b, a), expected)


def test_same_and_different_pairs_weigh_the_same_however_many_there_are():
    """A learner that always says s pays softplus(-s) for same pairs and softplus(s) for different ones."""
    learner = two_pixels(Siamese)
    learner.backbone = Pixels((1, SIDE, SIDE))
    learner.score = nn.Linear(SIDE * SIDE, 1)
    nn.init.zeros_(learner.score.weight)
    nn.init.constant_(learner.score.bias, 1.5)
    expected = (F.softplus(torch.tensor(-1.5)) + F.softplus(torch.tensor(1.5))) / 2
    for shape in (Shape(2, 1, 1), Shape(6, 2, 3)):
        batch = sample_episodes(toy_images(), shape, 2, seed=0, step=0)
        torch.testing.assert_close(learner.meta_loss(batch), expected)


def test_verification_refuses_what_it_cannot_answer(tmp_path):
    with pytest.raises(KshotError, match="give two batches of as many images"):
        two_pixels(Siamese).verify(pixels([0, 0]), pixels([0, 0], [1, 1]))
    learner = Subject("siamese", tmp_path, norm="support").build()
    with pytest.raises(KshotError, match="no support set for the norm 'support'"):
        learner.verify(torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE))


def test_a_bundle_verifies_with_one_image_as_the_only_class(tmp_path):
    """Serving needs no torch for it: adapt to a, classify b, and the sigmoid of the logit is the probability."""
    learner = Siamese(Pixels((1, SIDE, SIDE)), Siamese.Config()).eval()
    facts = Facts(
        learner=Plugin(name="siamese"), backbone=Plugin(name="pixels"), image=ImageRule(size=SIDE, channels=1)
    )
    export(learner, tmp_path / "bundle", facts=facts, data=toy_images(), shape=Shape(5, 1, 2), seed=0, episodes=4)
    episode = sample_episodes(toy_images(), Shape(2, 1, 1), 1, seed=0, step=0)[0]
    a, b = ((images * 255).round().byte().numpy() for images in (episode.support, episode.query))
    bundle = Bundle.open(tmp_path / "bundle")
    logits = [bundle.classify(bundle.adapt([one], ["one"]), [other]).logits for one, other in zip(a, b, strict=True)]
    expected = learner.verify(episode.support, episode.query)
    torch.testing.assert_close(torch.tensor([logit.item() for logit in logits]).sigmoid(), expected)
