"""The learners that train on the base classes first, on inputs that a reader can work out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from kshot import Episodes, KshotError, Shape
from kshot.testing import Pixels
from kshot.training import Training, learner_step
from kshot_plugins.baselinepp import BaselinePlusPlus
from kshot_plugins.class_training import BaseHead
from kshot_plugins.domainadapt import DomainAdapt, coral
from kshot_plugins.finetune import FineTune
from kshot_plugins.metabaseline import MetaBaseline
from kshot_plugins.multitask import MultiTask
from kshot_plugins.simpleshot import SimpleShot

LABELS, CLASSES = torch.tensor([7, 9]), torch.tensor([7, 9])
EVERY = [FineTune, BaselinePlusPlus, SimpleShot, MetaBaseline, DomainAdapt, MultiTask]


def pixels(*rows: list[float]) -> torch.Tensor:
    """Images of two pixels each: (N, 1, 1, 2)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :]


def batch(*rows: list[float], source: list[int]) -> Episodes:
    """One episode of two classes: a support image of each, then a query of each."""
    images = pixels(*rows)[None]
    return Episodes(Shape(2, 1, 1), images[:, :2], images[:, 2:], torch.tensor([source]))


BATCH = batch([0, 0], [2, 0], [1, 3], [5, 5], source=[0, 2])


def made(cls, classes=(3,), **settings):
    learner = cls(Pixels((1, 1, 2)), cls.Config(**settings))
    learner.prepare(classes)
    return learner


def test_the_base_head_sees_features_without_their_common_mean_and_scale():
    head, features = BaseHead(2, [3]), torch.randn(8, 2)
    torch.testing.assert_close(head(features), head(100 + 5 * features), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.name)
def test_a_head_that_knows_nothing_has_the_loss_of_guessing_among_all_base_classes(cls):
    learner = made(cls, classes=(3,))
    for parameter in learner.parameters():
        torch.nn.init.ones_(parameter)  # all classes alike
    loss = learner.meta_loss(replace(BATCH, unlabelled=torch.cat([BATCH.support[0], BATCH.query[0]])))
    torch.testing.assert_close(loss, torch.tensor(3.0).log())


def test_baselinepp_without_a_step_is_the_nearest_mean_by_angle():
    learner = made(BaselinePlusPlus)
    state = learner.adapt(pixels([3, 0], [0, 7]), LABELS, CLASSES, steps=0)
    torch.testing.assert_close(learner.classify(state, pixels([30, 40])), torch.tensor([[6.0, 8.0]]))


def test_one_step_of_baselinepp_turns_each_row_away_from_the_other_class():
    """At scale ln 3 the softmax of cosines 1 and 0 is 3/4 and 1/4. A row along its own image cannot turn towards it;
    from the other image it gets (1/2) (1/4) ln 3 of that image's direction, and the rate is 2 / (ln 3)²."""
    learner = made(BaselinePlusPlus, scale=math.log(3), rate=2.0)
    state = learner.adapt(pixels([3, 0], [0, 7]), LABELS, CLASSES, steps=1)
    away = -0.25 / math.log(3)
    torch.testing.assert_close(state["head"], torch.tensor([[1.0, away], [away, 1.0]]))


def test_baselinepp_learns_its_scale_where_asked_only():
    for learn in (False, True):
        names = dict(made(BaselinePlusPlus, learn_scale=learn).named_parameters())
        assert ("log_scale" in names) is learn


@pytest.mark.parametrize(
    ("transform", "expected"),
    [("un", [[3.0, 4.0], [0.0, 5.0]]), ("l2n", [[0.6, 0.8], [0.0, 1.0]]), ("cl2n", [[1.0, 0.0], [0.0, 1.0]])],
)
def test_simpleshot_takes_features_as_they_are_or_to_unit_length_or_centred_first(transform, expected):
    learner = made(SimpleShot, transform=transform)
    learner.centre.copy_(torch.tensor([0.0, 4.0]))
    state = learner.adapt(pixels([3, 4], [0, 5]), LABELS, CLASSES)
    torch.testing.assert_close(state["means"], torch.tensor(expected))


def test_simpleshots_logits_are_negative_squared_distances():
    learner = made(SimpleShot, transform="un")
    state = learner.adapt(pixels([0, 0], [4, 4]), LABELS, CLASSES)
    assert torch.equal(learner.classify(state, pixels([1, 0])), torch.tensor([[-1.0, -25.0]]))


def test_simpleshots_centre_is_the_mean_of_base_features_of_the_last_batches_only():
    """Trap 36: of the base classes, not of an episode."""
    learner = made(SimpleShot, memory=2).train()
    first, later = BATCH, batch([2, 2], [2, 2], [2, 2], [2, 2], source=[0, 1])
    learner.meta_loss(first)
    assert torch.equal(learner.centre, torch.tensor([2.0, 2.0]))  # (0 + 2 + 1 + 5) / 4, (0 + 0 + 3 + 5) / 4
    learner.meta_loss(batch([4, 0], [4, 0], [4, 0], [4, 0], source=[0, 1]))
    assert torch.equal(learner.centre, torch.tensor([3.0, 1.0]))  # the mean of two
    learner.meta_loss(later)
    assert torch.equal(learner.centre, torch.tensor([2.5, 1.5]))  # half way to the third: the first fades
    learner.eval().meta_loss(first)
    learner.adapt(pixels([9, 0], [0, 9]), LABELS, CLASSES)
    assert torch.equal(learner.centre, torch.tensor([2.5, 1.5]))


