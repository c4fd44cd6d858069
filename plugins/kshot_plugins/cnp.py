"""Conditional neural processes: a class is its mean code, and a learned decoder compares a query with all classes.

Garnelo et al., 2018. https://arxiv.org/abs/1807.01613
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import Backbone, FeatureLearner, Learner, LearnerConfig, State, class_means, hookimpl


class CNP(FeatureLearner):
    """A class is the mean of its encoded support images, its slot; the decoder turns a query and all slots into logits.

    Differs from the paper, which concatenates the slots in a fixed order and so fixes the number of ways: here one
    decoder is applied to each slot. It compares the query with that slot, given the mean of the comparisons with all
    slots, so any number of ways works, and permuting the classes permutes the logits exactly.

    Good for classes that no fixed distance separates well: the similarity is learned, and classifying takes one pass.
    It trains fast; the decoder's cost grows with queries times ways.
    """

    name = "cnp"

    class Config(LearnerConfig):
        width: int = Field(128, ge=2, le=4096, description="size of a slot and of the decoder's layers")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        width = config.width
        self.encoder = nn.Sequential(nn.Linear(backbone.features, width), nn.LayerNorm(width))
        self.compare = nn.Linear(2 * width, width)
        self.refine = nn.Linear(width, width)
        self.context = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)  # a bias would be every class's, and cancel in the softmax

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"slots": class_means(self.encoder(features), labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.decode(self.encoder(features), state["slots"])

    def decode(self, query: Tensor, slots: Tensor) -> Tensor:
        """Logits (Q, W) of encoded queries (Q, R) against slots (W, R)."""
        query, slots = query[:, None, :], slots[None, :, :]
        pairs = torch.cat([(query - slots).square(), query * slots], 2)  # (Q, W, 2R)
        hidden = F.relu(self.compare(pairs))  # (Q, W, R); its mean over the slots is the context
        hidden = F.relu(self.refine(hidden) + self.context(hidden.mean(1, keepdim=True)))
        return self.score(hidden).squeeze(2)


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [CNP]
