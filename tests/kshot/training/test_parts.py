"""A batch taken in parts, one after the other or by several processes, trains the same, or it is refused."""

import runpy
import shutil
from pathlib import Path

import pytest
import torch

from kshot import Backbone
from kshot.recipe import Recipe
from kshot.testing import Subject
from kshot.training import CHECKPOINTS, Training, checkpoint, launched
from kshot.training.step import episodes_at_once
from kshot_plugins.protonet import ProtoNet
from kshot_runtime.errors import KshotError


def recipe(learner: str, **sections) -> dict:
    return {
        "name": "parts", "dataset": {"name": "toy"}, "learner": {"name": learner},
        "training": {"episodes_per_step": 4, "episodes_at_once": 2}, **sections,
    }  # fmt: skip


def test_parts_that_would_make_another_algorithm_are_refused_when_a_recipe_is_checked():
    why = r"protonet with norm = 'running' learns from all 4 .* norm to 'support' or 'batch' or 'group' in \[backbone\]"
    with pytest.raises(KshotError, match=why):
        Recipe(**recipe("protonet")).check()
    with pytest.raises(KshotError, match=r"episodes_at_once = 2 would .* Use one process, without episodes_at_once\.$"):
        Recipe(**recipe("simpleshot")).check()
    Recipe(**recipe("protonet", backbone={"name": "conv4", "norm": "group"})).check()
    Recipe(**recipe("maml", backbone={"name": "conv4", "norm": "running"})).check()
    Recipe(**recipe("protonet", backbone={"name": "efficientnet-lite0"})).check()  # which keeps its averages
    Recipe(**recipe("protonet", training={"episodes_per_step": 2, "episodes_at_once": 2})).check()


def test_episodes_that_adapt_the_backbone_take_turns_on_a_cpu_and_others_share_a_pass():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for name, on_a_cpu in (("maml", 1), ("anil", 8), ("protonet", 8), ("clusters", 8)):
        learner = Subject(name, Path()).build()
        assert episodes_at_once(learner, Training(episodes_per_step=8), cpu) == on_a_cpu
        assert episodes_at_once(learner, Training(episodes_per_step=8), gpu) == 8
        assert episodes_at_once(learner, Training(episodes_per_step=8, episodes_at_once=2), gpu) == 2


RANK = """
import os, torch
from kshot.testing import Subject, toy_images
from kshot.training import Training, meta_train
from kshot_plugins.protonet import ProtoNet

class Watching(ProtoNet):
    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.register_buffer("brightness", torch.zeros(()))

    def meta_loss(self, episodes):
        self.brightness += episodes.query.mean()  # which no gradient tells the other rank
        return super().meta_loss(episodes)

torch.set_num_threads(1)
for folder in folders:
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # ranks need not begin with equal weights
    recipe = Subject("maml", folder, norm="group").recipe
    learner = recipe.build((1, 16, 16))
    if folder.name == "drifts":
        learner = Watching(learner.backbone, ProtoNet.Config())
    for _ in meta_train(learner, toy_images(), toy_images(seed=1), Training(**settings), folder=folder, seed=3):
        pass
"""  # fmt: skip

SETTINGS = {
    "ways": 3, "queries": 2, "episodes_per_step": 3, "steps": 6, "lr": 1e-2, "validate_every": 3,
    "validation_episodes": 5, "validation_queries": 2, "clip": 1.0, "weight_decay": 1e-2,
}  # fmt: skip


def train(*folders: Path, ranks: int = 1) -> None:
    """Trainings one after the other, by one process or by several."""
    script = folders[0].parent / "rank.py"
    script.write_text(RANK)
    work = str(script), {"folders": folders, "settings": SETTINGS}
    with launched(ranks, runpy.run_path, *work):
        runpy.run_path(*work)


def test_two_ranks_give_the_weights_of_one_and_each_goes_on_from_the_others_checkpoint(tmp_path):
    one, two, from_one, drifts = (tmp_path / name for name in ("one", "two", "from_one", "drifts"))
    train(one)
    from_one.mkdir()
    shutil.copy(one / CHECKPOINTS[1], from_one)  # of step 3
    with pytest.raises(KshotError, match="brightness differs between the ranks"):  # of the third
        train(two, from_one, drifts, ranks=2)
    from_two = Path(shutil.copytree(two, tmp_path / "from_two"))
    (from_two / CHECKPOINTS[0]).unlink()
    train(from_two)
    expected, _ = checkpoint(one)
    for folder in (two, from_one, from_two):
        found, _ = checkpoint(folder)
        for name, value in expected["learner"].items():
            torch.testing.assert_close(found["learner"][name], value, rtol=1e-4, atol=1e-6)
        for point, other in zip(found["history"], expected["history"], strict=True):
            assert point == pytest.approx(other, rel=1e-5)


def test_ranks_that_would_make_another_algorithm_are_refused():
    with pytest.raises(KshotError, match="4 ranks share the episodes of a step, and there are 3: start fewer"):
        Training(**SETTINGS).check_parts(ProtoNet, Backbone, "group", ranks=4)
    with pytest.raises(KshotError, match=r"protonet with norm = 'running' .* and 2 ranks would make it another"):
        Training(**SETTINGS).check_parts(ProtoNet, Backbone, "running", ranks=2)
