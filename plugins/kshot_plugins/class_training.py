"""Class training: the classification head over all base classes with which transfer learners train, not exported."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BaseHead(nn.Module):
    """Logits over all base classes (N, classes) from features (N, features), standardised over their batch first.

    Features after a ReLU share a large mean, which a randomly initialised head first has to compensate: with the 4,112
    classes of Omniglot that took most of the training. Standardised features and a head initialised near zero avoid it.
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
