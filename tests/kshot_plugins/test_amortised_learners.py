"""Learners that adapt in one forward pass, on inputs that a reader can work out by hand."""

import pytest
import torch
from torch import nn

from kshot import KshotError, Learner
from kshot.data.episodes import Shape, sample_episodes
from kshot.testing import Pixels, Subject, toy_images
from kshot_plugins.cnaps import CNAPs
from kshot_plugins.cnp import CNP
from kshot_plugins.metanet import MetaNet
from kshot_plugins.protonet import ProtoNet


class NormedPixels(Pixels):
    """Four pixels through a normalisation that starts as the identity: what FiLM does to them is in the features."""

    def __init__(self) -> None:
        super().__init__((1, 1, 4))
        self.norm = nn.BatchNorm2d(1, eps=0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(images))


def pixels(*rows: list[float]) -> torch.Tensor:
    """Images of a few pixels each: (N, 1, 1, pixels)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :]


LABELS, CLASSES = torch.tensor([7, 7, 9]), torch.tensor([7, 9])


def readable_cnp(context: float) -> CNP:
    """A decoder whose first hidden unit is the squared distance of query and slot, and whose second is their product.

    `context` times the mean over the classes is added to both; the logit is the second less the first.
    """
    learner = CNP(Pixels((1, 1, 2)), CNP.Config(width=2)).eval()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.zero_()
        learner.encoder[1].weight.fill_(1)
        for layer in (learner.encoder[0], learner.refine):
            layer.weight.copy_(torch.eye(2))
        learner.compare.weight.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
        learner.context.weight.copy_(context * torch.eye(2))
        learner.score.weight.copy_(torch.tensor([[-1.0, 1.0]]))
    return learner


def test_a_slot_is_the_mean_code_of_its_class_and_the_decoder_compares_a_query_with_it():
    """LayerNorm makes of two numbers -1 for the smaller and 1 for the larger."""
    learner = readable_cnp(context=0)
    state = learner.adapt(pixels([0, 2], [2, 0], [0, 5]), LABELS, CLASSES)
    torch.testing.assert_close(state["slots"], torch.tensor([[0.0, 0.0], [-1.0, 1.0]]), atol=1e-4, rtol=0)
    # the query's code is (-1, 1): squared distances 2 and 0, products 0 and 2
    logits = learner.classify(state, pixels([0, 1]))
    torch.testing.assert_close(logits, torch.tensor([[-2.0, 2.0]]), atol=1e-4, rtol=0)


def test_the_decoder_sees_the_other_classes_too():
    """Hidden units (2, 0) and (0, 2) less their mean (1, 1), and then rectified, are (1, 0) and (0, 1)."""
    learner = readable_cnp(context=-1)
    state = learner.adapt(pixels([0, 2], [2, 0], [0, 5]), LABELS, CLASSES)
    logits = learner.classify(state, pixels([0, 1]))
    torch.testing.assert_close(logits, torch.tensor([[-1.0, 1.0]]), atol=1e-4, rtol=0)


def readable_cnaps() -> CNAPs:
    """Generates one more than the learned scale and three more than the learned shift: a pixel x becomes 2x + 3."""
    learner = CNAPs(NormedPixels(), CNAPs.Config()).eval()
    with torch.no_grad():
        learner.film[-1].bias.copy_(torch.tensor([1.0, 3.0]))
    return learner


def test_generated_scale_and_shift_work_in_the_backbone_and_the_head_sees_what_they_made():
    """Of four features, √D is 2: a row 2m / √D is the class's mean m itself, and its bias is -|m|² / 2."""
    learner = readable_cnaps()
    state = learner.adapt(pixels([0, 0, 0, 0], [2, 0, 0, 0], [-1, -1, -1, -1]), LABELS, CLASSES)
    assert set(state) == {"backbone.norm.weight", "backbone.norm.bias", "head.weight", "head.bias"}
    # class 7: features (3, 3, 3, 3) and (7, 3, 3, 3)
    assert torch.equal(state["head.weight"], torch.tensor([[5.0, 3, 3, 3], [1, 1, 1, 1]]))
    assert torch.equal(state["head.bias"], torch.tensor([-26.0, -2.0]))
    # the query becomes (3, 5, 3, 3): 15 + 15 + 9 + 9 - 26 and 3 + 5 + 3 + 3 - 2
    assert torch.equal(learner.classify(state, pixels([0, 1, 0, 0])), torch.tensor([[22.0, 12.0]]))


