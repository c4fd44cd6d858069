"""A learner becomes a bundle that answers as torch does, or no bundle at all and an error that says why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from kshot import Backbone, InnerLoop, Learner, LearnerConfig, Shape, State, cross_entropy, gradient, one_hot
from kshot.backbones import BackboneConfig
from kshot.data.datasets import ClassImages
from kshot.export import ExportError, Facts, Report, export
from kshot.export.trace import Spec, trace
from kshot.ops import class_means, squared_distances
from kshot_plugins.conv4 import Conv4
from kshot_plugins.finetune import FineTune
from kshot_plugins.maml import MAML
from kshot_plugins.protonet import ProtoNet
from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import BundleError, Manifest, Plugin

SIDE = 16
SHAPE = Shape(3, 2, 4)


@pytest.fixture(scope="module")
def images() -> ClassImages:
    """Ten classes of noisy blots."""
    random = np.random.default_rng(0)
    blots = random.integers(0, 256, (10, 1, 1, 4, 4)).repeat(4, 3).repeat(4, 4)
    noisy = np.clip(blots + random.normal(0, 50, (10, 12, 1, SIDE, SIDE)), 0, 255).astype(np.uint8)
    return ClassImages.from_arrays(list(noisy))


def facts(learner: Learner) -> Facts:
    return Facts(
        learner=Plugin(name=learner.name, config=learner.config.model_dump()),
        backbone=Plugin(name="conv4"),
        image=ImageRule(size=SIDE, channels=1),
    )


class Flat(Backbone):
    """Pixels as features."""

    def __init__(self, image: tuple[int, int, int], config: BackboneConfig) -> None:
        super().__init__(image, config)
        self.features = SIDE * SIDE
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.scale


def make(kind: type[Learner], backbone: str = "pool", norm: str = "running", **settings: object) -> Learner:
    torch.manual_seed(0)
    config, image = kind.Config.model_validate(settings), (1, SIDE, SIDE)
    if backbone == "flat":
        return kind(Flat(image, BackboneConfig(norm=norm)), config)
    learner = kind(Conv4(image, Conv4.Config(width=8, downsample=backbone, norm=norm)), config)
    for module in learner.modules():  # as if trained: averages that are not the initial ones
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return learner


def exported(learner: Learner, folder: Path, images: ClassImages, episodes: int = 20) -> Report:
    return export(learner, folder, facts=facts(learner), data=images, shape=SHAPE, seed=1, episodes=episodes)


CASES: dict[str, tuple[type[Learner], dict[str, object]]] = {
    "protonet, averages": (ProtoNet, {"norm": "running"}),
    "protonet, statistics of the support set": (ProtoNet, {"norm": "batch", "backbone": "stride"}),
    "finetune": (FineTune, {"norm": "support", "steps": 5}),
    "finetune, each image by itself": (FineTune, {"norm": "group", "steps": 5}),
    "maml": (MAML, {"norm": "support", "eval_steps": 3}),
    "maml, prototypes": (MAML, {"norm": "group", "head": "prototypes", "length": 3.0, "eval_steps": {1: 2, 5: 3}}),
    "maml, rates by step": (MAML, {"backbone": "flat", "norm": "running", "per_step": True, "eval_steps": 3}),
}


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, images: ClassImages) -> Callable[[str], tuple[Learner, Report]]:
    """The learner and the bundle of a case; each is exported once."""

    @cache
    def build(case: str) -> tuple[Learner, Report]:
        kind, settings = CASES[case]
        learner = make(kind, **settings).eval()
        return learner, exported(learner, tmp_path_factory.mktemp("case") / "bundle", images)

    return build


@pytest.mark.parametrize("case", CASES)
def test_a_bundle_answers_as_torch_does(case: str, bundle_of: Callable[[str], tuple[Learner, Report]]) -> None:
    learner, report = bundle_of(case)
    parity = report.manifest.parity
    assert parity.agreement >= 0.999
    assert parity.accuracy == pytest.approx(parity.torch_accuracy, abs=0.005)
    assert parity.step_difference < 1e-5
    assert report.manifest.norm == learner.backbone.norm
    for shots in (1, 2, 3, 9):
        steps = learner.steps_for(shots) if isinstance(learner, InnerLoop) else None
        assert report.manifest.steps_for(shots) == steps
    assert "100.00 %" in str(report)
    for name in report.manifest.files:
        model = onnx.load(report.folder / name)
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
        photos = model.graph.input[0].type.tensor_type
        takes_images = len(photos.shape.dim) == 4
        assert takes_images == (report.manifest.takes == "images" or name == "embed.onnx")
        assert photos.elem_type == (onnx.TensorProto.UINT8 if takes_images else onnx.TensorProto.FLOAT)
        sizes = {d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim} - {""}
        assert sizes <= {"S", "Q", "W"}
    bundle = Bundle.open(report.folder)
    random = np.random.default_rng(1)
    for counts in ((1, 4), (2, 1, 3, 1)):  # uneven shots, ids in any order, other sizes than the traced ones
        ids = random.choice(99, len(counts), replace=False)
        labels = random.permutation(np.repeat(ids, counts))
        support = random.integers(0, 256, (len(labels), 1, SIDE, SIDE), np.uint8)
        query = random.integers(0, 256, (7, 1, SIDE, SIDE), np.uint8)
        adapted = bundle.adapt_arrays(support, labels, ids)
        found = bundle.logits(adapted, query)
        with torch.no_grad():
            state = learner.adapt(torch.from_numpy(support) / 255, *map(torch.from_numpy, (labels, ids)))
            expected = learner.classify(state, torch.from_numpy(query) / 255)
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)
        taken = bundle.graphs.embed(query) if learner.takes_features else query
        for name, values in bundle.graphs.classify(adapted, taken).items():
            if name in bundle.graphs.gives:
                np.testing.assert_allclose(bundle.graphs.baked(adapted)(taken)[name], values, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def maml(bundle_of: Callable[[str], tuple[Learner, Report]]) -> tuple[Learner, Path]:
    learner, report = bundle_of("maml")
    return learner, report.folder


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_the_number_of_inner_steps_is_an_input(maml: tuple[Learner, Path], steps: int, images: ClassImages) -> None:
    learner, folder = maml
    support = images.gather(np.arange(4), np.zeros(4, int))
    query = images.gather(np.arange(4), np.ones(4, int))
    bundle, ids = Bundle.open(folder), np.arange(4)
    found = bundle.logits(bundle.adapt_arrays(support, ids, ids, steps), query)
    labels = torch.arange(4)
    with torch.no_grad():
        state = learner.adapt(torch.from_numpy(support) / 255, labels, labels, steps)
        expected = learner.classify(state, torch.from_numpy(query) / 255)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_file_does_not_grow_with_the_steps_and_holds_each_weight_once(maml: tuple[Learner, Path]) -> None:
    learner, folder = maml
    model = onnx.load(folder / "adapt.onnx")
    loops = [node.name for node in model.graph.node if node.op_type == "Loop"]
    assert loops == ["first", "first_two", "step"]
    weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    expected = learner.backbone.blocks[4].weight.detach().numpy()
    assert sum(w.shape == expected.shape and np.array_equal(w, expected) for w in weights) == 1


def test_images_of_another_size_are_refused(tmp_path: Path, images: ClassImages) -> None:
    learner = make(ProtoNet)
    other = facts(learner).model_copy(update={"image": ImageRule(size=32, channels=1)})
    with pytest.raises(ExportError, match=r"takes images \(1, 16, 16\), the image rule makes \(1, 32, 32\)"):
        export(learner, tmp_path / "bundle", facts=other, data=images, shape=SHAPE, seed=1)


class Nearest(Learner):
    """A sound learner, which each offender below spoils in one way."""

    name = "nearest"

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": class_means(self.embed(support), labels, classes)}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return -squared_distances(self.embed(query), state["means"])


def nearest(kind: type[Nearest] = Nearest, **settings: object) -> Learner:
    return make(kind, "flat", **settings)


def test_the_same_learner_gives_the_same_bytes(tmp_path: Path, images: ClassImages) -> None:
    for name in ("one", "two"):
        exported(nearest(), tmp_path / name, images, episodes=5)
    assert Manifest.load(tmp_path / "one") == Manifest.load(tmp_path / "two")
    files = [(tmp_path / name / "adapt.onnx").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_exporting_leaves_the_learner_as_it_was(tmp_path: Path, images: ClassImages) -> None:
    learner = nearest().train()
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    exported(learner, tmp_path / "bundle", images, episodes=5)
    assert learner.training
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.state_dict().items())


def test_a_bundle_takes_the_place_of_an_older_one_but_of_nothing_else(tmp_path: Path, images: ClassImages) -> None:
    exported(nearest(), tmp_path / "bundle", images, episodes=5)
    exported(nearest(norm="group"), tmp_path / "bundle", images, episodes=5)
    assert Manifest.load(tmp_path / "bundle").norm == "group"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("")
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        exported(nearest(), tmp_path / "precious", images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "precious"]


class CountsWithLen(Nearest):
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": super().adapt(support, labels, classes)["means"] * (len(support) + 1)}


class TakesEqualShots(Nearest):
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        ways = classes.shape[0]
        own = (labels[None, :] == classes[:, None]).long()  # (W, S)
        shots = support.shape[0] // ways
        first = own.topk(shots, dim=1).indices.flatten()  # (W * shots,)
        return {"means": self.embed(support)[first].reshape(ways, shots, -1).mean(1)}


class BranchesOnSize(Nearest):
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        means = super().adapt(support, labels, classes)["means"]
        return {"means": means if support.shape[0] < 50 else means * 2}


class FixesItsWays(Nearest):
    def classify(self, state: State, query: Tensor) -> Tensor:
        return super().classify(state, query) + torch.arange(int(state["means"].shape[0]))


class Remembers(Nearest):
    def __init__(self, backbone: Backbone, config: LearnerConfig) -> None:
        super().__init__(backbone, config)
        self.average = nn.Buffer(torch.zeros(backbone.features))

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        self.average.lerp_(self.embed(support).detach().mean(0), 0.1)
        return super().adapt(support, labels, classes)


class DrawsLots(Nearest):
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return super().adapt(support + torch.rand_like(support), labels, classes)


class DividesByNothing(Nearest):
    def classify(self, state: State, query: Tensor) -> Tensor:
        return super().classify(state, query) / (state["means"] * 0).sum()


class GivesPairs(Nearest):
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        means = super().adapt(support, labels, classes)["means"]
        return {"means": means, "pairs": torch.cat([means, means])}


class CallsItQuery(Nearest):
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {**super().adapt(support, labels, classes), "query": support.mean(0)}


class StopsEarly(Nearest):
    def classify(self, state: State, query: Tensor) -> Tensor:
        logits = super().classify(state, query)
        return logits if logits.max().item() < 0 else logits * 2


class Borrows(Nearest):
    def classify(self, state: State, query: Tensor) -> Tensor:
        return super().classify(state, query) + torch.from_numpy(query.numpy()).sum()


class Solves(Nearest):
    def classify(self, state: State, query: Tensor) -> Tensor:
        means = state["means"]
        ridge = means @ means.t() + torch.eye(means.shape[0], dtype=means.dtype)
        return torch.linalg.solve(ridge, means @ self.embed(query).t()).t()


@pytest.mark.parametrize(
    ("offender", "reason"),
    [
        (CountsWithLen, "adapt of 'nearest' works for one number of support images only"),
        (TakesEqualShots, "wrong for 4 support images of 2 classes"),
        (BranchesOnSize, "wrong for 120 support images of 20 classes"),
        (FixesItsWays, "classify of 'nearest' works for one number of ways only"),
        (Remembers, "changes average while it adapts"),
        (DrawsLots, "other results each time"),
        (DividesByNothing, "NaN or infinity"),
        (GivesPairs, r"'pairs' of shape \(2\*.*, 256\)"),
        (CallsItQuery, "a tensor named 'query'"),
        (StopsEarly, "classify of 'nearest' converts a tensor's value to a number"),
        (Borrows, "classify of 'nearest' cannot be traced: .*numpy"),
        (Solves, "classify of 'nearest' uses an operation that cannot be exported: .*linalg_solve"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_learner_that_a_graph_cannot_hold_is_refused_and_nothing_is_left(
    offender: type[Nearest], reason: str, tmp_path: Path, images: ClassImages
) -> None:
    learner = nearest(offender)
    with pytest.raises(ExportError, match=reason):
        exported(learner, tmp_path / "bundle", images, episodes=5)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, images: ClassImages) -> None:
    learner = make(ProtoNet)
    nn.init.constant_(learner.backbone.blocks[0].weight, float("nan"))
    with pytest.raises(ExportError, match=r"NaN or infinity in backbone\.blocks\.0\.weight"):
        exported(learner, tmp_path / "bundle", images)


class Stepping(InnerLoop):
    """A head found by Adam, whose epsilon careless graph rewriting deletes."""

    name = "stepping"
    steps = 4  # type: ignore[assignment]  # a property elsewhere

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features = self.embed(support)
        zeros = features.new_zeros(classes.shape[0], features.shape[1])
        return {"features": features, "head": zeros, "first": zeros, "second": zeros}

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        targets = one_hot(labels, classes)
        features = state["features"]
        (grad,) = gradient(
            lambda fast: cross_entropy(features @ fast["head"].t(), targets), {"head": state["head"]}
        ).values()
        first = 0.9 * state["first"] + 0.1 * grad
        second = 0.999 * state["second"] + 0.001 * grad.square()
        time = (i + 1).to(grad.dtype)
        scaled = (first / (1 - 0.9**time)) / ((second / (1 - 0.999**time)).sqrt() + 1e-8)
        return {**state, "head": state["head"] - 0.05 * scaled, "first": first, "second": second}

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"head": state["head"]}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.embed(query) @ state["head"].t()


def test_an_inner_adam_keeps_its_epsilon_and_its_step_number(tmp_path: Path, images: ClassImages) -> None:
    learner = make(Stepping, "flat")
    report = exported(learner, tmp_path / "bundle", images)
    assert report.manifest.parity.agreement == 1
    assert list(report.manifest.state) == ["head"]
    body = (
        next(n for n in onnx.load(tmp_path / "bundle" / "adapt.onnx").graph.node if n.op_type == "Loop").attribute[0].g
    )
    assert len(body.input) == 2 + 3  # number and condition; the features do not change, so they are not carried


def test_operations_in_place_are_exported_for_what_they_do(tmp_path: Path, images: ClassImages) -> None:
    class InPlace(Stepping):
        def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
            state = super().begin(support, labels, classes)
            head = state["head"] + 0.5
            head[:, 0].mul_(2)  # a view of it
            return {**state, "head": head}

    for backbone, norm in (("flat", "running"), ("pool", "group")):
        report = exported(make(InPlace, backbone, norm), tmp_path / backbone, images)
        assert report.manifest.parity.agreement == 1


def test_a_step_that_changes_the_state_s_shape_is_refused(tmp_path: Path, images: ClassImages) -> None:
    class Grows(Stepping):
        def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
            return {**state, "head": state["head"][:, : self.backbone.features // 2]}

        def classify(self, state: State, query: Tensor) -> Tensor:
            return self.embed(query)[:, : state["head"].shape[1]] @ state["head"].t()

    learner = make(Grows, "flat")
    with pytest.raises(ExportError, match=r"changes 'head' from \(W, 256\) torch.float32 to \(W, 128\)"):
        exported(learner, tmp_path / "bundle", images)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "overlapping pool, dilation": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ),
    "depthwise, average pool": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 8, 3, groups=4), nn.SiLU(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
    ),
    "upwards": lambda: nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, 2, 1, 1)),
    "batch norm by averages, group norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4).eval(), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()
    ),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8), nn.LayerNorm(8), nn.GELU()),
}


@pytest.mark.parametrize("layers", LAYERS)
def test_the_gradient_of_common_layers_exports(layers: str) -> None:
    """Backward passes beyond Conv4's: the traced gradient, run by onnxruntime, is autograd's."""
    import onnxruntime

    from kshot.export.graphs import adapt_model

    torch.manual_seed(0)
    net = LAYERS[layers]()
    learner = nearest()
    learner.net = net
    names = [name for name, _ in net.named_parameters()]

    def gradients(given: State) -> State:
        weights = dict(learner.net.named_parameters())

        def loss(fast: State) -> Tensor:
            outputs = torch.func.functional_call(learner.net, fast, (given["support"],))
            return (outputs.flatten(1).sum(1) * (1 + given["labels"])).square().mean()

        return {f"d {name}": value for name, value in gradient(loss, weights).items()}

    spec = {"support": Spec(("S", 1, SIDE, SIDE)), "labels": Spec(("S",), torch.int64)}
    piece = trace(learner, "gradients", gradients, spec)
    session = onnxruntime.InferenceSession(adapt_model(piece, wanted=piece.outputs).SerializeToString())
    support = np.random.default_rng(0).integers(0, 256, (5, 1, SIDE, SIDE), np.uint8)
    labels = np.arange(5) % 2
    found = session.run(None, {"support": support, "labels": labels})
    with torch.no_grad():
        expected = gradients({"support": torch.from_numpy(support) / 255, "labels": torch.from_numpy(labels)})
    assert [value.name for value in session.get_outputs()] == [f"d {name}" for name in names]
    for ours, (name, theirs) in zip(found, expected.items(), strict=True):
        scale = float(theirs.abs().max()) + 1e-6
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_features_take_the_place_of_images_where_an_image_is_embedded_by_itself(
    case: str, bundle_of: Callable[[str], tuple[Learner, Report]]
) -> None:
    learner, report = bundle_of(case)
    graphs = Bundle.open(report.folder).graphs
    assert graphs.takes_features == (case in ("protonet, averages", "finetune, each image by itself"))
    assert report.manifest.takes == ("features" if graphs.takes_features else "images")
    assert graphs.embeds == (learner.backbone.norm in ("running", "group"))
    support = np.random.default_rng(4).integers(0, 256, (6, 1, SIDE, SIDE), np.uint8)
    images, ids, steps = torch.from_numpy(support) / 255, np.arange(6) % 3, report.manifest.steps
    state = graphs.adapt(support, ids, np.arange(3), steps)
    found = graphs.classify(state, support)
    logits, features = found["logits"], found["query_features"]
    with torch.no_grad():
        expected = learner.embed(images, {name: torch.from_numpy(value) for name, value in state.items()})
        np.testing.assert_allclose(features, expected.numpy(), atol=1e-4)
        if not graphs.embeds:
            with pytest.raises(BundleError, match="depend on the support set"):
                graphs.embed(support)
            return
        one_by_one = np.concatenate([graphs.embed(image[None]) for image in support])
        np.testing.assert_allclose(one_by_one, learner.embed(images).numpy(), atol=1e-4)
    if graphs.takes_features:
        again = graphs.adapt(one_by_one, ids, np.arange(3), steps)
        np.testing.assert_allclose(graphs.logits(again, one_by_one), logits, atol=1e-4)


def test_the_manifest_says_what_was_exported(maml: tuple[Learner, Path]) -> None:
    _, folder = maml
    content = json.loads((folder / "bundle.json").read_text())
    assert content["schema_version"] == 3
    assert content["transductive"] is False
    assert content["state"]["head.weight"] == {"shape": ["W", 8], "dtype": "float32"}
    assert content["learner"]["config"]["eval_steps"] == 3
    assert set(content["files"]) == {"adapt.onnx", "classify.onnx"}
    assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for file in content["files"].values())
