"""A recipe's backbone: the norm that it and the learner agree on, and the weights that it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kshot import Backbone, KshotError, Learner, plugins
from kshot.recipe import Recipe
from kshot.testing import SIDE

IMAGE = (1, SIDE, SIDE)


def recipe(learner: str = "protonet", backbone: str = "conv4", **settings: object) -> Recipe:
    width = {"width": 8} if backbone == "conv4" else {}
    chosen = Recipe(
        name="tiny",
        dataset={"name": "toy"},
        backbone={"name": backbone, **width, **settings},
        learner={"name": learner},
    )
    chosen.check()
    return chosen


# The norm


@pytest.mark.parametrize(
    ("learner", "backbone", "asked", "given"),
    [
        ("protonet", "conv4", None, "running"),
        ("maml", "conv4", None, "support"),
        ("clusters", "conv4", None, "group"),
        ("maml", "conv4", "batch", "batch"),
        ("protonet", "conv4", "group", "group"),
        ("maml", "efficientnet-lite0", None, "running"),
        ("protonet", "efficientnet-lite0", None, "running"),
    ],
)
def test_the_norm_is_the_learners_first_choice_of_those_that_both_work_with(learner, backbone, asked, given):
    settings = {"size": 32} if backbone == "efficientnet-lite0" else {}
    built = recipe(learner, backbone, **settings, **({"norm": asked} if asked else {})).build(IMAGE)
    assert built.backbone.norm == given


def test_a_norm_that_one_of_them_does_not_work_with_is_refused_in_a_sentence():
    with pytest.raises(
        KshotError,
        match=r"\[backbone\] norm = 'support': maml works with support, batch, group, running, and "
        r"efficientnet-lite0 with running\. Set it to 'running', or leave it out\.$",
    ):
        recipe("maml", "efficientnet-lite0", norm="support")
    with pytest.raises(KshotError, match=r"norm = 'running': clusters works with group, support, and conv4 with .*or"):
        recipe("clusters", norm="running")


def test_no_norm_in_common_is_refused_in_a_sentence():
    with pytest.raises(
        KshotError, match=r"clusters works with group, support, and efficientnet-lite0 with running\. Use another"
    ):
        recipe("clusters", "efficientnet-lite0")


def test_a_norm_among_the_learners_settings_says_where_it_moved():
    with pytest.raises(KshotError, match=r"^norm is a setting of the backbone: move norm = 'group' to \[backbone\]$"):
        Recipe(name="tiny", dataset={"name": "toy"}, learner={"name": "maml", "norm": "group"}).check()


def test_a_norm_that_there_is_not_is_refused():
    with pytest.raises(KshotError, match="norm = 'transductive'"):
        recipe(norm="transductive")


def test_what_is_declared_of_norms_is_of_all_that_are_installed():
    known = {"running", "support", "batch", "group"}
    for kind in ("learners", "backbones"):
        for one in plugins.find().of(kind):
            assert one.value.norms
            assert set(one.value.norms) <= known


# The weights to start from


def same_weights(a: Backbone, b: Backbone) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def moved(learner: Learner) -> Learner:
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(1)
    return learner


def test_a_backbone_starts_from_the_file_of_a_state_dict(tmp_path: Path):
    trained = moved(recipe().build(IMAGE)).backbone
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    assert same_weights(
        trained, recipe("maml", norm="running", start=str(tmp_path / "weights.pt")).build(IMAGE).backbone
    )
    assert not same_weights(trained, recipe().build(IMAGE).backbone)


def test_a_backbone_starts_from_a_learner_that_was_trained(tmp_path: Path):
    trained = moved(recipe("simpleshot").build(IMAGE))
    trained.prepare([30])
    torch.save(
        {"about": "{}", "weights": trained.state_dict()}, tmp_path / "learner.pt"
    )  # as kshot_flows.store.learners does
    found = recipe("protonet", start=str(tmp_path / "learner.pt")).build(IMAGE)
    assert same_weights(trained.backbone, found.backbone)
    assert not any(name.startswith("base") for name in found.state_dict())


class Prefixed(nn.Module):
    """A network that kept a backbone of its own under the name that learners use."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)


def test_what_is_beside_the_backbone_in_a_state_dict_is_left_out(tmp_path: Path):
    trained = moved(recipe().build(IMAGE)).backbone
    torch.save(Prefixed(trained).state_dict(), tmp_path / "weights.pt")
    assert same_weights(trained, recipe(start=str(tmp_path / "weights.pt")).build(IMAGE).backbone)


def test_weights_of_another_network_are_refused_in_a_sentence(tmp_path: Path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    torch.save(recipe(width=16).build(IMAGE).state_dict(), tmp_path / "wider.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": 3}, tmp_path / "number.pt")
    for name in ("linear", "wider", "list", "number"):
        file = tmp_path / f"{name}.pt"
        with pytest.raises(KshotError, match=rf"^\[backbone\] start = '{file}' holds .*") as refused:
            recipe(start=str(file)).build(IMAGE)
        assert "\n" not in str(refused.value)


def test_a_file_that_is_missing_or_holds_no_weights_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(KshotError, match=r"^\[backbone\] start = '.*nowhere.pt': there is no such file$"):
        recipe(start=str(tmp_path / "nowhere.pt")).build(IMAGE)
    (tmp_path / "notes.pt").write_text("not weights")
    with pytest.raises(KshotError, match=r"^\[backbone\] start = '.*notes.pt' holds no weights: .*"):
        recipe(start=str(tmp_path / "notes.pt")).build(IMAGE)
    (tmp_path / "folder").mkdir()
    with pytest.raises(KshotError, match=r"^\[backbone\] start = '.*folder/learner.pt': there is no such file$"):
        recipe(start=str(tmp_path / "folder")).build(IMAGE)