def test_a_generated_row_adds_to_the_nearest_mean():
    learner = readable_cnaps()
    with torch.no_grad():
        learner.row[-1].bias.copy_(torch.tensor([0.5, 0.25, 0, 0, 4]))
    state = learner.adapt(pixels([0, 0, 0, 0], [2, 0, 0, 0], [-1, -1, -1, -1]), LABELS, CLASSES)
    assert torch.equal(state["head.weight"], torch.tensor([[5.5, 3.25, 3, 3], [1.5, 1.25, 1, 1]]))
    assert torch.equal(state["head.bias"], torch.tensor([-22.0, 2.0]))


@pytest.mark.parametrize("norm", ["running", "support", "group"])
def test_before_training_cnaps_answers_as_prototypical_networks(tmp_path, norm):
    """Their distances over √D, less the query's own squared length, which is the same for every class."""
    subject = Subject("cnaps", tmp_path, norm=norm)
    learner, episode = subject.recipe.build((1, 16, 16)).eval(), subject.episode()
    protonet = ProtoNet(learner.backbone, ProtoNet.Config()).eval()
    support = episode.support, episode.support_labels, episode.classes
    with torch.no_grad():
        ours = learner.classify(learner.adapt(*support), episode.query)
        theirs = protonet.classify(protonet.adapt(*support), episode.query) / learner.backbone.features**0.5
    torch.testing.assert_close(ours.softmax(1), theirs.softmax(1), atol=1e-4, rtol=0)


def test_modulation_depends_on_which_images_there_are_and_not_on_how_often(tmp_path):
    learner, episode = Subject("cnaps", tmp_path).build(), Subject("cnaps", tmp_path).episode()
    with torch.no_grad():
        once = learner.modulate(episode.support)
        twice = learner.modulate(torch.cat([episode.support, episode.support]))
        other = learner.modulate(episode.query)
    assert set(once) == {f"backbone.blocks.{layer}.{part}" for layer in (1, 5, 9, 13) for part in ("weight", "bias")}
    for name in once:
        torch.testing.assert_close(once[name], twice[name])
        assert not torch.allclose(once[name], other[name], atol=1e-5)


