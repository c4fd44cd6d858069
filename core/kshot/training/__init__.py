"""The outer loop: meta-train a learner on episodes, select the model on validation episodes, resume after a crash."""

from kshot.training.checkpoint import CHECKPOINTS, checkpoint, foreign, save_atomically, set_aside
from kshot.training.distributed import launched
from kshot.training.loop import Progress, meta_train
from kshot.training.settings import Training
from kshot.training.step import learner_step, learning_rate

__all__ = [
    "CHECKPOINTS",
    "Progress",
    "Training",
    "checkpoint",
    "foreign",
    "launched",
    "learner_step",
    "learning_rate",
    "meta_train",
    "save_atomically",
    "set_aside",
]