def test_metabaselines_logits_are_cosines_to_mean_features_times_the_temperature():
    learner = made(MetaBaseline, temperature=10.0)
    labels = torch.tensor([7, 7, 9])
    state = learner.adapt(pixels([2, 0], [0, 4], [1, 0]), labels, CLASSES)
    assert torch.equal(state["means"], torch.tensor([[1.0, 2.0], [1.0, 0.0]]))  # means of features, not of directions
    torch.testing.assert_close(learner.classify(state, pixels([3, 4])), torch.tensor([[22 / 5**0.5, 6.0]]))


def test_metabaseline_trains_on_classes_first_and_on_episodes_after_so_many_batches():
    learner = made(MetaBaseline, pretrain=2).train()
    stages = []
    for _ in range(4):
        learner.zero_grad()
        learner.meta_loss(BATCH).backward()
        stages.append("classes" if learner.temperature.grad is None else "episodes")
        learner.stepped()
    assert stages == ["classes", "classes", "episodes", "episodes"]
    torch.testing.assert_close(learner.meta_loss(BATCH), learner.query_loss(BATCH[0]))


def test_metabaseline_goes_on_in_its_stage_when_it_resumes():
    before, after = made(MetaBaseline, pretrain=1).train(), made(MetaBaseline, pretrain=1).train()
    before.stepped()
    after.load_state_dict(before.state_dict())
    after.meta_loss(BATCH).backward()
    assert after.temperature.grad is not None


def test_metabaseline_counts_outer_steps_and_not_their_parts():
    learner = made(MetaBaseline, pretrain=1).train()
    two = Episodes(BATCH.shape, *(torch.cat([part, part]) for part in (BATCH.support, BATCH.query, BATCH.source)))
    settings = Training(episodes_per_step=2, episodes_at_once=1)
    learner_step(learner, two, torch.optim.SGD(learner.parameters(), 0.0), settings)
    assert learner.taken == 1


def test_coral_is_the_squared_distance_of_covariances_over_four_times_the_squared_width():
    """Variances 2 and 0 against 0 and 8: (2² + 8²) / (4 * 2²)."""
    source, target = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 4.0]])
    assert coral(source, target) == 4.25
    assert coral(source, source + 3) == 0  # a shift is no difference


def test_domain_adaptation_moves_the_loss_by_the_distance_of_the_unlabelled_images():
    losses = []
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        learner = made(DomainAdapt, weight=weight).train()
        losses.append(learner.meta_loss(replace(BATCH, unlabelled=pixels([0, 0], [0, 4]))))
    features = torch.cat([BATCH.support[0], BATCH.query[0]]).flatten(1)
    expected = 2 * coral(features, torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(losses[1] - losses[0], expected)


def test_domain_adaptation_without_unlabelled_images_says_which_setting_names_them():
    with pytest.raises(KshotError, match=r"dataset\.unlabelled"):
        made(DomainAdapt).meta_loss(BATCH)


@pytest.mark.parametrize("cls", [DomainAdapt, MultiTask], ids=lambda cls: cls.name)
def test_a_class_is_the_direction_of_its_mean_unit_feature(cls):
    learner = made(cls, scale=10.0)
    state = learner.adapt(pixels([5, 0], [0, 1], [9, 0]), torch.tensor([7, 7, 9]), CLASSES)
    torch.testing.assert_close(state["directions"], torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))
    torch.testing.assert_close(learner.classify(state, pixels([2, 2])), torch.tensor([[10.0, 10 * 0.5**0.5]]))


def test_a_data_set_has_a_head_of_its_own_and_counts_alike():
    """Of heads that know nothing, a data set of 2 classes costs ln 2, one of 8 ln 8, however many images there are."""
    learner = made(MultiTask, classes=(2, 8))
    torch.nn.init.zeros_(learner.base.logits.weight)
    torch.nn.init.zeros_(learner.base.logits.bias)
    for source, expected in (([1, 5], math.log(2 * 8) / 2), ([0, 1], math.log(2)), ([2, 9], math.log(8))):
        mixed = replace(BATCH, source=torch.tensor([source]))
        torch.testing.assert_close(learner.meta_loss(mixed), torch.tensor(expected))
    learner.base.logits.bias.data[2:] = 50.0  # what another data set's head says changes nothing
    alone = replace(BATCH, source=torch.tensor([[0, 1]]))
    torch.testing.assert_close(learner.meta_loss(alone), torch.tensor(math.log(2)))


def test_with_one_data_set_multi_task_training_is_class_training():
    losses = []
    for cls in (MultiTask, FineTune):
        torch.manual_seed(0)
        losses.append(made(cls).meta_loss(BATCH))
    torch.testing.assert_close(*losses)
