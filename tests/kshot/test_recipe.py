"""Recipes: a typo is an error that says what was meant, long before anything trains."""

import pytest

from kshot.recipe import Recipe
from kshot_runtime.errors import KshotError

TEXT = """
name = "tiny"
[dataset]
name = "toy"
[backbone]
name = "conv4"
width = 8
[learner]
name = "maml"
rate = 0.1
"""


def write(tmp_path, text=TEXT):
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path


def test_a_recipe_builds_the_learner_that_it_describes(tmp_path):
    learner = Recipe.load(write(tmp_path)).build((1, 16, 16))
    assert (learner.name, learner.config.rate, learner.backbone.features) == ("maml", 0.1, 8)


def test_overrides_change_single_values_with_their_type(tmp_path):
    recipe = Recipe.load(write(tmp_path), {"training.lr": "0.5", "backbone.norm": "group", "seed": "3"})
    assert (recipe.training.lr, recipe.backbone.options["norm"], recipe.seed) == (0.5, "group", 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.lrr": "1"}, r"unknown key 'training.lrr'; did you mean 'lr'\?"),
        ({"training.lr": "-1"}, r"training.lr = -1: input should be greater than 0"),
        ({"training.lr": "fast"}, r"training.lr = 'fast': input should be a valid number"),
        ({"learner.raet": "1"}, r"\[learner\] of 'maml': unknown key 'raet'; did you mean 'rate'\?"),
        ({"backbone.width": "0"}, r"\[backbone\] of 'conv4': width = 0"),
        ({"learner.name": "mmal"}, r"no algorithm named 'mmal'; did you mean 'maml'\?"),
        ({"name.x": "1"}, r"'name' is a value, not a section"),
        ({"dataset.train": "toy:trian"}, r"dataset.train = 'toy:trian': .* did you mean 'train'"),
        ({"dataset.train": ""}, "dataset.train = ''"),
        ({"dataset.unlabelled": "toy:test"}, r"toy:test is in dataset.unlabelled = 'toy:test' and in dataset.test"),
        ({"dataset.unlabelled": "zoo:val+test"}, "toy:test is in dataset.unlabelled"),
        (
            {"dataset.test": "test+train"},
            r"toy:train is in dataset.train = 'train' and in dataset.test = 'test\+train'",
        ),
        ({"dataset.validation": "test"}, "toy:test is in dataset.validation"),
        ({"evaluation.ways": "[5, 1]"}, r"evaluation.ways.1 = 1: input should be greater than or equal to 2"),
        ({"evaluation.shots": "[0]"}, r"evaluation.shots.0 = 0: input should be greater than or equal to 1"),
    ],
)
def test_a_fault_says_where_it_is_and_what_would_fit(tmp_path, overrides, message):
    with pytest.raises(KshotError, match=message):
        Recipe.load(write(tmp_path), overrides)


def test_settings_that_do_not_go_together_are_named(tmp_path):
    text = TEXT.replace('"maml"\nrate = 0.1', '"metasgd"\nlowest = 0.2')
    with pytest.raises(KshotError, match=r"^\[learner\] of 'metasgd': lowest = 0.2 is above highest = 0.1$"):
        Recipe.load(write(tmp_path, text))


def test_what_is_taken_as_it_is_may_be_tested_on_all_that_nothing_was_chosen_on(tmp_path):
    recipe = Recipe.load(write(tmp_path), {"dataset.test": "train+test", "training.steps": "0"})
    assert recipe.dataset.test == "train+test"
    with pytest.raises(KshotError, match="toy:val is in"):
        Recipe.load(write(tmp_path), {"dataset.test": "val+test", "training.steps": "0"})


def test_episodes_are_of_random_photos_unless_they_go_across_groups(tmp_path):
    assert Recipe.load(write(tmp_path)).dataset.protocol == "random photos"
    assert Recipe.load(write(tmp_path), {"dataset.across_groups": "true"}).dataset.protocol == "across groups"


def test_a_recipe_names_its_own_data_set_first_and_every_other_once(tmp_path):
    splits = {"train": "zoo:train+farm:train", "test": "farm:test", "unlabelled": "farm:val"}
    recipe = Recipe.load(write(tmp_path), {f"dataset.{key}": value for key, value in splits.items()})
    assert recipe.dataset.names == ("toy", "zoo", "farm")
    assert Recipe.load(write(tmp_path)).dataset.names == ("toy",)


def test_a_missing_file_and_a_broken_one_are_errors_with_a_next_step(tmp_path):
    with pytest.raises(KshotError, match="there is no recipe at"):
        Recipe.load(tmp_path / "nowhere.toml")
    with pytest.raises(KshotError, match="not a readable recipe"):
        Recipe.load(write(tmp_path, "name = "))
    with pytest.raises(KshotError, match="dataset is missing"):
        Recipe.load(write(tmp_path, 'name = "x"\n[learner]\nname = "maml"'))
