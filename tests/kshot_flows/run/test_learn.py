"""`kshot learn`: a folder of photos in, a registered model out; each photo is embedded once, and few photos will do."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kshot_flows import recipes
from kshot_flows.cli import main
from kshot_flows.run import learn, start
from kshot_flows.store.products import Scores, Trained
from kshot_plugins.efficientnet_lite import EfficientNetLite0
from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError

SMALL = ["backbone.size=64", "training.validation_episodes=24", "evaluation.episodes=30"]


def write_photos(folder: Path, classes: int, photos: int) -> Path:
    """Photos of coloured stripes: a class is an angle and a colour, with noise and a shift."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64]
    for klass in range(classes):
        (folder / f"kind {klass}").mkdir(parents=True)
        angle, colour = random.uniform(0, np.pi), random.uniform(60, 255, 3)
        for number in range(photos):
            wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) / 3 + random.uniform(0, 6))
            pixels = (0.5 + 0.5 * wave)[..., None] * colour + random.normal(0, 25, (64, 64, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"kind {klass}" / f"{number}.png")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("KSHOT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images passed the backbone in each pass."""
    passes: list[int] = []
    pooled = EfficientNetLite0.pooled

    def counting(self, images, stages):
        if images.device.type != "meta" and type(images).__name__ == "Tensor":  # not while tracing
            passes.append(len(images))
        return pooled(self, images, stages)

    monkeypatch.setattr(EfficientNetLite0, "pooled", counting)
    return passes


@pytest.mark.timeout(900)
def test_each_photo_is_embedded_once_also_for_a_later_run_with_another_head(home, prefect_api, embedded) -> None:
    photos = learn.bring_in(str(write_photos(home / "stripes", 12, 8)), None, None, 64)
    assert (photos.classes, photos.tested, photos.photos, photos.fewest) == (12, 3, 96, 8)
    settings = [*learn.changes(photos, ["plda", "cosine"], None, False), *SMALL]
    embedded.clear()
    done = start.run(learn.RECIPE, settings)
    compared = 2 * 12  # with the exported graph, in float32 and float64
    assert sum(embedded) == 96 + compared
    trained = next(step.product for step in done if isinstance(step.product, Trained))
    assert trained.chosen.startswith("plda")
    assert {one.label.split()[0] for one in trained.tried} == {"plda", "cosine"}
    scores = next(step.product for step in done if isinstance(step.product, Scores))
    assert scores.split == "test"
    assert scores.lines[0].accuracy > 0.6

    embedded.clear()
    start.run(learn.RECIPE, [*learn.changes(photos, ["whitened"], None, False), *SMALL])
    assert sum(embedded) == compared
    reused = {step.step for step in start.run(learn.RECIPE, settings) if step.reused}
    assert reused >= {"version_data", "meta_train", "evaluate", "export"}


@pytest.mark.timeout(900)
def test_three_classes_of_three_photos_are_enough_for_figures_that_say_what_they_are(home, prefect_api) -> None:
    photos = learn.bring_in(str(write_photos(home / "few", 3, 3)), "few", None, 64)
    settings = [*learn.changes(photos, ["plda", "cosine"], None, False), *SMALL]
    done = start.run(learn.RECIPE, settings)
    scores = next(step.product for step in done if isinstance(step.product, Scores))
    assert {line.protocol for line in scores.lines} == {"random photos, cross-validated"}
    assert "3 classes none is set aside" in learn.advice(photos)[0]
    bundle = Bundle.open(next(step.product for step in done if step.step == "export").folder)
    state = bundle.adapt([home / "few" / "kind 0" / "0.png", home / "few" / "kind 1" / "0.png"], ["zero", "one"])
    assert bundle.classify(state, [home / "few" / "kind 0" / "1.png"]).names == ["zero"]


def test_photos_are_imported_again_only_when_they_changed(home) -> None:
    folder = write_photos(home / "stripes", 9, 4)
    before = learn.bring_in(str(folder), None, None, 32)
    index = home / "data" / "stripes" / "index.json"
    stamp = index.stat().st_mtime_ns
    assert learn.bring_in(str(folder), None, None, 32) == before
    assert index.stat().st_mtime_ns == stamp
    (folder / "kind 0" / "3.png").unlink()
    assert learn.bring_in(str(folder), None, None, 32).photos == before.photos - 1


def test_a_data_set_that_was_imported_otherwise_is_not_replaced(home) -> None:
    folder = write_photos(home / "pictures" / "stripes", 9, 4)
    learn.bring_in(str(folder), None, None, 32)
    (home / ".kshot" / "sources" / "stripes.json").unlink()
    with pytest.raises(KshotError, match="Give this one another name"):
        learn.bring_in(str(folder), None, None, 32)
    assert learn.bring_in("stripes", None, None, 32).classes == 9


def test_too_few_classes_get_one_sentence_that_says_what_would_do(home) -> None:
    result = CliRunner().invoke(main.app, ["learn", str(write_photos(home / "two", 2, 5))])
    assert isinstance(result.exception, KshotError)
    assert "two has 2 classes, the smallest with 5 photos" in str(result.exception)
    assert "takes 3 classes of 2 photos at least" in str(result.exception)


def test_the_recipe_that_is_written_out_is_the_one_that_would_run(home) -> None:
    folder, file = write_photos(home / "stripes", 9, 7), home / "mine.toml"
    asked = ["learn", str(folder), "--recipe", str(file), "--size", "32"]
    result = CliRunner().invoke(main.app, [*asked, "--heads", "plda"])
    assert result.exit_code == 0, result.output
    written = recipes.load(str(file))
    photos = learn.Photos("stripes", 9, 3, 63, 7)
    assert written == recipes.load(learn.RECIPE, learn.changes(photos, ["plda"], None, False))
    again = CliRunner().invoke(main.app, asked)
    assert "is there already" in str(again.exception)
