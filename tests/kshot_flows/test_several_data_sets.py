"""Recipes that name several data sets, or that train on none: what is taken, what is recorded, what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kshot import plugins
from kshot.data.importing import finish, import_dataset
from kshot_flows import project, recipes, registry
from kshot_flows.registry.gate import GateReport
from kshot_flows.store import keys, learners
from kshot_flows.store.products import Promotion, Registered
from kshot_flows.tasks.data import version_data
from kshot_flows.tasks.evaluate import evaluate
from kshot_flows.tasks.export import export
from kshot_flows.tasks.promote import promote
from kshot_flows.tasks.register import register
from kshot_flows.tasks.train import meta_train
from kshot_flows.tracking import stores
from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError

SHORT = ["training.steps=4", "training.validate_every=4", "training.validation_episodes=5", "evaluation.episodes=40"]


def add(root: Path, name: str, splits: dict[str, int], size: int = 16, seed: int = 1) -> None:
    """Import a data set of 16 x 16 stripes: so many classes in each split, 8 images of each."""
    random, pictures = np.random.default_rng(seed), root.parent / f"{name}-pictures"
    for split, classes in splits.items():
        for number in range(classes):
            stripes = np.kron(random.integers(0, 256, (1, 8)), np.ones((16, 2)))  # (16, 16)
            folder = pictures / split / f"{split}-{number}"
            folder.mkdir(parents=True)
            for image in range(8):
                noisy = np.clip(stripes + random.normal(0, 30, (16, 16)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"{image}.png")
    finish(import_dataset(str(pictures), name, root, rule={"size": size, "channels": 1}))


@pytest.fixture
def home(new_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the data sets `patterns` and `stripes`."""
    home = new_project(tmp_path / "project")
    monkeypatch.setenv("KSHOT_HOME", str(home))
    for name in ("KSHOT_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    add(home / "data", "stripes", {"train": 4, "val": 3, "test": 5})
    return home


def run(home: Path, *changes: str) -> Registered:
    """The steps of the pipeline up to the registry."""
    recipe = recipes.load(str(home / "tiny.toml"), [*SHORT, *changes])
    data = version_data.fn(recipe)
    trained = meta_train.fn(recipe, data)
    scores = evaluate.fn(recipe, data, trained)
    return register.fn(recipe, data, scores, export.fn(recipe, trained, scores))


def test_what_was_learned_from_and_tested_on_is_recorded_and_a_champion_is_tested_on_the_same(home: Path) -> None:
    champion = run(home)
    assert promote.fn(recipes.load(str(home / "tiny.toml"), ["gate.margin=1.0"]), champion).stage == "Production"
    changes = [
        "dataset.train=train+stripes:train", "dataset.test=stripes:test", "dataset.unlabelled=stripes:val",
        "training.unlabelled_images=5", "gate.margin=1.0", "gate.ece_margin=1.0", "gate.auroc_margin=1.0",
    ]  # fmt: skip
    version = run(home, *changes)
    patterns, stripes = version.data.all
    assert (patterns.name, stripes.name) == ("patterns", "stripes")

    learner = project.home() / "runs" / "tiny" / version.evidence.file.parent.name / "learner.pt"
    about, _ = learners.read(learner)
    assert about["base_classes"] == [10, 4]
    assert about["data"] == {"patterns": patterns.version, "stripes": stripes.version}

    evidence = json.loads(version.evidence.file.read_text())
    assert (evidence["episodes"]["data"], evidence["episodes"]["split"]) == (stripes.version, "test")

    inputs = stores.client().get_run(version.run).inputs.dataset_inputs
    assert {i.dataset.name: i.dataset.digest for i in inputs} == {p.name: p.version[:36] for p in version.data.all}
    assert registry.trace("tiny", version.version).facts["other data (sha256)"] == f"stripes {stripes.version}"
    [bundle] = learner.parent.glob("bundle-*/bundle.json")
    assert Bundle.open(bundle.parent).manifest.source.dataset == "patterns+stripes"

    [source] = (one.source for one in registry.versions("tiny") if one.version == champion.version)
    damaged = Path(source.removeprefix("file://")) / "adapt.onnx"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"")
    promotion = promote.fn(recipes.load(str(home / "tiny.toml"), changes), version)
    assert (promotion.stage, promotion.intact()) == ("Staging", False)  # to be tried again, not kept
    assert "adapt.onnx changed" in promotion.why
    damaged.write_bytes(whole)
    promotion = promote.fn(recipes.load(str(home / "tiny.toml"), changes), version)
    assert promotion.intact()
    report = registry.gate_report("tiny", version.version)
    assert report is not None
    assert (promotion.stage, report.champion, report.episodes) == ("Production", champion.version, 40)


