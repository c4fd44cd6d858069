"""Fine-tuning: class training of the backbone, then logistic regression on frozen features in every episode.

As in RFS, without its distillation: Tian et al., 2020. https://arxiv.org/abs/2003.11539
The "Baseline" of Chen et al., 2019, is similar, without normalised features. https://arxiv.org/abs/1904.04232
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kshot import Episodes, FeatureLoop, Learner, LearnerConfig, State, hookimpl, one_hot, unit
from kshot_plugins.class_training import BaseHead


class FineTune(FeatureLoop):
    """Meta-training is classification of the base classes; adapting fits logistic regression to L2-normalised features.

    The head starts at zero and its loss, cross-entropy with weight decay, is convex, so adapting is deterministic.
    Differs from RFS: a fixed number of gradient steps fits the head, and not L-BFGS.

    Good as a baseline, for many shots, and on a pretrained backbone. With one shot and a small backbone, learners that
    train on episodes are better.
    """

    name = "finetune"
    coupled = Learner.norms  # by class training on all images of a batch

    class Config(LearnerConfig):
        steps: int = Field(100, ge=1, description="gradient steps for the head")
        rate: float = Field(0.03, gt=0, description="learning rate of the head; below 4 / scale² it cannot diverge")
        weight_decay: float = Field(1e-3, ge=0, description="L2 penalty on the head's weights")
        scale: float = Field(10.0, gt=0, description="length that features are scaled to before the head")

    config: Config

    @property
    def steps(self) -> int:
        return self.config.steps

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Cross-entropy over all base classes, averaged over the support and query images of the episodes."""
        images, labels = episodes.pooled()
        return F.cross_entropy(self.base(self.embed(images)), labels)

    def start(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        ways = classes.shape[0]
        return {
            "head.weight": features.new_zeros(ways, self.backbone.features),
            "head.bias": features.new_zeros(ways),
        }

    def update(self, state: State, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        # The gradient of the regularised mean cross-entropy, written out.
        errors = (self.logits(state, features).softmax(1) - one_hot(labels, classes)) / labels.shape[0]  # (S, W)
        weight = errors.t() @ (self.config.scale * unit(features)) + self.config.weight_decay * state["head.weight"]
        return {
            "head.weight": state["head.weight"] - self.config.rate * weight,
            "head.bias": state["head.bias"] - self.config.rate * errors.sum(0),
        }

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.config.scale * unit(features) @ state["head.weight"].t() + state["head.bias"]


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [FineTune]
