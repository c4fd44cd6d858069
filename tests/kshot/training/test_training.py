"""The outer loop: it can be killed at any point and ends with the same bits, and it chooses on validation only."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from kshot.backbones import BackboneConfig
from kshot.data.episodes import sample_episodes
from kshot.testing import Pixels, Subject, toy_images
from kshot.training import (
    CHECKPOINTS,
    Training,
    checkpoint,
    learner_step,
    learning_rate,
    meta_train,
    save_atomically,
)
from kshot_plugins.protonet import ProtoNet
from kshot_runtime.errors import KshotError

SETTINGS = {
    "ways": 3, "shots": 1, "queries": 2, "episodes_per_step": 2, "steps": 24, "lr": 1e-2,
    "validate_every": 4, "validation_episodes": 5, "validation_queries": 2,
}  # fmt: skip

TRAIN = """
import sys, time, torch
from pathlib import Path
from kshot.testing import Pixels, Subject, toy_images
from kshot.training import Training, meta_train
torch.set_num_threads(1)
folder = Path(sys.argv[1])
learner = Subject("maml", folder).build()
settings = Training(**{settings})
for progress in meta_train(learner, toy_images(), toy_images(seed=1), settings, folder=folder, seed=3):
    print(progress.step, flush=True)
    time.sleep(float(sys.argv[2]))