def test_a_data_set_that_is_only_tested_on_does_not_change_what_is_learned(home: Path) -> None:
    def made(*changes: str) -> tuple[str, str]:
        recipe = recipes.load(str(home / "tiny.toml"), [*SHORT, *changes])
        data = version_data.fn(recipe)
        trained = meta_train.fn(recipe, data)
        return keys.meta_train(recipe, data), keys.evaluate(recipe, data, trained)

    learned, played = made()
    learned_again, played_elsewhere = made("dataset.test=stripes:test")
    assert learned == learned_again
    assert played != played_elsewhere
    assert made("dataset.train=train+stripes:train")[0] != learned


def test_what_a_learner_takes_from_kshot_is_in_the_key_of_its_training() -> None:
    def modules(learner: str) -> set[str]:
        module = sys.modules[plugins.find().learner(learner).value.__module__]
        return {own.__name__ for own in keys._own_modules(module)}

    assert {"kshot.recurrence", "kshot_plugins.matching"} <= modules("matching")
    assert "kshot_plugins.protonet" in modules("protonet")
    assert not [name for name in modules("protonet") if name.startswith("kshot.")]  # what it takes is there anyway


def test_a_bundle_with_another_name_and_a_score_by_other_rules_have_keys_of_their_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, other = (recipes.load(str(home / "tiny.toml"), [*SHORT, *name]) for name in ([], ["name=other"]))
    data = version_data.fn(recipe)
    trained = meta_train.fn(recipe, data)
    scores = evaluate.fn(recipe, data, trained)
    assert keys.meta_train(other, data) == keys.meta_train(recipe, data)
    assert keys.export(other, trained, scores) != keys.export(recipe, trained, scores)  # bundle.json holds the name
    before = keys.evaluate(recipe, data, trained)
    monkeypatch.setattr(keys, "CALIBRATION_EPISODES", 100)
    assert keys.evaluate(recipe, data, trained) != before


def test_rotations_are_of_the_recipes_own_data_set_only(home: Path) -> None:
    recipe = recipes.load(str(home / "tiny.toml"), ["dataset.rotations=true", "dataset.train=train+stripes:train"])
    data = version_data.fn(recipe)
    assert data.classes(recipe.dataset.train).classes_per_data_set == (40, 4)
    assert data.split_of("test") == ("test", True)
    assert data.split_of("stripes:test") == ("test", False)
    assert data.identity_of("stripes:test") == data.others[0].version
    assert data.identity_of("test+stripes:test") not in (packed.version for packed in data.all)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "evaluation.ways=[3, 7]",
            r"\[evaluation\] asks for 7-way .* of 'test': 7 ways .* Set evaluation.ways=\[6\], or",
        ),
        ("evaluation.queries=8", r"\[evaluation\] .* 1 shots \+ 8 queries need 9 .* Set evaluation.queries=7, or"),
        ("training.ways=50", r"\[training\] asks for 50-way .* of 'train': .* Set training.ways=10, or"),
        ("training.queries=8", r"Set training.queries=7, or"),
        ("training.validation_ways=7", r"\[training\] .* of 'val': .* Set training.validation_ways=6, or"),
        ("training.validation_queries=8", r"Set training.validation_queries=7, or"),
    ],
)
def test_test_episodes_that_cannot_be_drawn_are_told_before_anything_is_trained(
    home: Path, change: str, said: str
) -> None:
    with pytest.raises(KshotError, match=said):
        run(home, change)
    assert not (home / "runs").exists()


def test_data_recorded_by_nobody_are_recorded_once_there_is_a_repository(home: Path) -> None:
    data = version_data.fn(recipes.load(str(home / "tiny.toml")))
    assert data.md5 is None
    assert data.intact()
    (home / ".dvc").mkdir()  # as `dvc init` does
    assert not data.intact()


def test_data_sets_of_two_sizes_are_refused_with_what_to_do(home: Path) -> None:
    add(home / "data", "large", {"test": 5}, size=20)
    recipe = recipes.load(str(home / "tiny.toml"), ["dataset.test=large:test"])
    with pytest.raises(
        KshotError, match=r"'large' holds images \(1, 20, 20\) and 'patterns' \(1, 16, 16\).*large --size 16"
    ):
        version_data.fn(recipe)


def test_an_image_that_is_tested_on_is_not_shown_without_its_label_either(home: Path) -> None:
    add(home / "data", "copy", {"test": 5}, seed=2)
    add(home / "data", "pool", {"train": 5}, seed=2)  # the same pictures under another name
    recipe = recipes.load(str(home / "tiny.toml"), ["dataset.test=copy:test", "dataset.unlabelled=pool:train"])
    with pytest.raises(
        KshotError,
        match=r"40 of the 40 images of copy:test in dataset.test are in pool:train of dataset.unlabelled too",
    ):
        version_data.fn(recipe)


