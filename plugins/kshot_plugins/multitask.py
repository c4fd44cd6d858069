"""Multi-task training: class training of one backbone on several data sets at once, with one head per data set.

Caruana, 1997 (https://doi.org/10.1023/A:1007379606734): hard parameter sharing. Wang, Zhao and Li, 2021, report that
such features are as good for few-shot learning as meta-trained ones (https://arxiv.org/abs/2106.09017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kshot import Episodes, Learner, hookimpl
from kshot_plugins.class_training import BaseHead
from kshot_plugins.cosine import Cosine

_OTHERS = -100  # the label of images of other data sets


class MultiTask(Cosine):
    """All data sets weigh the same in the loss. New classes are classified by cosine to their mean feature.

    With a single data set it is ordinary class training.

    Good for several labelled data sets with one image size: more and more varied data give features that transfer.
    Adapting is a mean.
    """

    name = "multitask"
    coupled = Learner.norms  # by class training on all images of a batch

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)
        self.classes = list(classes)  # of each data set; its head is its columns

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Mean over the data sets in the batch of their images' cross-entropy over the classes of their data set."""
        images, labels = episodes.pooled()
        losses, counts, first = [], [], 0
        for logits in self.base(self.embed(images)).split(self.classes, dim=1):  # (N, classes of one data set)
            own = (first <= labels) & (labels < first + logits.shape[1])
            targets = torch.where(own, labels - first, _OTHERS)
            losses.append(F.cross_entropy(logits, targets, ignore_index=_OTHERS, reduction="sum"))
            counts.append(own.sum())
            first += logits.shape[1]
        images_of_each = torch.stack(counts)
        return (torch.stack(losses) / images_of_each.clamp_min(1)).sum() / images_of_each.count_nonzero()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MultiTask]
