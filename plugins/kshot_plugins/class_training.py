"""Class training: ordinary classification of all base classes, as transfer learners train instead of on episodes.

Not a learner: the head that several learners train with. It is not exported.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BaseHead(nn.Module):
    """Logits over all base classes (N, classes) from features (N, features), standardised over their batch first.

    Features that leave a ReLU have a large mean in common, and rows that start at random first have to unlearn it: with
    the 4,112 classes of Omniglot that took most of a training. Without the mean, and from rows of almost nothing, as
    many images teach far more.
    """

    def __init__(self, features: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(features, affine=False, track_running_stats=False)
        self.logits = nn.Linear(features, sum(classes))
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(self.logits.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.standardise(features))
        return logits
