"""Convolution, norm and pooling in their cheapest order, beside the plain definition, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from kshot import Backbone, channels_last, convolve, make_norm
from kshot.norms import recorded
from kshot.recipe import Recipe

IMAGES = torch.rand(6, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 0.3


class Block(nn.Module):
    """One block, by `convolve` or as the definition says, with scales of both signs."""

    def __init__(self, norm: str, pool: int, *, bias: bool = False, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.pool = pool
        self.convolution = nn.Conv2d(2, width, 3, padding=1, bias=bias)
        self.norm = make_norm(norm, width)  # type: ignore[arg-type]
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        assert (self.norm.weight < 0).any()
        self.double()

    def forward(self, images: Tensor, plainly: bool = False) -> Tensor:
        if not plainly:
            return F.relu(convolve(channels_last(images), self.convolution, self.norm, self.pool))
        maps, norm = self.convolution(images), self.norm
        if isinstance(norm, nn.GroupNorm):
            maps = norm(maps)
        else:
            mean, var = norm.given() or (maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0))
            maps = (maps - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
            maps = maps * norm.weight[:, None, None] + norm.bias[:, None, None]
        return F.max_pool2d(F.relu(maps), self.pool)


def loss(block: Block, weights: dict[str, Tensor], images: Tensor, plainly: bool) -> Tensor:
    made = functional_call(block, weights, (images, plainly))
    return (made * torch.linspace(-1, 2, made[0].numel(), dtype=made.dtype).view_as(made[0])).square().mean()


def objective(block: Block, images: Tensor, plainly: bool, steps: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """The loss after so many gradient steps from some weights: after one, its gradient is of second order."""

    def after(weights: dict[str, Tensor]) -> Tensor:
        for _ in range(steps):
            slopes = grad(lambda fast: loss(block, fast, images, plainly))(weights)
            weights = {name: weight - 0.3 * slopes[name] for name, weight in weights.items()}
        return loss(block, weights, images.flip(0) + 0.1 * steps, plainly)

    return after


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("norm", ["support", "running", "group"])
def test_a_block_is_its_definition_in_value_and_in_derivatives_of_both_orders(norm, pool):
    wide = Block(norm, pool, bias=True, width=36)  # whose own statistics come from those of the images' windows
    for block in (Block(norm, pool), Block(norm, pool, bias=True).eval(), wide):
        if norm == "running" and block.training:
            block.norm.record = lambda *statistics: None  # functorch forbids to write to what it does not see
        weights = {name: value.detach() for name, value in block.named_parameters()}
        torch.testing.assert_close(block(IMAGES), block(IMAGES, True))
        for steps in (0, 1):
            found, expected = (grad(objective(block, IMAGES, plainly, steps))(weights) for plainly in (False, True))
            for name, slope in expected.items():
                assert slope.abs().max() > 1e-3 or name == "convolution.bias"
                torch.testing.assert_close(found[name], slope, msg=name)


def test_second_order_gradients_are_right_between_vmap_and_two_levels_of_grad():
    """F.batch_norm in this place is 1 % off, silently."""
    block, episodes = Block("support", 2), torch.stack([IMAGES, IMAGES.flip(2) * 0.7])
    weights = {name: value.detach() for name, value in block.named_parameters()}

    def together(weights: dict[str, Tensor]) -> Tensor:
        return vmap(lambda images: objective(block, images, False, 1)(weights))(episodes).mean()

    def each(weights: dict[str, Tensor]) -> Tensor:
        return torch.stack([objective(block, images, True, 1)(weights) for images in episodes]).mean()

    for found, expected in zip(grad(together)(weights).values(), grad(each)(weights).values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_statistics_that_are_given_again_give_the_same_maps():
    block = Block("support", 2, bias=True)
    with recorded(block) as statistics:
        made = block(IMAGES)
    assert statistics.keys() == {"norm.mean", "norm.var"}
    torch.testing.assert_close(statistics["norm.mean"], block.convolution(IMAGES).mean((0, 2, 3)))
    torch.testing.assert_close(functional_call(block, statistics, (IMAGES[:1],)), made[:1])


def test_running_averages_move_as_torchs_do():
    block, torchs = Block("running", 2), nn.BatchNorm2d(4).double()
    for images in (IMAGES, IMAGES * 2):
        block(images)
        torchs(block.convolution(images))
    for name, buffer in torchs.named_buffers():
        torch.testing.assert_close(block.norm.get_buffer(name), buffer)


# Images and backbones


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_layout_come_out_channels_last_and_the_same(channels):
    images = torch.rand(2, 3, channels, 4, 5)
    for given in (images, images.transpose(3, 4).contiguous().transpose(3, 4)):
        made = channels_last(given.flatten(0, 1))
        assert torch.equal(made, images.flatten(0, 1))
        assert made.stride() == (channels * 20, 1, channels * 5, channels)


def backbone(norm: str, **settings: object) -> Backbone:
    torch.manual_seed(0)
    recipe = Recipe(
        name="tiny",
        dataset={"name": "toy"},
        backbone={"name": "conv4", "width": 8, "norm": norm, **settings},
        learner={"name": "protonet"},
    )
    return recipe.build((1, 16, 16)).backbone


@pytest.mark.parametrize("settings", [{}, {"downsample": "stride"}, {"halvings": 2, "mean": True}], ids=str)
@pytest.mark.parametrize("norm", ["support", "running", "group"])
def test_conv4_is_its_modules_one_after_the_other(norm, settings):
    made, images = backbone(norm, **settings).eval(), torch.rand(3, 1, 16, 16)
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    maps = made.blocks(images)
    expected = maps.mean((2, 3)) if settings.get("mean") else maps.flatten(1)
    torch.testing.assert_close(made(images), expected, rtol=1e-4, atol=1e-4)


def test_the_maps_of_conv4_lie_channels_last_though_a_batch_of_one_channel_does_not_say_so(monkeypatch):
    layouts, pool = [], F.max_pool2d

    def pooled(maps: Tensor, size: int) -> Tensor:
        layouts.append(maps.is_contiguous(memory_format=torch.channels_last))
        return pool(maps, size)

    monkeypatch.setattr(F, "max_pool2d", pooled)
    for norm in ("support", "running", "group"):
        backbone(norm)(torch.rand(3, 2, 1, 16, 16).flatten(0, 1))
    assert layouts[0::4] == layouts[1::4] == layouts[2::4] == [True] * 3


@pytest.mark.parametrize("norm", ["support", "running"])
def test_weights_with_the_biases_of_earlier_versions_load_and_mean_the_same(norm):
    made, images = backbone(norm).eval(), torch.rand(3, 1, 16, 16)
    earlier = {name: value.clone() for name, value in made.state_dict().items()}
    for place in (0, 4, 8, 12):
        earlier[f"blocks.{place}.bias"] = torch.full((8,), 0.5)
        if norm == "running":
            earlier[f"blocks.{place + 1}.running_mean"] += 0.5  # the averages then had the bias in them
    again = backbone(norm).eval()
    again.load_state_dict(earlier)
    torch.testing.assert_close(again(images), made(images))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        again.load_state_dict({**earlier, "blocks.20.bias": torch.zeros(8)})
