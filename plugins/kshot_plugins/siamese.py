"""Siamese networks: pairs of images are classified as same or different by a weighted L1 distance of their embeddings.

Koch, Zemel and Salakhutdinov, 2015. https://www.cs.cmu.edu/~rsalakhu/papers/oneshot1.pdf
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import Backbone, FeatureLearner, KshotError, Learner, LearnerConfig, State, hookimpl, one_hot


class Siamese(FeatureLearner):
    """A pair's score is the log-odds that both images show one class; a class's logit is the mean over its images.

    Same and different pairs weigh the same in the loss, so a score is a log-likelihood ratio: for classes with one
    image each, the softmax of the scores is the posterior probability.

    Good for verification (whether two images show one class) besides classification, and for changing sets of classes,
    as each support image is used independently.
    """

    name = "siamese"

    def __init__(self, backbone: Backbone, config: LearnerConfig) -> None:
        super().__init__(backbone, config)
        self.score = nn.Linear(backbone.features, 1)
        # The bias is the score of two equal images and the largest possible; starting at 0 it rises very slowly.
        nn.init.constant_(self.score.bias, 5.0)
        nn.init.constant_(self.score.weight, -8 / backbone.features)

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        members = one_hot(labels, classes).to(features.dtype)  # (S, W)
        return {"embeddings": features, "shares": members / members.sum(0).clamp_min(1)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.compare(features[:, None], state["embeddings"]) @ state["shares"]

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Scores (...) of pairs of features (..., D): a weighted L1 distance plus a bias."""
        return self.score((a - b).abs()).squeeze(-1)

    @torch.no_grad()
    def verify(self, a: Tensor, b: Tensor) -> Tensor:
        """The probability (N,) that image i of `a` (N, C, H, W) and image i of `b` show the same class, base or new.

        It assumes equal priors of same and different. With a bundle: adapt to image a as the only class, classify b,
        and take the sigmoid of the logit.
        """
        if not self.takes_features:
            raise KshotError(
                f"two images alone have no support set for the norm {self.backbone.norm!r} to take statistics from. "
                "Verify with a learner that was trained with the norm 'running' or 'group'."
            )
        if a.shape != b.shape:
            raise KshotError(f"{tuple(a.shape)} and {tuple(b.shape)} do not pair: give two batches of as many images")
        return self.compare(self.embed(a), self.embed(b)).sigmoid()

    def episode_loss(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, classes: Tensor
    ) -> Tensor:
        """Binary cross-entropy of all pairs of a support and a query image; same and different weigh one half each."""
        scores = self.compare(query[:, None], support)  # (Q, S)
        same = (query_labels[:, None] == support_labels).to(scores.dtype)
        share = same.mean()
        weight = 0.5 * (same / share + (1 - same) / (1 - share))
        return F.binary_cross_entropy_with_logits(scores, same, weight)


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [Siamese]
