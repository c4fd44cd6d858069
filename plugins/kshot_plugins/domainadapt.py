"""Deep CORAL: class training on labelled images while aligning feature covariances with an unlabelled target domain.

Sun and Saenko, 2016. https://arxiv.org/abs/1607.01719
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kshot import Episodes, KshotError, Learner, hookimpl
from kshot_plugins.class_training import BaseHead
from kshot_plugins.cosine import Cosine


class DomainAdapt(Cosine):
    """Minimises cross-entropy over the base classes plus a weighted distance of the covariances of both domains.

    Labels of the target domain are not used; new classes are classified by cosine to their mean feature. Source and
    target share one backbone pass, so running statistics are of both.

    Good for new classes in a domain that differs from the labelled images (such as photos instead of scans), if many
    unlabelled images of that domain are available.
    """

    name = "domainadapt"
    coupled = Learner.norms  # by class training on all images of a batch

    class Config(Cosine.Config):
        weight: float = Field(1.0, ge=0, description="weight of the alignment loss relative to the cross-entropy")

    config: Config

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Cross-entropy over all base classes for the images of the episodes, plus the weighted CORAL distance."""
        if episodes.unlabelled is None:
            raise KshotError(
                "domainadapt aligns the features of unlabelled images of the target, and this recipe names none. "
                "Set dataset.unlabelled to a split of them, as 'mnist:train' or 'DATASET:SPLIT'; or take finetune"
            )
        images, labels = episodes.pooled()
        features = self.embed(torch.cat([images, episodes.unlabelled]))
        source, target = features.split([images.shape[0], episodes.unlabelled.shape[0]])
        return F.cross_entropy(self.base(source), labels) + self.config.weight * coral(source, target)


def coral(source: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the covariances of features (N, D) and (M, D), divided by 4 D²: a scalar."""
    difference = source.t().cov() - target.t().cov()  # (D, D)
    return difference.square().mean() / 4


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [DomainAdapt]
