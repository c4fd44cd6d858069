"""On a GPU: training takes the steps that a CPU takes, one by one and as a CUDA graph, and goes on after a stop."""

import pytest
import torch

from kshot.testing import Subject, toy_images
from kshot.training import Training, meta_train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

SETTINGS = {
    "ways": 3, "shots": (1, 2), "queries": 2, "episodes_per_step": 2, "steps": 16, "lr": 1e-3, "validate_every": 8,
    "validation_episodes": 5, "validation_queries": 2, "augment": {"shift": 0.1},
}  # fmt: skip


def losses(folder, name: str, device: str, **settings) -> list[float]:
    learner = Subject(name, folder, norm="group").build()
    training = Training(**SETTINGS, **settings)
    taken = meta_train(learner, toy_images(), toy_images(seed=1), training, folder=folder, seed=3, device=device)
    return [progress.loss for progress in taken]


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_gpu_takes_the_steps_of_a_cpu_by_itself_and_as_a_graph(name, tmp_path):
    expected = losses(tmp_path / "cpu", name, "cpu")
    for graph in (False, True):
        found = losses(tmp_path / str(graph), name, "cuda", cuda_graph=graph)
        assert found == pytest.approx(expected, rel=1e-2)
    folder = tmp_path / "True"
    (folder / "last.pt").unlink()  # the one of step 8 is left
    assert losses(folder, name, "cuda", cuda_graph=True) == pytest.approx(expected[8:], rel=1e-2)
