"""The generative and the clustered learner, on numbers that a reader can work out by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kshot.data.episodes import Episode, Episodes, Shape, sample_episodes
from kshot.export import Facts, export
from kshot.learner import Learner
from kshot.testing import CHECKS, SIDE, Pixels, Subject, toy_images
from kshot.training import Training, meta_train
from kshot_flows import recipes
from kshot_plugins.clusters import Clusters
from kshot_plugins.metagan import Generator, MetaGAN
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin


def pixels(*rows: list[float]) -> torch.Tensor:
    """Images of two pixels each: (N, 1, 1, 2)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :]


def episode(support: torch.Tensor, query: torch.Tensor) -> Episode:
    """Two ways, one shot; the queries are of the first class."""
    classes = torch.tensor([7, 9])
    return Episode(support, classes, query, classes[:1].repeat(len(query)), classes, torch.tensor([0, 1]))


# -- MetaGAN


def grey_maker(weight: float) -> MetaGAN:
    """On pixels, with a threshold of 2 and a generator whose every image is (1/2, 1/2)."""
    learner = MetaGAN(Pixels((1, 1, 2)), MetaGAN.Config(weight=weight, fakes=3))
    learner.prepare([30])
    with torch.no_grad():
        learner.log_threshold.fill_(math.log(2))
        for parameter in learner.generator.layers[-2].parameters():
            parameter.zero_()
    return learner.train()


SQUARE = episode(support=pixels([0, 0], [1, 1]), query=pixels([0, 0]))


def test_both_sides_of_the_game_pay_what_the_odds_of_being_real_say():
    """A fake is 1/2 from both prototypes, the query 0 and 2; the fake class's logit is minus the threshold."""
    discriminator, generator = grey_maker(weight=0.5).losses(SQUARE)
    fake_is_real = 2 * math.exp(-0.5) / (2 * math.exp(-0.5) + math.exp(-2))
    query_is_real = (1 + math.exp(-2)) / (1 + 2 * math.exp(-2))
    query_is_its_class = 1 / (1 + math.exp(-2))
    expected = -math.log(query_is_its_class) - 0.5 * (math.log(query_is_real) + math.log(1 - fake_is_real))
    torch.testing.assert_close(discriminator, torch.tensor(expected))
    torch.testing.assert_close(generator, torch.tensor(-math.log(fake_is_real)))


def test_with_weight_one_the_discriminator_minimises_the_papers_softmax_over_classes_and_fakes():
    discriminator, _ = grey_maker(weight=1).losses(SQUARE)
    query, fake = torch.tensor([[0.0, -2.0, -2.0]]), torch.tensor([[-0.5, -0.5, -2.0]])
    paper = F.cross_entropy(query, torch.tensor([0])) + F.cross_entropy(fake, torch.tensor([2]))
    torch.testing.assert_close(discriminator, paper)


def test_neither_sides_loss_moves_the_other(tmp_path):
    learner = Subject("metagan", tmp_path).build().train()
    learner.prepare([30])
    batch = sample_episodes(toy_images(), Shape(3, 2, 2), 2, seed=5, step=0)
    discriminator, generator = learner.losses(batch[0])
    named = dict(learner.named_parameters())
    for loss, own in ((discriminator, False), (generator, True)):
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        moved = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
        assert moved == {name for name in named if name.startswith("generator.") is own}


def test_fakes_leave_the_averages_of_real_images_alone(tmp_path):
    """The backbone's running statistics are those of an episode played without any fakes."""
    learner = Subject("metagan", tmp_path).build().train()
    plain = copy.deepcopy(learner)
    learner.prepare([30])
    batch = sample_episodes(toy_images(), Shape(3, 2, 2), 1, seed=5, step=0)
    learner.meta_loss(batch)
    plain.query_loss(batch[0])
    before = Subject("metagan", tmp_path).build().backbone.state_dict()
    for name, value in plain.backbone.state_dict().items():
        assert torch.equal(learner.backbone.state_dict()[name], value)
    assert not torch.equal(before["blocks.1.running_mean"], plain.backbone.blocks[1].running_mean)


def test_the_generator_knows_nothing_of_queries_and_labels():
    """Trap 33: another query set, and the classes' names exchanged, and the same noise makes the same images."""
    learner, seen = grey_maker(weight=1), []
    learner.generator.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    renamed = replace(SQUARE, support_labels=SQUARE.support_labels.flip(0))
    for played in (SQUARE, episode(SQUARE.support, pixels([1, 0], [0, 1])), renamed):
        torch.manual_seed(0)
        learner.losses(played)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0][:, -2:], torch.full((6, 2), 0.5))  # the mean of the prototypes (0, 0) and (1, 1)


