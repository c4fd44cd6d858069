"""Clustered experts: k-means clusters episodes, and each cluster has its own expert.

Hard, flat clusters in place of the soft hierarchy of HSML (Yao, Wei, Huang and Li, 2019), around prototypical networks.
https://arxiv.org/abs/1905.05301
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import (
    Backbone,
    Episodes,
    Learner,
    LearnerConfig,
    State,
    class_means,
    cross_entropy,
    hookimpl,
    one_hot,
    squared_distances,
)


class Clusters(Learner):
    """The backbone, a generalist, embeds the support set; the nearest of k centroids selects the expert.

    An episode's embedding is the mean of its prototypes, so it does not depend on queries, label names or uneven shots.
    An expert's weights are the generalist's plus a difference: the generalist learns from all episodes, the difference
    from those of its cluster. For clusters with too few episodes the generalist classifies.

    Good for episodes of clearly different kinds, such as scans and photos, that the support set reveals. If all
    episodes are of one kind, a single backbone as large as all experts together may do better.
    """

    name = "clusters"

    norms = ("group", "support")  # no running averages, of which each expert would need its own
    coupled = norms  # k-means moves with every batch

    class Config(LearnerConfig):
        clusters: int = Field(4, ge=1, description="number of experts besides the generalist, each as large")
        min_share: float = Field(
            0.05, ge=0, le=1, description="share of the window below which a cluster uses the generalist"
        )
        window: int = Field(256, ge=1, description="number of latest training episodes that k-means clusters")

    config: Config
    centroids: Tensor  # (k, D)
    shares: Tensor  # (k,) of the window's episodes
    window: Tensor  # (window, D) the latest episodes' embeddings, the newest last
    seen: Tensor  # () how many of these there are

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.differences = nn.ParameterList(
            torch.zeros(config.clusters, *weight.shape) for weight in self.weights().values()
        )
        self.register_buffer("centroids", torch.zeros(config.clusters, backbone.features))
        self.register_buffer("shares", torch.zeros(config.clusters))  # before meta-training no expert is trusted

    def prepare(self, classes: Sequence[int]) -> None:
        """Create the buffers of k-means. Serving needs only the final centroids."""
        self.register_buffer("window", torch.zeros(self.config.window, self.backbone.features))
        self.register_buffer("seen", torch.tensor(0))

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        general = self._prototypes({}, support, labels, classes)
        trusted = (self.shares >= self.config.min_share).float()
        route = self.route(general["prototypes"].mean(0)) * trusted
        return self._prototypes(self.expert(route), support, labels, classes)

    def classify(self, state: State, query: Tensor) -> Tensor:
        return -squared_distances(self.embed(query, state), state["prototypes"])

    def route(self, embedding: Tensor) -> Tensor:
        """One-hot (k,) of the centroid nearest to an episode's embedding (D,)."""
        nearest = squared_distances(embedding[None], self.centroids).argmin(1)
        return one_hot(nearest, torch.arange(self.config.clusters, device=nearest.device))[0]

    def expert(self, route: Tensor) -> State:
        """The backbone's weights plus the difference selected by `route` (k,); the generalist's if `route` is zero."""
        return {
            name: weight + torch.tensordot(route.to(weight.dtype), difference, 1)
            for (name, weight), difference in zip(self.weights().items(), self.differences, strict=True)
        }

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Mean query cross-entropy of the generalist and of each episode's expert."""
        losses, embeddings = [], []
        for episode, support, query in zip(episodes, *self.embed_episodes(episodes), strict=True):
            prototypes = class_means(support, episode.support_labels, episode.classes)
            targets = one_hot(episode.query_labels, episode.classes)
            losses.append(cross_entropy(-squared_distances(query, prototypes), targets))
            embeddings.append(prototypes.detach().mean(0))
        self.cluster(torch.stack(embeddings))
        for episode, embedding in zip(episodes, embeddings, strict=True):
            expert = self.expert(self.route(embedding))
            state = self._prototypes(expert, episode.support, episode.support_labels, episode.classes)
            targets = one_hot(episode.query_labels, episode.classes)
            losses.append(cross_entropy(self.classify(state, episode.query), targets))
        return torch.stack(losses).mean()

    def cluster(self, embeddings: Tensor) -> None:
        """Add embeddings (E, D) of training episodes to the window, and make one step of Lloyd's k-means over it.

        An empty cluster splits the largest one: its centroid moves next to that cluster's centroid, offset slightly
        towards the farthest member.
        """
        size, every = self.config.window, torch.arange(self.config.clusters, device=embeddings.device)
        self.window.copy_(torch.cat([self.window, embeddings])[-size:])
        self.seen.add_(len(embeddings)).clamp_(max=size)
        known = torch.arange(size, device=embeddings.device) >= size - self.seen  # (window,)
        nearest = squared_distances(self.window, self.centroids).argmin(1)
        members = one_hot(nearest, every).to(self.window.dtype) * known[:, None]  # (window, k)
        self.shares.copy_(members.sum(0) / self.seen)
        means = members.t() @ self.window / members.sum(0).clamp_min(1)[:, None]
        empty, largest = self.shares.argmin(), self.shares.argmax()
        offsets = self.window - means[largest]
        lengths = members[:, largest] * offsets.square().sum(1)
        farthest = (lengths > 0.999 * lengths.max()).int().argmax()  # two members are equally far but for rounding
        moved = torch.where(self.shares[:, None] > 0, means, self.centroids)
        splits = (every == empty) & (self.shares == 0)  # (k,)
        self.centroids.copy_(torch.where(splits[:, None], means[largest] + 0.01 * offsets[farthest], moved))

    def _prototypes(self, weights: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features, statistics = self.measure(support, weights)
        return {**weights, "prototypes": class_means(features, labels, classes), **statistics}


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [Clusters]