torch.save(learner.state_dict(), folder / "final.pt")
""".replace("{settings}", repr(SETTINGS))


def train(folder, name="maml", **changes):
    learner = Subject(name, folder).build()
    settings = Training(**{**SETTINGS, **changes})
    return learner, list(meta_train(learner, toy_images(), toy_images(seed=1), settings, folder=folder, seed=3))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Scaled(Pixels):
    """Pixels times one weight, to have something to train."""

    def __init__(self, image):
        super().__init__(image, BackboneConfig(norm="group"))  # it has none
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * super().forward(images)


def test_unlabelled_images_come_with_every_batch_and_others_at_every_step(tmp_path):
    seen = []

    class Seeing(ProtoNet):
        def meta_loss(self, episodes):
            seen.append(episodes.unlabelled)
            return super().meta_loss(episodes)

    def run(folder, **more):
        seen.clear()
        learner = Seeing(Scaled((1, 16, 16)), ProtoNet.Config())
        settings = Training(**{**SETTINGS, "steps": 4}, unlabelled_images=7, **more)
        pool = toy_images(seed=2)
        list(meta_train(learner, toy_images(), toy_images(seed=1), settings, folder=folder, seed=3, unlabelled=pool))
        return list(seen)

    first = run(tmp_path / "a")
    assert [tuple(images.shape) for images in first] == [(7, 1, 16, 16)] * 4
    assert (float(first[0].min()) >= 0, float(first[0].max()) <= 1) == (True, True)
    assert not torch.equal(first[0], first[1])
    again = run(tmp_path / "b", episodes_at_once=1)  # two parts of each batch, which share its unlabelled images
    assert len(again) == 8
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[2], first[1])


def test_a_learner_without_a_weight_to_train_is_told_to_be_taken_as_it_is(tmp_path):
    learner = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config())
    with pytest.raises(KshotError, match=r"nothing to train .* training.steps = 0"):
        list(meta_train(learner, toy_images(), toy_images(), Training(**SETTINGS), folder=tmp_path, seed=3))


def test_a_run_killed_at_several_points_ends_with_the_bits_of_one_that_was_not(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    subprocess.run([sys.executable, "-c", TRAIN, whole, "0"], check=True, capture_output=True)
    killed = 0
    for last_seen in (2, 7, 12, 19):  # before the first checkpoint, and between later ones
        process = subprocess.Popen([sys.executable, "-c", TRAIN, broken, "0.05"], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if int(line) >= last_seen:
                break
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert killed == 4
    subprocess.run([sys.executable, "-c", TRAIN, broken, "0"], check=True, capture_output=True)
    first, second = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, broken))
    assert equal(first, second)


def test_a_finished_run_called_again_does_no_step_and_gives_the_same_weights(tmp_path):
    learner, steps = train(tmp_path)
    again, none = train(tmp_path)
    assert (len(steps), none) == (24, [])
    assert equal(learner.state_dict(), again.state_dict())


def test_the_best_validated_weights_are_kept_and_not_the_last(tmp_path):
    """Trap 41: choose on validation episodes. A rate that ruins the learner later must not matter."""
    _, steps = train(tmp_path, name="protonet", lr=0.5, schedule="constant", steps=40)
    validated = [p for p in steps if p.validation is not None]
    assert steps[-1].best == max(p.validation for p in validated)
    held = torch.load(tmp_path / "last.pt", weights_only=True)
    learner, _ = train(tmp_path, name="protonet", lr=0.5, schedule="constant", steps=40)
    assert equal(learner.state_dict(), held["best_weights"])


def test_patience_stops_a_run_that_no_longer_gets_better(tmp_path):
    _, steps = train(tmp_path, name="protonet", lr=1e-9, steps=400, validate_every=1, patience=3)
    assert len(steps) < 400


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(KshotError, match=r"of another run: its settings.steps was 4, and is now 8\. Give"):
        train(tmp_path, steps=8)


def test_a_checkpoint_that_cannot_be_read_is_set_aside_and_the_one_before_it_leads_to_the_same_bits(tmp_path):
    def cut_off(file):
        file.write_bytes(file.read_bytes()[:5000])

    def empty(file):
        file.write_bytes(b"")

    def flip_a_bit(file):  # of a weight: torch itself would take it
        content = bytearray(file.read_bytes())
        content[content.index(next(iter(whole.state_dict().values())).numpy().tobytes())] ^= 1
        file.write_bytes(content)

    def replace_by_another_file(file):
        torch.save({"weights": 1}, file)

    whole, _ = train(tmp_path / "whole", steps=12)
    for harm in (cut_off, empty, flip_a_bit, replace_by_another_file):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / harm.__name__))
        harm(folder / "last.pt")
        with pytest.warns(match=r"last\.pt cannot be read, and was renamed to last.pt.damaged"):
            learner, steps = train(folder, steps=12)
        assert [progress.step for progress in steps] == [9, 10, 11, 12]
        assert equal(learner.state_dict(), whole.state_dict())
        assert (folder / "last.pt.damaged").exists()
    (tmp_path / "whole" / "last.pt").unlink()  # killed between the two renames
    assert [progress.step for progress in train(tmp_path / "whole", steps=12)[1]] == [9, 10, 11, 12]
    for name in CHECKPOINTS:
        empty(folder / name)
    assert checkpoint(folder) == ({}, [folder / name for name in CHECKPOINTS])
    assert len(train(folder, steps=12)[1]) == 12


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_what_to_do(tmp_path):
    with pytest.raises(KshotError, match=r"Lower training.lr"):
        train(tmp_path, lr=1e18, schedule="constant", steps=40)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    save_atomically({"x": 1}, tmp_path / "a.pt")
    with pytest.raises(Exception, match=r"pickle|pickling"):
        save_atomically({"x": lambda: 1}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_batch_taken_a_few_episodes_at_a_time_gives_the_same_step(tmp_path):
    """Pain 4: memory does not grow with the meta-batch."""
    weights = []
    for at_once in (None, 1, 3):
        learner = Subject("maml", tmp_path).build().train()
        settings = Training(**{**SETTINGS, "episodes_per_step": 5}, episodes_at_once=at_once)
        batch = sample_episodes(toy_images(), settings.shapes[0], 5, seed=0, step=0)
        learner_step(learner, batch, torch.optim.SGD(learner.parameters(), 0.1), settings)
        weights.append(learner.state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_outer_steps_take_several_shots_in_turns_and_the_first_validates(tmp_path, monkeypatch):
    taken = []

    def sample(images, shape, *rest, step, **more):
        taken.append((step, shape.shots))
        return sample_episodes(images, shape, *rest, step=step, **more)

    monkeypatch.setattr("kshot.training.loop.sample_episodes", sample)
    train(tmp_path, shots=(1, 3), steps=5, validate_every=5)
    assert taken == [(0, 1), (1, 3), (2, 1), (3, 3), (4, 1)]
    settings = Training(shots=(1, 3))
    assert settings.validation_shape.shots == 1
    assert settings.model_copy(update={"validation_shots": 3}).validation_shape.shots == 3


@pytest.mark.parametrize("shots", [0, [], [1, 0]])
def test_shots_that_no_episode_has_are_refused(shots):
    with pytest.raises(ValueError, match=r"a number from 1, or a list of them such as \[1, 5\]"):
        Training(shots=shots)


def test_every_one_of_several_shots_must_fit_the_images(tmp_path):
    with pytest.raises(KshotError, match="100 shots"):
        train(tmp_path, shots=(1, 100))


SCHEDULES = {"constant": [1, 1, 1], "cosine": [1, 0.5, 0], "linear": [1, 0.5, 0], "halve": [1, 0.25, 0.0625]}


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES.items())
def test_learning_rate_schedules(schedule, expected):
    settings = Training(steps=100, lr=1.0, schedule=schedule, halve_every=25)
    assert [learning_rate(settings, step) for step in (0, 50, 100)] == pytest.approx(expected)


def test_training_reports_its_time_memory_and_position(tmp_path):
    started = time.perf_counter()
    _, steps = train(tmp_path, steps=5)
    assert [p.step for p in steps] == [1, 2, 3, 4, 5]
    assert 0 < steps[-1].seconds < time.perf_counter() - started
    assert 50e6 < steps[0].memory <= steps[-1].memory < psutil.virtual_memory().total


def test_losses_that_are_read_some_steps_late_are_those_that_are_read_at_once(tmp_path, monkeypatch):
    """As on a GPU, where reading one is waiting."""
    whole, now = train(tmp_path / "now", steps=7)
    monkeypatch.setattr("kshot.training.loop._steps_ahead", lambda device: 3)
    learner, late = train(tmp_path / "late", steps=7)
    assert [(p.step, p.loss, p.lr, p.validation, p.best) for p in late] == [
        (p.step, p.loss, p.lr, p.validation, p.best) for p in now
    ]
    assert equal(learner.state_dict(), whole.state_dict())
    with pytest.raises(KshotError, match=r"became (nan|inf) at outer step [1-4]\. Lower"):
        train(tmp_path / "lost", lr=1e18, schedule="constant")


def test_a_training_in_bfloat16_convolves_in_it_and_validates_in_float32(tmp_path, monkeypatch):
    seen, convolve = {}, torch.nn.Conv2d._conv_forward

    def watched(layer, *arguments):
        made = convolve(layer, *arguments)
        seen[layer.training] = made.dtype
        return made

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", watched)
    for name, steps in (("protonet", 40), ("maml", 4)):
        learner, reports = train(tmp_path / name, name=name, precision="bfloat16", steps=steps)
        assert seen == {True: torch.bfloat16, False: torch.float32}
        assert {value.dtype for value in learner.parameters()} == {torch.float32}
        assert name == "maml" or reports[-1].loss < 0.7 * reports[0].loss