def test_support_statistics_are_those_of_the_modulated_backbone(tmp_path):
    """So a support image, come again as a query, gets the very features that the head was made from."""
    subject = Subject("cnaps", tmp_path, norm="support")
    learner, episode = subject.build(), subject.episode()
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
        features, _ = learner.measure(episode.support, learner.modulate(episode.support))
        plain, _ = learner.measure(episode.support)
    torch.testing.assert_close(learner.embed(episode.support, state), features, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(features, plain, atol=1e-2)


def test_a_backbone_without_normalisation_layers_is_refused():
    with pytest.raises(KshotError, match=r"scale and shift of normalisation layers, and Pixels has none.*resnet12"):
        CNAPs(Pixels((1, 1, 2)), CNAPs.Config())


@pytest.mark.parametrize("name", ["cnp", "cnaps"])
def test_the_loss_in_one_pass_equals_the_plain_definition_where_normalisation_allows(tmp_path, name):
    learner = Subject(name, tmp_path, norm="group").build().train()
    batch = sample_episodes(toy_images(), Shape(4, 2, 3), 3, seed=5, step=0)
    plain = torch.stack([Learner.query_loss(learner, episode) for episode in batch]).mean()
    torch.testing.assert_close(learner.meta_loss(batch), plain)


def raw_gradients(learner: MetaNet) -> MetaNet:
    """A learner whose fast weights are the gradients themselves."""
    learner._generated = lambda generator, gradient: gradient
    return learner


def test_meta_networks_generate_fast_weights_from_gradients_of_the_two_support_losses():
    """The written-out gradients against autograd's: cross-entropy by rows that are the classes' mean hidden vectors."""
    torch.manual_seed(0)
    learner = raw_gradients(MetaNet(Pixels((1, 1, 2)), MetaNet.Config(width=4))).double()
    features = torch.randn(3, 2, dtype=torch.float64)
    state = learner.fit(features, LABELS, CLASSES)
    for layer, keys in ((learner.embedding, ("embedding",)), (learner.base, ("hidden", "rows"))):
        hidden = layer(features).relu()
        means = torch.stack([hidden[:2].mean(0), hidden[2]]).detach()
        rows = means.clone().requires_grad_()
        logits = (2 * hidden @ rows.t() - means.square().sum(1)) / 4**0.5
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 1]), reduction="none")
        expected = [torch.autograd.grad(loss, (layer.weight, rows), retain_graph=True) for loss in losses]
        by_weight, by_rows = (torch.stack(part) for part in zip(*expected, strict=True))
        if keys == ("embedding",):  # of the task: the mean over its images
            torch.testing.assert_close(state["embedding"], by_weight.mean(0))
        else:  # of each image
            torch.testing.assert_close(state["hidden"], by_weight)
            torch.testing.assert_close(state["rows"], by_rows)


def test_a_query_of_a_meta_network_reads_the_fast_weights_of_the_support_image_that_it_is_like():
    """Sharp attention takes one image's; each layer adds up its slow and its fast answer, after ReLU."""
    torch.manual_seed(1)
    learner = MetaNet(Pixels((1, 1, 2)), MetaNet.Config(width=4, sharpness=1e6))
    with torch.no_grad():
        learner.embedding.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))  # keys keep apart
        learner.embedding.bias.zero_()
        support = pixels([1, 0], [0, 1], [-1, -1])
        state = learner.adapt(support, LABELS, CLASSES)
        slow, features = learner.base(support.flatten(1)).relu(), support.flatten(1)
        fast = torch.stack([weights @ x for weights, x in zip(state["hidden"], features, strict=True)]).relu()
        hidden = slow + fast
        means = torch.stack([slow[:2].mean(0), slow[2]])
        expected = hidden @ means.t() - means.square().sum(1) / 2  # √H is 2
        expected += torch.stack([rows @ h for rows, h in zip(state["rows"], hidden, strict=True)])
        torch.testing.assert_close(learner.classify(state, support), expected)


def test_attention_is_the_softmax_of_cosines_and_no_fast_weights_leave_the_nearest_mean():
    torch.manual_seed(2)
    learner = MetaNet(Pixels((1, 1, 2)), MetaNet.Config(width=4, sharpness=2.0))
    with torch.no_grad():
        state = learner.adapt(pixels([1, 0], [0, 1], [-1, -1]), LABELS, CLASSES)
        query = pixels([0.5, 0.2])
        key = learner._keys(state, query.flatten(1))
        weights = (2 * torch.nn.functional.cosine_similarity(key, state["keys"])).softmax(0)
        mean = {name: torch.tensordot(weights, state[name], 1)[None].repeat(3, 1, 1) for name in ("hidden", "rows")}
        torch.testing.assert_close(learner.classify(state, query), learner.classify({**state, **mean}, query))
        none = {name: torch.zeros_like(state[name]) for name in ("hidden", "rows")}
        distances = (learner.base(query.flatten(1)).relu() - state["means"]).square().sum(1)
        logits = learner.classify({**state, **none}, query)[0]
        torch.testing.assert_close(logits.softmax(0), (-distances / 2).softmax(0))
