"""timm's networks: sized, normalised and pooled as pretrained, stage by stage, from a file, and out as ONNX."""

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn.functional import normalize

from kshot import KshotError, plugins
from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape
from kshot.export import Facts, export
from kshot.recipe import Recipe
from kshot_plugins.timm_networks import Timm
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin

SMALL = ["test_vit", "test_convnext"]  # timm's own for tests: 0.3 and 0.2 million weights


def small(name="test_vit", image=(3, 20, 20), **options):
    torch.manual_seed(0)
    backbone = Timm.named(name)
    return backbone(image, backbone.Config(**{"weights": "none", "size": 32, **options}))


def photos(count=2, channels=3):
    return torch.rand(count, channels, 20, 20, generator=torch.Generator().manual_seed(1))


def built(name="test_vit", **options):
    """timm's own network, its classifier of so many classes included."""
    import timm

    torch.manual_seed(7)
    return timm.create_model(name, img_size=32, **options)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine without network, and the empty folder of its hub's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_recipe_names_any_of_them_and_a_misspelt_one_gets_the_nearest():
    assert plugins.find().backbone("timm/test_vit").value.name == "test_vit"
    with pytest.raises(KshotError, match=r"no network 'test_vti'; near it: test_vit"):
        plugins.find().backbone("timm/test_vti")


@pytest.mark.parametrize("name", SMALL)
def test_stages_end_in_the_features_that_timm_pools_itself(name):
    stages, inner, last = (small(name, features=which) for which in ("stages", "inner", "last"))
    with torch.no_grad():
        every = stages(photos())
        assert every.shape == (2, stages.features)
        assert torch.equal(every, torch.cat([inner(photos()), normalize(last(photos()))], 1))
        images = (last.resize(photos()) - last.mean) / last.std
        assert torch.equal(last(photos()), last.network.forward_head(last.network.forward_features(images), True))


def test_a_stage_of_a_transformer_is_its_class_token_and_the_mean_of_its_patches():
    backbone = small(features="inner")
    seen = []
    backbone.network.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        features = backbone(photos())
    tokens = seen[0]  # (N, 1 + patches, 64)
    assert backbone.widths[0] == (64, 64)
    assert torch.allclose(features[:, :64], normalize(tokens[:, 0]))
    assert torch.allclose(features[:, 64:128], normalize(tokens[:, 1:].mean(1)), atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_what_follows_the_last_stage_that_is_wanted_is_not_computed(name):
    backbone, calls = small(name), []
    trunk = backbone.network.blocks if name == "test_vit" else backbone.network.stages
    for i, block in enumerate(trunk):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    with torch.no_grad():
        backbone.pooled(photos(), [0, 1])
    assert calls == [0, 1]


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_come_from_a_file_whatever_its_number_of_classes(tmp_path, ending):
    trained, file = built(num_classes=7), str(tmp_path / f"model.{ending}")
    (safetensors.torch.save_file if ending == "safetensors" else torch.save)(trained.state_dict(), file)
    taken = small(weights=file)
    assert torch.equal(taken.network.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)


def test_position_embeddings_are_resampled_where_images_have_another_size(tmp_path):
    torch.save(built().state_dict(), tmp_path / "model.pth")
    taken = small(weights=str(tmp_path / "model.pth"), size=48)
    assert taken.network.pos_embed.shape == (1, 1 + (48 // 16) ** 2, 64)
    with torch.no_grad():
        assert taken(photos()).shape == (2, 64)


def test_a_file_that_does_not_fit_is_refused_in_a_sentence(tmp_path):
    file = str(tmp_path / "model.pth")
    with pytest.raises(KshotError, match="there is no such file"):
        small(weights=file)
    (tmp_path / "model.pth").write_text("no weights")
    with pytest.raises(KshotError, match="holds no weights"):
        small(weights=file)
    torch.save(built("test_vit2").state_dict(), file)
    with pytest.raises(KshotError, match=r"does not fit timm's 'test_vit': .*Unexpected key"):
        small(weights=file)


def test_without_network_the_error_says_which_file_to_fetch(no_hub):
    with pytest.raises(KshotError, match=r"Fetch model.safetensors of timm/test_vit.r160_in1k .*licence: apache-2.0"):
        small(weights="default")


def test_without_network_weights_in_the_hubs_cache_are_taken(no_hub):
    kept, trained = no_hub / "models--timm--test_vit.r160_in1k", built()
    for folder, content in (("refs", "abc"), ("snapshots/abc", None)):
        (kept / folder).mkdir(parents=True)
        if content:
            (kept / folder / "main").write_text(content)
    safetensors.torch.save_file(trained.state_dict(), kept / "snapshots" / "abc" / "model.safetensors")
    taken = small(weights="default")
    assert torch.equal(taken.network.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)


def test_a_network_that_shows_no_stages_gives_its_last_features_only():
    assert small("hiera_tiny_224", size=224).features == 768
    with pytest.raises(KshotError, match="Set features = 'last'"):
        small("hiera_tiny_224", size=224, features="stages")


def test_a_size_that_no_patches_fill_is_refused_in_a_sentence():
    with pytest.raises(KshotError, match="does not accept images"):
        small(size=33)


@pytest.mark.parametrize(("name", "features"), [("test_vit", "stages"), ("test_convnext", "inner")])
def test_onnx_answers_as_torch_does(tmp_path, name, features):
    random = np.random.default_rng(0)
    tints = random.uniform(60, 200, (8, 1, 3, 1, 1)) + random.normal(0, 20, (8, 4, 3, 20, 20))
    images = ClassImages.from_arrays(list(tints.clip(0, 255).astype(np.uint8)))  # classes that are a colour each
    settings = {"name": f"timm/{name}", "weights": "none", "size": 32, "features": features}
    recipe = Recipe.model_validate(
        {"name": "x", "dataset": {"name": "toy"}, "backbone": settings, "learner": {"name": "protonet"}}
    )
    facts = Facts(
        learner=Plugin(name="protonet"),
        backbone=Plugin(name=f"timm/{name}", config=recipe.backbone.options),
        image=ImageRule(size=20, channels=3),
    )
    report = export(
        recipe.build(images.shape), tmp_path / "bundle",
        facts=facts, data=images, shape=Shape(3, 1, 2), seed=0, episodes=5,
    )  # fmt: skip
    assert report.manifest.parity.agreement >= 0.999