@pytest.mark.parametrize("image", [(1, 28, 28), (3, 84, 84), (1, 1, 2)], ids=str)
def test_the_generator_fits_any_image(image):
    images = Generator(5, 8, image)(torch.randn(2, 5))
    assert images.shape == (2, *image)
    assert (images >= 0).all()
    assert (images <= 1).all()


def bundle(learner: Learner, folder) -> dict[str, bytes]:
    """The two graphs of the learner's bundle."""
    facts = Facts(
        learner=Plugin(name=learner.name, config=learner.config.model_dump(mode="json")),
        backbone=Plugin(name="conv4", config={"width": 8}),
        image=ImageRule(size=SIDE, channels=1),
    )
    export(learner, folder, facts=facts, data=toy_images(), shape=Shape(3, 1, 2), seed=0, episodes=2)
    return {file.name: file.read_bytes() for file in folder.glob("*.onnx")}


def test_what_metagan_serves_is_to_the_byte_a_prototypical_network(tmp_path):
    """The generator and the fake class are dropped at export."""
    learner = Subject("metagan", tmp_path).build()
    plain = Subject("protonet", tmp_path).build()
    plain.load_state_dict(learner.state_dict())
    learner.prepare([30])
    assert bundle(learner, tmp_path / "metagan") == bundle(plain, tmp_path / "protonet")


