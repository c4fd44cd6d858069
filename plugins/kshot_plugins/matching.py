"""Matching networks: class probabilities of a query are its attention, by cosine, to the support images of each class.

Vinyals et al., 2016. https://arxiv.org/abs/1606.04080
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import (
    Backbone,
    FeatureLearner,
    Learner,
    LearnerConfig,
    State,
    bidirectional_lstm,
    hookimpl,
    one_hot,
    unit,
)

_NOTHING = 1e-37  # attention of a class without images: its logit is finite, and far below all others


class MatchingNet(FeatureLearner):
    """Logits are the log of the attention that each class receives, summed over its support images.

    The paper's unscaled cosines give a flat attention: among 20 images, a perfect match gets e / (e + 19), an eighth.
    So cosines are scaled.

    With full context embeddings (`fce`) a bidirectional LSTM embeds each support image conditioned on the others, and a
    query attends to all of them several times. The paper leaves the reading order open; here it is by the sum of an
    image's features, so the order of the support set has no effect.

    Good for classes with several modes: a query has to resemble one support image, not the mean. The state grows with
    the support set, and with full context embeddings adapting is sequential in it.
    """

    name = "matching"

    class Config(LearnerConfig):
        scale: float = Field(
            30.0, gt=0, le=40, description="factor on cosines before the attention's softmax; 1 in the paper"
        )
        fce: bool = Field(False, description="full context embeddings: embed each image conditioned on the support set")
        fce_steps: int = Field(5, ge=1, le=100, description="times that a query reads the support set, with fce")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.fce:
            width = backbone.features
            self.lstm = nn.LSTM(width, width, bidirectional=True)
            self.gates = nn.Linear(3 * width, 4 * width)

    @property
    def batched(self) -> bool:  # type: ignore[override]  # an LSTM is not
        return not self.config.fce

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"context": self.in_context(features), "members": one_hot(labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.attend(features, state["context"], state["members"])

    def in_context(self, features: Tensor) -> Tensor:
        """Support features (S, D), each conditioned on all: the paper's g."""
        if not self.config.fce:
            return features
        sums = features.sum(1)
        order = sums.argsort()
        read = bidirectional_lstm(self.lstm, features[order]).sum(1)[order.argsort()]
        alike = ((sums[:, None] - sums).abs() <= 1e-4 * sums.abs().mean()).to(read.dtype)  # (S, S)
        return features + alike / alike.sum(1, keepdim=True) @ read  # a tie cannot tell which of the images came first

    def read(self, query: Tensor, support: Tensor) -> Tensor:
        """Query features (Q, D) conditioned on the support features (S, D): the paper's f."""
        if not self.config.fce:
            return query
        hidden = cell = torch.zeros_like(query)
        for _ in range(self.config.fce_steps):
            found = (hidden @ support.t()).softmax(1) @ support  # (Q, D)
            i, f, o, new = self.gates(torch.cat([query, hidden, found], 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * new.tanh()
            hidden = o.sigmoid() * cell.tanh() + query
        return hidden

    def attend(self, query: Tensor, support: Tensor, members: Tensor) -> Tensor:
        """Logits (Q, W) of query features (Q, D), from support features (S, D) and their classes (S, W)."""
        query = self.read(query, support)
        scores = self.config.scale * unit(query) @ unit(support).t()  # (Q, S)
        # Cosines lie in -1..1, so no power falls under exp(-2 * scale) and their sums are as exact as logsumexp.
        powers = (scores - scores.amax(1, keepdim=True)).exp()
        return (powers @ members.to(powers.dtype) + _NOTHING).log() - powers.sum(1, keepdim=True).log()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MatchingNet]