def test_an_image_that_is_trained_or_validated_on_under_another_name_is_not_tested_on(home: Path) -> None:
    add(home / "data", "a", {"train": 4, "val": 3, "test": 4}, seed=2)
    for name, seed in (("mixed", 1), ("other", 3)):  # one folder, split twice by chance
        shutil.copytree(home / "a-pictures", home / f"{name}-pictures")
        for number, folder in enumerate(sorted((home / f"{name}-pictures").glob("*/*"))):
            folder.rename(home / f"{name}-pictures" / f"class{number}")
        for split in ("train", "val", "test"):
            (home / f"{name}-pictures" / split).rmdir()
        pictures, rule = str(home / f"{name}-pictures"), {"size": 16, "channels": 1}
        finish(import_dataset(pictures, name, home / "data", rule=rule, seed=seed, split="0.4/0.3/0.3"))
    tiny, validation, test = str(home / "tiny.toml"), "dataset.validation=stripes:val", "dataset.test=other:test"
    for steps_of_training in ("training.steps=4", "training.steps=0"):  # without training, statistics may be learned
        with pytest.raises(
            KshotError,
            match=r"of the .* images of other:test in .* are in mixed:train of dataset.train too, such as class",
        ):
            version_data.fn(recipes.load(tiny, ["dataset.train=mixed:train", validation, test, steps_of_training]))
    with pytest.raises(KshotError, match=r"are in mixed:train of dataset.validation too"):
        version_data.fn(recipes.load(tiny, ["dataset.validation=mixed:train", test]))


def test_a_data_set_that_is_named_and_not_there_is_missed_by_its_name(home: Path) -> None:
    recipe = recipes.load(str(home / "tiny.toml"), ["dataset.test=strips:test"])
    with pytest.raises(KshotError, match="data set 'strips' is not in"):
        version_data.fn(recipe)


def test_a_folder_of_new_classes_only_is_served_without_any_training(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(home / "data")
    add(home / "data", "photos", {"test": 5})
    version = run(home, "dataset.name=photos", "training.steps=0")
    shown = " ".join(capsys.readouterr().out.split())
    assert "photos has no classes to train or validate on: taken as it is, without a validation" in shown
    [bundle] = home.glob("runs/tiny/*/bundle-*/bundle.json")
    opened = Bundle.open(bundle.parent)
    assert opened.manifest.calibration == ()
    photos = version.data.open().split("test").gather(np.arange(3)[:, None], np.arange(2))  # (3, 2, C, H, W)
    state = opened.adapt(list(photos[:, 0]), ["a", "b", "c"])
    assert opened.classify(state, list(photos[:, 1])).probabilities.shape == (3, 3)
    promotion = promote.fn(recipes.load(str(home / "tiny.toml"), SHORT), version)
    assert promotion.stage == "Production"


def test_cross_validated_versions_are_compared_on_the_same_folds_only(home: Path) -> None:
    def promoted(*changes: str) -> tuple[Promotion, GateReport]:
        splits = ("dataset.name=stripes", "dataset.train=test", "dataset.validation=val", "dataset.test=test")
        version = run(home, "training.steps=0", "gate.margin=1.0", *splits, *changes)
        found = promote.fn(recipes.load(str(home / "tiny.toml"), ["gate.margin=1.0", "gate.ece_margin=1.0"]), version)
        report = registry.gate_report("tiny", version.version)
        assert report is not None
        return found, report

    first, _ = promoted("name=tiny")
    assert (first.stage, first.why) == ("Production", "passed the gate, the first version")
    _, report = promoted("backbone.width=4")
    assert (report.champion, report.difference is None) == (1, False)
    champion = registry.champion("tiny")
    other, report = promoted("seed=7")
    assert (report.champion, report.difference) == (champion, None)
    assert (other.stage, other.why) == ("Production", f"passed the gate, not compared with version {champion}")
    assert other.warnings[0].startswith(f"was not compared with version {champion}, which may have learned from")


def test_with_validation_classes_an_untrained_learner_is_validated_and_calibrated(home: Path) -> None:
    sizes = ["evaluation.ways=[2, 3]", "evaluation.shots=[1, 2]"]
    recipe = recipes.load(str(home / "tiny.toml"), [*SHORT, "training.steps=0", *sizes])
    data = version_data.fn(recipe)
    trained = meta_train.fn(recipe, data)
    assert (trained.steps, trained.best_step) == (0, 0)
    assert trained.validation is not None
    scores = evaluate.fn(recipe, data, trained)
    fits = Bundle.open(export.fn(recipe, trained, scores).folder).manifest.calibration
    assert sorted((fit.ways, fit.shots) for fit in fits) == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert None not in [fit.threshold for fit in fits]


def test_a_training_needs_validation_classes(home: Path) -> None:
    add(home / "data", "photos", {"train": 5, "test": 5})
    recipe = recipes.load(str(home / "tiny.toml"), [*SHORT, "dataset.name=photos"])
    data = version_data.fn(recipe)
    with pytest.raises(KshotError, match="no split named 'val'"):
        meta_train.fn(recipe, data)