@pytest.mark.parametrize("name", ["metagan", "clusters"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, name):
    """The generator, and k-means' window, are state of the training: a checkpoint keeps them."""
    settings = Training(
        ways=3, queries=2, episodes_per_step=2, steps=4, validate_every=2, validation_episodes=2, validation_queries=2
    )

    def run(folder: str, steps: int = 4) -> Learner:
        torch.manual_seed(0)
        learner = Subject(name, tmp_path).recipe.build((1, SIDE, SIDE))
        for progress in meta_train(learner, toy_images(), toy_images(), settings, folder=tmp_path / folder, seed=1):
            if progress.step == steps:
                break
        return learner

    whole = run("whole").state_dict()
    run("stopped", steps=2)
    resumed = run("stopped").state_dict()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    again = Subject(name, tmp_path).recipe.build((1, SIDE, SIDE))
    again.prepare([30])
    again.load_state_dict(whole)


# -- Clusters


class Scaled(Pixels):
    """Pixels times a weight for each: a backbone with something for experts to differ in."""

    def __init__(self) -> None:
        super().__init__((1, 1, 2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * self.scale


def clustered(**settings) -> Clusters:
    """Two clusters, at (0, 0) and (10, 10); the first's expert doubles the first pixel, the other trebles both."""
    learner = Clusters(Scaled(), Clusters.Config(clusters=2, **settings)).eval()
    learner.prepare([30])
    with torch.no_grad():
        learner.centroids.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
        learner.shares.copy_(torch.tensor([0.97, 0.03]))
        learner.differences[0].copy_(torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
    return learner


NEAR, FAR = pixels([1, 0], [3, 2]), pixels([6, 8], [8, 6])  # embeddings (2, 1) and (7, 7)
CLASSES = torch.tensor([7, 9])


def test_the_nearest_centroids_expert_answers():
    learner = clustered(min_share=0.01)
    near, far = (learner.adapt(support, CLASSES, CLASSES) for support in (NEAR, FAR))
    assert torch.equal(near["prototypes"], torch.tensor([[2.0, 0.0], [6.0, 2.0]]))
    assert torch.equal(far["prototypes"], torch.tensor([[18.0, 24.0], [24.0, 18.0]]))
    # the query (1, 1) is (2, 1) to the first expert and (3, 3) to the second
    assert torch.equal(learner.classify(near, pixels([1, 1])), torch.tensor([[-1.0, -17.0]]))
    assert torch.equal(learner.classify(far, pixels([1, 1])), torch.tensor([[-666.0, -666.0]]))


def test_where_a_cluster_is_tiny_the_generalist_answers():
    learner = clustered(min_share=0.05)
    assert torch.equal(learner.adapt(FAR, CLASSES, CLASSES)["prototypes"], FAR.flatten(1))
    assert not torch.equal(learner.adapt(NEAR, CLASSES, CLASSES)["prototypes"], NEAR.flatten(1))


def test_before_training_the_generalist_answers(tmp_path):
    learner = Clusters(Scaled(), Clusters.Config())
    assert torch.equal(learner.adapt(FAR, CLASSES, CLASSES)["prototypes"], FAR.flatten(1))


def test_more_shots_of_one_class_do_not_pull_an_episode_to_another_cluster():
    """Class means (1, 1) and (8, 8) meet at (4.5, 4.5), nearer to (0, 0); the images do at (6.6, 6.6)."""
    learner = clustered(min_share=0.01)
    state = learner.adapt(pixels([1, 1], *[[8, 8]] * 4), torch.tensor([7, 9, 9, 9, 9]), CLASSES)
    assert torch.equal(state["backbone.scale"], torch.tensor([2.0, 1.0]))


def test_a_step_of_k_means_moves_centroids_to_the_means_of_their_episodes():
    learner = clustered(window=4)
    learner.cluster(torch.tensor([[1.0, 1.0], [3.0, 3.0], [9.0, 9.0]]))
    assert torch.equal(learner.centroids, torch.tensor([[2.0, 2.0], [9.0, 9.0]]))
    torch.testing.assert_close(learner.shares, torch.tensor([2 / 3, 1 / 3]))
    learner.cluster(torch.tensor([[9.0, 7.0], [7.0, 9.0]]))  # (1, 1) leaves the window of four
    torch.testing.assert_close(learner.centroids, torch.tensor([[3.0, 3.0], [25 / 3, 25 / 3]]))
    torch.testing.assert_close(learner.shares, torch.tensor([1 / 4, 3 / 4]))


def test_a_centroid_without_episodes_splits_the_largest_cluster():
    """All centroids begin at zero, so the first gets every episode; the next begins a hundredth of the way outward."""
    learner = Clusters(Scaled(), Clusters.Config(clusters=2, window=4))
    learner.prepare([30])
    learner.cluster(torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 0.0]]))
    torch.testing.assert_close(learner.centroids, torch.tensor([[4.0, 0.0], [4.04, 0.0]]))
    learner.cluster(torch.tensor([[8.0, 0.0]]))
    torch.testing.assert_close(learner.centroids, torch.tensor([[2.0, 0.0], [8.0, 0.0]]))


def two_kinds(step: int) -> Episodes:
    """Four episodes of dark images with few bright spots, of which the second and the fourth are negatives."""
    batch = sample_episodes(toy_images(), Shape(5, 1, 3), 4, seed=0, step=step)
    negative = torch.tensor([False, True, False, True])[:, None, None, None, None]
    support, query = (torch.where(negative, 1 - images**4, images**4) for images in (batch.support, batch.query))
    return Episodes(batch.shape, support, query, batch.source)


@pytest.fixture(scope="module")
def specialised() -> Learner:
    """Two experts, meta-trained for a moment on two kinds of episodes."""
    torch.manual_seed(0)
    learner = Subject("clusters", None, {"clusters": 2}).recipe.build((1, SIDE, SIDE)).train()
    learner.prepare([30])
    optimiser = torch.optim.Adam(learner.parameters(), 5e-3)
    for step in range(12):
        optimiser.zero_grad()
        learner.meta_loss(two_kinds(step)).backward()
        optimiser.step()
    return learner.eval()


def test_each_kind_of_episode_gets_an_expert_of_its_own(specialised):
    routes = []
    with torch.no_grad():
        for given in two_kinds(step=100):
            state = specialised.adapt(given.support, given.support_labels, given.classes)
            weight = state["backbone.blocks.0.weight"] - specialised.backbone.blocks[0].weight
            routes.append([torch.allclose(weight, d, atol=1e-6) for d in specialised.differences[0]])
    assert routes[0] in ([True, False], [False, True])
    assert routes == [routes[0], routes[0][::-1]] * 2
    assert specialised.shares.min() > 0.4


def test_each_episode_trains_the_generalist_and_one_expert(specialised):
    learner = copy.deepcopy(specialised).train()
    learner.meta_loss(two_kinds(step=100).part(0, 1)).backward()
    trained = [bool(gradient.any()) for gradient in learner.differences[0].grad]
    assert sorted(trained) == [False, True]
    assert learner.backbone.blocks[0].weight.grad.any()


class Settled(Subject):
    """The kit's subject, with centroids among the toy episodes, so that experts answer and not the generalist."""

    def build(self, seed: int = 0) -> Learner:
        learner = super().build(seed)
        with torch.no_grad():
            for step, centroid in enumerate(learner.centroids):
                given = self.episode(Shape(5, 1, 3), step)
                centroid.copy_(learner.adapt(given.support, given.support_labels, given.classes)["prototypes"].mean(0))
            learner.shares.fill_(1 / len(learner.shares))
        return learner


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if not check.__name__.startswith(("learns", "config"))],
    ids=lambda c: c.__name__,
)
def test_experts_keep_the_contract_as_the_generalist_does(check, tmp_path):
    """Routing is inside the exported graph: the kit's ONNX check is among these."""
    check(Settled("clusters", tmp_path))


def test_the_single_model_that_clusters_are_compared_with_is_as_large_and_sees_the_same_episodes():
    experts, single = (recipes.load(name) for name in ("omniglot-clusters", "omniglot-clusters-single"))
    sizes = [sum(p.numel() for p in recipe.build((1, 28, 28)).parameters()) for recipe in (experts, single)]
    assert sizes == [559680, 562896]
    assert experts.training == single.training
    assert experts.seed == single.seed
