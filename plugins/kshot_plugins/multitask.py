"""Multi-task training: one backbone learns the classes of several data sets at once, with a head for each data set.

Caruana, 1997 (https://doi.org/10.1023/A:1007379606734): hard parameter sharing. Wang, Zhao and Li, 2021, find such
features as good for few-shot learning as meta-trained ones (https://arxiv.org/abs/2106.09017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kshot import Episodes, Learner, hookimpl
from kshot_plugins.class_training import BaseHead
from kshot_plugins.cosine import Cosine


class MultiTask(Cosine):
    """Every data set has the same weight, whatever its share of a batch; a class is the direction of its mean feature.

    Of a recipe with one data set, it is ordinary class training.

    Good for several labelled data sets with one image size: more data, and more kinds of it, make features that carry
    over. Adapting is a mean, as cheap as can be.
    """

    name = "multitask"

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)
        self.classes = list(classes)  # of each data set; its head is its columns

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Mean over the data sets in the batch of their images' cross-entropy over the classes of their data set."""
        images, labels = episodes.pooled()
        losses, first = [], 0
        for logits in self.base(self.embed(images)).split(self.classes, dim=1):  # (N, classes of one data set)
            own = (first <= labels) & (labels < first + logits.shape[1])
            if own.any():
                losses.append(F.cross_entropy(logits[own], labels[own] - first))
            first += logits.shape[1]
        return torch.stack(losses).mean()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MultiTask]
