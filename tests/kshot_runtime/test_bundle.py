"""A bundle serves by itself, from a folder or a zip, and refuses whatever is not what its manifest says."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape
from kshot.export import export
from kshot_plugins.conv4 import Conv4
from kshot_plugins.finetune import FineTune
from kshot_plugins.protonet import ProtoNet
from kshot_runtime import onnx_file
from kshot_runtime.bundle import AT_ONCE, Bundle, State, evidence, softmax
from kshot_runtime.images import ImageError, ImageRule
from kshot_runtime.manifest import (
    Accuracy,
    BundleError,
    Calibration,
    Facts,
    FileFacts,
    Limits,
    Manifest,
    OperatingPoint,
    Plugin,
    external_tensor,
)

SIDE = 16
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


def photo(colour: str, shade: int = 0) -> bytes:
    """A photo of nearly one colour, as a PNG."""
    pixels = np.clip(np.array(COLOURS[colour]) + np.random.default_rng(shade).normal(0, 20, (30, 40, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def images() -> ClassImages:
    random = np.random.default_rng(0)
    plain = random.integers(0, 256, (6, 1, 3, 1, 1)) + random.normal(0, 20, (6, 8, 3, SIDE, SIDE))
    return ClassImages.from_arrays(list(np.clip(plain, 0, 255).astype(np.uint8)))


FACTS = Facts(
    learner=Plugin(name="protonet"),
    backbone=Plugin(name="conv4"),
    image=ImageRule(size=SIDE, channels=3),
    limits=Limits(ways=4, shots=3, support=6, steps=9),
    calibration=(
        Calibration(ways=5, shots=1, temperature=2.0, threshold=0.6),
        Calibration(ways=5, shots=5, temperature=4.0, by="logit", threshold=-1e-9),
    ),
    expected=(Accuracy(ways=5, shots=1, queries=15, episodes=600, accuracy=0.61, margin=0.01),),
)


def build(folder: Path, images: ClassImages, kind: type = ProtoNet, **settings: object) -> Path:
    torch.manual_seed(0)
    config = kind.Config(**settings)
    learner = kind(Conv4((3, SIDE, SIDE), Conv4.Config(width=8)), config)
    facts = FACTS.model_copy(update={"learner": Plugin(name=learner.name)})
    export(learner, folder, facts=facts, data=images, shape=Shape(3, 1, 3), seed=1, episodes=5)
    return folder


@pytest.fixture(scope="session")
def protonet(tmp_path_factory: pytest.TempPathFactory, images: ClassImages) -> Path:
    return build(tmp_path_factory.mktemp("bundles") / "protonet", images)


@pytest.fixture(scope="session")
def finetune(tmp_path_factory: pytest.TempPathFactory, images: ClassImages) -> Path:
    return build(tmp_path_factory.mktemp("bundles") / "finetune", images, FineTune, steps=3)


@pytest.fixture
def copy(protonet: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(protonet, tmp_path / "copy"))


def test_the_five_lines_of_the_docstring_work_without_torch(protonet: Path, tmp_path: Path) -> None:
    for colour, name in (("red", "cat"), ("blue", "dog"), ("red", "mystery")):
        Image.open(io.BytesIO(photo(colour))).save(tmp_path / f"{name}.jpg")
    shutil.copytree(protonet, tmp_path / "bundle")
    lines = [line.strip()[4:] for line in (Bundle.__doc__ or "").splitlines() if line.strip().startswith(">>>")]
    assert len(lines) == 5
    script = ["from kshot_runtime.bundle import Bundle", *lines, "import sys", "assert 'torch' not in sys.modules"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['cat'] [[")
    assert State.load(tmp_path / "pets.npz").classes == ("cat", "dog")


def test_colours_are_told_apart_by_name_from_bytes_paths_and_arrays(protonet: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(protonet)
    (tmp_path / "blue.png").write_bytes(photo("blue"))
    green = bundle.images([photo("green")])[0]
    state = bundle.adapt([photo("red"), tmp_path / "blue.png", green, photo("red", 1)], ["red", "blue", "green", "red"])
    assert (state.classes, state.counts) == (("red", "blue", "green"), (2, 1, 1))
    answers = bundle.classify(state, [photo("green", 3), photo("red", 4), photo("blue", 5)])
    assert answers.names == ["green", "red", "blue"]
    assert answers.probabilities.shape == (3, 3)
    np.testing.assert_allclose(answers.probabilities.sum(1), 1, rtol=1e-5)
    assert len(bundle.classify(state, [])) == 0
    assert bundle.device == "cpu"


def test_labels_may_be_numbers(protonet: Path) -> None:
    assert Bundle.open(protonet).adapt([photo("red"), photo("blue")], [7, 3]).classes == ("7", "3")


def test_a_zip_serves_as_its_folder_does(protonet: Path, tmp_path: Path) -> None:
    packed = Path(shutil.make_archive(str(tmp_path / "bundle"), "zip", protonet))
    support, labels = [photo("red"), photo("blue")], ["a", "b"]
    states = [Bundle.open(source).adapt(support, labels) for source in (protonet, packed)]
    assert states[0].bundle == states[1].bundle
    np.testing.assert_array_equal(states[0].tensors["prototypes"], states[1].tensors["prototypes"])


def test_a_state_is_saved_and_loaded_to_the_bit(protonet: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(protonet)
    state = bundle.adapt([photo("red"), photo("blue")], ["Äpfel & co", "b/../c"])
    state.save(tmp_path / "state.npz")
    again = State.load(tmp_path / "state.npz")
    assert (again.classes, again.counts, again.bundle) == (state.classes, state.counts, state.bundle)
    query = [photo("grey")]
    np.testing.assert_array_equal(bundle.classify(again, query).logits, bundle.classify(state, query).logits)
    with pytest.raises(BundleError, match="not a saved state"):
        State.from_bytes(b"PK nonsense")


def test_a_state_of_another_bundle_is_refused(protonet: Path, finetune: Path) -> None:
    state = Bundle.open(protonet).adapt([photo("red"), photo("blue")], ["a", "b"])
    with pytest.raises(BundleError, match="adapt again"):
        Bundle.open(finetune).classify(state, [photo("red")])


def test_many_queries_go_in_parts_with_the_same_answers(protonet: Path) -> None:
    bundle, random = Bundle.open(protonet), np.random.default_rng(0)
    tensors = bundle.adapt_arrays(random.integers(0, 256, (2, 3, SIDE, SIDE), np.uint8), np.arange(2), np.arange(2))
    query = random.integers(0, 256, (AT_ONCE + 3, 3, SIDE, SIDE), np.uint8)
    one_by_one = np.concatenate([bundle.logits(tensors, image[None]) for image in query])
    np.testing.assert_allclose(bundle.logits(tensors, query), one_by_one, atol=1e-5)
    assert bundle.logits(tensors, query[:0]).shape == (0, 2)


def test_fixed_buffers_and_a_kept_arena_change_no_feature(protonet: Path) -> None:
    random = np.random.default_rng(0)
    plain, kept = Bundle.open(protonet), Bundle.open(protonet, threads=2, adapt_threads=1, arena=True)
    kept.graphs.fix([2, 4])
    for size in (1, 2, 4, 2, 3, 4):
        images = random.integers(0, 256, (size, 3, SIDE, SIDE), np.uint8)
        found, before = kept.graphs.embed(images), kept.graphs.embed(images[::-1])
        np.testing.assert_allclose(found, plain.graphs.embed(images), atol=1e-4)
        np.testing.assert_allclose(before, found[::-1], atol=1e-4)


def test_the_calibration_of_the_nearest_shots_is_used(protonet: Path) -> None:
    bundle = Bundle.open(protonet)
    one = bundle.adapt([photo("red"), photo("blue")], ["a", "b"])
    answers = bundle.classify(one, [photo("red", 2), photo("grey", 2)])
    np.testing.assert_allclose(answers.probabilities, softmax(answers.logits / 2))
    np.testing.assert_array_equal(answers.known, answers.probabilities.max(1) >= 0.6)
    many = State(one.tensors, one.classes, (5, 5), one.bundle)
    answers = bundle.classify(many, [photo("red", 2)])
    np.testing.assert_allclose(answers.probabilities, softmax(answers.logits / 4))
    np.testing.assert_array_equal(answers.known, answers.logits.max(1) >= -1e-9)


def test_steps_are_the_learner_s_own_unless_asked_for(finetune: Path, protonet: Path) -> None:
    bundle, support, ids = Bundle.open(finetune), np.zeros((2, 3, SIDE, SIDE), np.uint8), np.arange(2)
    support[1] = 255
    unasked, asked = (bundle.adapt_arrays(support, ids, ids, steps)["head.weight"] for steps in (None, 3))
    np.testing.assert_array_equal(unasked, asked)
    assert not bundle.adapt_arrays(support, ids, ids, 0)["head.weight"].any()
    with pytest.raises(BundleError, match="takes 0 to 9"):
        bundle.adapt_arrays(support, ids, ids, 10)
    with pytest.raises(BundleError, match="protonet does not adapt in steps"):
        Bundle.open(protonet).adapt_arrays(support, ids, ids, 1)


def test_inner_steps_are_those_of_the_nearest_number_of_shots(finetune: Path) -> None:
    """Of 1 and 3, 2 photos of each class are nearer to 3, by ratio. A manifest from before the table has one number."""
    plain, random = Bundle.open(finetune), np.random.default_rng(3)
    bundle = Bundle(plain.manifest.model_copy(update={"steps_by_shots": {1: 0, 3: 2}}), plain.graphs)
    for shots, steps in ((1, 0), (2, 2), (3, 2)):
        support = random.integers(0, 256, (2 * shots, 3, SIDE, SIDE), np.uint8)
        given = support, np.arange(2).repeat(shots), np.arange(2)
        unasked, asked = (
            each["head.weight"] for each in (bundle.adapt_arrays(*given), plain.adapt_arrays(*given, steps))
        )
        np.testing.assert_array_equal(unasked, asked)
    before = json.loads(plain.manifest.to_bytes())
    assert before.pop("steps_by_shots") == {}
    assert [Manifest.model_validate(before).steps_for(shots) for shots in (1, 5)] == [3, 3]


@pytest.mark.parametrize(
    ("photos", "labels", "reason"),
    [
        ([], [], "no support images"),
        (["red"], [], "1 photos came with 0 labels"),
        (["red"] * 5, list("abcde"), "5 classes came; this bundle adapts to at most 4"),
        (["red"] * 4, list("aaaa"), "4 photos of one class came; this bundle adapts to at most 3"),
        (["red"] * 7, list("aabbccd"), "7 photos came; this bundle adapts to at most 6"),
        (["red", "blue"], ["a", ""], "'' cannot name a class"),
    ],
)
def test_what_cannot_be_adapted_to_is_refused(
    protonet: Path, photos: list[str], labels: list[str], reason: str
) -> None:
    with pytest.raises(BundleError, match=reason):
        Bundle.open(protonet).adapt([photo(colour) for colour in photos], labels)


@pytest.mark.parametrize(
    ("labels", "classes", "reason"),
    [
        ([0, 5], [0, 1], r"labels \[5\] are none of the classes"),
        ([0, 0], [0, 1], "class 1 has no support image"),
        ([0, 1], [0, 1, 1], "listed twice"),
        ([0], [0], "2 images need as many labels"),
        ([0.0, 1.0], [0, 1], "whole numbers"),
    ],
)
def test_labels_are_checked_before_they_reach_a_graph(
    protonet: Path, labels: list[float], classes: list[int], reason: str
) -> None:
    support = np.zeros((2, 3, SIDE, SIDE), np.uint8)
    with pytest.raises(BundleError, match=reason):
        Bundle.open(protonet).adapt_arrays(support, np.array(labels), np.array(classes))


def test_images_that_are_none_are_refused(protonet: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(protonet)
    with pytest.raises(ImageError):
        bundle.images([b"not a photo"])
    with pytest.raises(BundleError, match=r"photo 0 is an array \(3, 8, 8\); this bundle takes \(3, 16, 16\)"):
        bundle.images([np.zeros((3, 8, 8), np.uint8)])
    with pytest.raises(BundleError, match="uint8"):
        bundle.images([np.zeros((3, SIDE, SIDE), np.float32)])
    with pytest.raises(BundleError, match="photo 0 cannot be read"):
        bundle.images([tmp_path / "absent.jpg"])


def test_between_measured_shots_a_calibration_lies_on_a_line_in_their_inverse(protonet: Path) -> None:
    """Temperatures of prototypes on fruit: 44.6 at 1 shot and 16.8 at 5; at 2 it was 26.5, and the line says 27.2."""
    point = OperatingPoint(accepted=0.9, threshold=-40.0)
    one, five, wide = (
        Calibration(ways=ways, shots=shots, by="logit", temperature=warm, threshold=limit, points=(point,))
        for ways, shots, warm, limit in ((5, 1, 44.6, -40), (5, 5, 16.8, -20), (20, 5, 15.6, -21))
    )
    manifest = Manifest.load(protonet).model_copy(update={"calibration": (one, five, wide)})
    for ways, shots, nearest in ((5, 1, one), (1, 0, one), (20, 1, one), (5, 5, five), (9, 50, five), (11, 5, wide)):
        assert manifest.calibration_for(ways, shots) == nearest
    between = manifest.calibration_for(5, 2)
    assert between is not None
    assert between.temperature == pytest.approx(44.6 - 0.625 * 27.8)
    assert (between.threshold, between.accepted, between.points) == (-27.5, None, (point,))
    other = five.model_copy(update={"by": "energy"})
    manifest = manifest.model_copy(update={"calibration": (one, other)})
    assert [manifest.calibration_for(5, shots) for shots in (1.5, 2)] == [one, other]
    assert manifest.model_copy(update={"calibration": ()}).calibration_for(5, 1) is None


def test_evidence_is_what_its_name_says_of_the_outputs() -> None:
    logits = np.array([[2.0, 0.0, 1.0], [-30.0, -31.0, -29.0]], np.float32)
    outputs = {"logits": logits, "ratio": np.array([1.0, 2.0]), "nearest": np.array([0.5, 0.6])}
    np.testing.assert_array_equal(evidence(outputs, "logit", 2.0), [2.0, -29.0])
    np.testing.assert_allclose(evidence(outputs, "probability", 2.0), softmax(logits / 2).max(1), rtol=1e-6)
    np.testing.assert_allclose(evidence(outputs, "energy", 2.0), np.log(np.exp(logits / 2).mean(1)), rtol=1e-6)
    np.testing.assert_array_equal(evidence(outputs, "ratio"), [1.0, 2.0])
    np.testing.assert_array_equal(evidence(outputs, "nearest"), [0.5, 0.6])


def test_a_threshold_may_be_on_an_output_of_the_classifying_graph(copy: Path) -> None:
    by_ratio = Calibration(ways=5, shots=1, by="ratio", threshold=0.0).model_dump()
    respell(copy, lambda content: content.update(calibration=[by_ratio]))
    with pytest.raises(BundleError, match=r"classify.onnx does not give ratio, which a threshold is on"):
        Bundle.open(copy)
    model = onnx.load(copy / "classify.onnx")
    axis = onnx.helper.make_tensor("axis", onnx.TensorProto.INT64, [1], [1])
    model.graph.initializer.append(axis)
    model.graph.node.append(onnx.helper.make_node("ReduceMax", ["logits", "axis"], ["ratio"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("ratio", onnx.TensorProto.FLOAT, ["Q"]))
    put(copy, "classify.onnx", model)
    bundle = Bundle.open(copy)
    state = bundle.adapt([photo("red"), photo("blue")], ["a", "b"])
    answers = bundle.classify(state, [photo("red"), photo("grey")])
    np.testing.assert_array_equal(answers.known, answers.logits.max(1) >= 0)
    assert len(bundle.classify(state, [])) == 0


MIRRORED = """
<ir_version: 9, opset_import: ["": 18]>
mirrored (uint8[N, 3, 16, 16] images) => (uint8[N, 2, 3, 16, 16] views) {
    one = Constant <value_ints = [1]> ()
    from = Constant <value_ints = [15]> ()
    to = Constant <value_ints = [-100]> ()
    back = Constant <value_ints = [-1]> ()
    mirror = Slice (images, from, to, back, back)
    first = Unsqueeze (images, one)
    second = Unsqueeze (mirror, one)
    views = Concat <axis = 1> (first, second)
}
"""


def test_features_of_a_support_photo_are_the_mean_over_its_views_and_a_query_s_its_own(
    protonet: Path, copy: Path
) -> None:
    put(copy, "views.onnx", onnx.parser.parse_model(MIRRORED))
    plain, viewing = Bundle.open(protonet), Bundle.open(copy)
    assert (plain.graphs.makes_views, viewing.graphs.makes_views) == (False, True)
    assert plain.manifest.id != viewing.manifest.id
    images = np.random.default_rng(0).integers(0, 256, (AT_ONCE + 3, 3, SIDE, SIDE), np.uint8)
    np.testing.assert_array_equal(plain.graphs.embed_support(images[:3]), plain.graphs.embed(images[:3]))
    mean = (plain.graphs.embed(images) + plain.graphs.embed(images[..., ::-1])) / 2
    np.testing.assert_allclose(viewing.graphs.embed_support(images), mean, atol=1e-5)
    ids = np.arange(3)
    state = viewing.adapt_arrays(images[:3], ids, ids)
    expected = plain.graphs.adapt(mean[:3], ids, ids)
    np.testing.assert_allclose(state["prototypes"], expected["prototypes"], atol=1e-5)
    np.testing.assert_allclose(viewing.logits(state, images[3:]), plain.logits(state, images[3:]), atol=1e-4)


HALVED = """
<ir_version: 9, opset_import: ["": 18]>
halved (uint8[N, 3, 16, 16] images) => (uint8[N, 1, 3, 16, 8] views) {
    zero = Constant <value_ints = [0]> ()
    eight = Constant <value_ints = [8]> ()
    three = Constant <value_ints = [3]> ()
    one = Constant <value_ints = [1]> ()
    half = Slice (images, zero, eight, three)
    views = Unsqueeze (half, one)
}
"""


def test_views_of_another_size_are_refused_and_so_are_views_where_images_are_taken(copy: Path) -> None:
    put(copy, "views.onnx", onnx.parser.parse_model(HALVED))
    with pytest.raises(BundleError, match=r"views.onnx gives uint8 \(1, 1, 3, 16, 8\) of uint8 \(1, 3, 16, 16\)"):
        Bundle.open(copy).adapt([photo("red")], ["a"])
    respell(copy, lambda content: content.update(takes="images"))
    with pytest.raises(BundleError, match=r"files must be adapt.onnx, classify.onnx, and may be embed.onnx; they are"):
        Bundle.open(copy)


def test_asking_for_a_gpu_that_is_not_there_is_an_error_and_auto_takes_the_cpu(protonet: Path) -> None:
    if Path("/dev/nvidia0").exists() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("for a machine without a GPU, and onnxruntime-gpu")
    for device in ("cuda", "tensorrt"):
        with pytest.raises(BundleError, match=f"{device} was asked for, but this machine has no NVIDIA driver"):
            Bundle.open(protonet, device=device)
    assert Bundle.open(protonet, device="auto").device == "cpu"
    with pytest.raises(BundleError, match="no device 'gpu'"):
        Bundle.open(protonet, device="gpu")


def test_a_manifest_survives_its_file(protonet: Path) -> None:
    manifest = Manifest.load(protonet)
    assert Manifest.model_validate_json(manifest.to_bytes()) == manifest
    assert str(manifest.expected[0]) == "61.00 ± 1.00 % (5-way 1-shot, 600 episodes)"
    assert manifest.calibration[0].auroc is None
    assert Calibration(ways=5, shots=1, auroc=float("nan")).auroc is None


def respell(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(folder: Path, name: str, model: onnx.ModelProto) -> None:
    """A graph in a bundle, with its right hash in the manifest."""
    onnx.save(model, folder / name)
    facts = FileFacts.of((folder / name).read_bytes()).model_dump()
    respell(folder, lambda content: content["files"].update({name: facts}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "adapt.onnx").write_bytes((f / "adapt.onnx").read_bytes()[:-1]), "adapt.onnx is not the file"),
        (lambda f: (f / "classify.onnx").unlink(), "lacks classify.onnx"),
        (lambda f: (f / "bundle.json").unlink(), "lacks bundle.json"),
        (lambda f: (f / "bundle.json").write_text("{"), "bundle.json is not valid"),
        (lambda f: respell(f, lambda c: c.update(schema_version=1)), "has schema 1, and this kshot reads 3"),
        (
            lambda f: respell(f, lambda c: c.update(schema_version=2, limits={"colours": 9})),
            "has schema 2, and this kshot reads 3",
        ),
        (lambda f: respell(f, lambda c: c.update(colour="red")), "colour: Extra inputs are not permitted"),
        (lambda f: respell(f, lambda c: c.pop("state")), "state: Field required"),
        (lambda f: respell(f, lambda c: c.update(transductive=True)), "transductive: Input should be False"),
        (
            lambda f: respell(f, lambda c: c["files"].update({"../x": c["files"]["adapt.onnx"]})),
            r"files must be adapt.onnx, classify.onnx, embed.onnx, and may be views.onnx; they are \.\./x",
        ),
        (lambda f: respell(f, lambda c: c["state"].pop("prototypes")), "not the state that the manifest describes"),
        (lambda f: respell(f, lambda c: c.update(steps=3)), "disagree on whether there are inner steps"),
    ],
)
def test_a_spoilt_bundle_is_refused(copy: Path, spoil: Callable[[Path], object], reason: str) -> None:
    spoil(copy)
    with pytest.raises(BundleError, match=reason):
        Bundle.open(copy)


def test_a_damaged_zip_is_refused(protonet: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in protonet.iterdir():
            archive.write(file, file.name)
        middle = archive.getinfo("adapt.onnx").header_offset + 500
    content = bytearray(path.read_bytes())
    content[middle : middle + 100] = bytes(100)  # no deflate stream any more, which zipfile leaves to zlib to say
    path.write_bytes(content)
    with pytest.raises(BundleError, match="not a readable zip"):
        Bundle.open(path)


def test_no_bundle_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle at"):
        Bundle.open(tmp_path / "nothing")


def test_a_link_in_a_bundle_is_refused(copy: Path) -> None:
    (copy / "adapt.onnx").rename(copy.parent / "elsewhere.onnx")
    os.symlink(copy.parent / "elsewhere.onnx", copy / "adapt.onnx")
    with pytest.raises(BundleError, match=r"adapt\.onnx is a link"):
        Bundle.open(copy)


def test_weights_in_another_file_are_refused(copy: Path) -> None:
    model = onnx.load(copy / "adapt.onnx")
    onnx.save(
        model, copy / "adapt.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )  # and the manifest agrees, so that only the walk through the file can tell
    facts = FileFacts.of((copy / "adapt.onnx").read_bytes())
    respell(copy, lambda content: content["files"].update({"adapt.onnx": facts.model_dump()}))
    with pytest.raises(BundleError, match=r"adapt\.onnx keeps '.+' in another file"):
        Bundle.open(copy)


def test_external_weights_are_found_wherever_onnx_may_keep_tensors() -> None:
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32), "hidden")
    outside = onnx.TensorProto()
    outside.CopyFrom(tensor)
    outside.data_location = onnx.TensorProto.EXTERNAL
    graph = onnx.helper.make_graph([], "g", [], [], [outside])
    constant = onnx.helper.make_node("Constant", [], ["c"], value=outside)
    loop = onnx.helper.make_node("Loop", ["", ""], [], body=graph)
    function = onnx.helper.make_function("d", "f", [], [], [constant], [])
    sparse = onnx.SparseTensorProto(values=outside)
    for place in (
        graph,
        onnx.helper.make_graph([constant], "g", [], []),
        onnx.helper.make_graph([loop], "g", [], []),
        onnx.helper.make_graph([], "g", [], [], sparse_initializer=[sparse]),
    ):
        assert external_tensor(onnx.helper.make_model(place).SerializeToString()) == "hidden"
    empty = onnx.helper.make_graph([], "g", [], [])
    assert external_tensor(onnx.helper.make_model(empty, functions=[function]).SerializeToString()) == "hidden"
    inside = onnx.helper.make_graph([], "g", [], [], [tensor])
    assert external_tensor(onnx.helper.make_model(inside).SerializeToString()) is None
    with pytest.raises(BundleError, match="not an ONNX file"):
        external_tensor(b"\xff\xff\xff")


def test_the_walk_through_a_file_uses_onnx_s_own_field_numbers() -> None:
    kinds = {
        "model": onnx.ModelProto, "training": onnx.TrainingInfoProto, "function": onnx.FunctionProto,
        "graph": onnx.GraphProto, "node": onnx.NodeProto, "attribute": onnx.AttributeProto,
        "sparse": onnx.SparseTensorProto, "tensor": onnx.TensorProto,
    }  # fmt: skip
    names = {kind.DESCRIPTOR.full_name: name for name, kind in kinds.items()}
    for name, fields in onnx_file.FIELDS.items():
        nested = {
            f.number: names.get(f.message_type.full_name) for f in kinds[name].DESCRIPTOR.fields if f.message_type
        }
        assert fields == {number: kind for number, kind in nested.items() if kind is not None}


def test_inputs_become_constants(finetune: Path) -> None:
    before = onnx.load(finetune / "classify.onnx")
    values = {"head.bias": np.arange(3, dtype=np.float32), "big": np.arange(70_000).reshape(7, 10_000)}
    before.graph.input.append(onnx.helper.make_tensor_value_info("big", onnx.TensorProto.INT64, [7, 10_000]))
    after = onnx.load_from_string(onnx_file.with_constants(before.SerializeToString(), values))
    onnx.checker.check_model(after, full_check=True)
    made = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    for name, value in values.items():
        np.testing.assert_array_equal(made[name], value, strict=True)
    assert {each.name for each in before.graph.input} - {each.name for each in after.graph.input} == set(values)
    assert after.graph.node == before.graph.node
    assert after.opset_import == before.opset_import


def packed(path: Path, folder: Path, **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
        for name, content in extra.items():
            archive.writestr(name, content)
    return path


def test_a_zip_with_paths_out_of_it_or_links_or_lacks_is_refused(protonet: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="points outside"):
        Bundle.open(packed(tmp_path / "a.zip", protonet, **{"../evil": b""}))
    linked = packed(tmp_path / "b.zip", protonet)
    with zipfile.ZipFile(linked, "a") as archive:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(BundleError, match="'link' is a link"):
        Bundle.open(linked)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.write(protonet / "adapt.onnx", "adapt.onnx")
    with pytest.raises(BundleError, match=r"must hold bundle\.json once"):
        Bundle.open(tmp_path / "c.zip")
    (tmp_path / "d.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(BundleError, match="not a readable zip"):
        Bundle.open(tmp_path / "d.zip")


def test_a_zip_whose_sizes_are_not_the_manifest_s_is_refused_before_it_is_inflated(
    protonet: Path, tmp_path: Path
) -> None:
    """A zip of 1.5 MB inflated to 2,971 MB before the sizes in its manifest were looked at."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in protonet.iterdir():
            archive.writestr(file.name, bytes(50_000_000) if file.name == "adapt.onnx" else file.read_bytes())
    tracemalloc.start()
    with pytest.raises(BundleError, match=r"adapt\.onnx is not the file .* it has 50,000,000 bytes, not"):
        Bundle.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
