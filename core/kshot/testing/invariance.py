"""Checks of invariance: logits that must not depend on an order, on other queries, or on how they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from kshot.data.episodes import Shape, sample_episodes
from kshot.learner import FeatureLearner, over_episodes
from kshot.testing.helpers import in_float64, logits_of, require_close, under_every_norm
from kshot.testing.subject import Subject, toy_images


@under_every_norm
def order_of_the_support_set_does_not_matter(subject: Subject) -> None:
    """The logits do not depend on the order of the support images.

    Combine support images only by operations that ignore their order: sums, means, maxima, attention without positions.
    """
    learner, episode = in_float64(subject)
    order = torch.randperm(len(episode.support), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = learner.adapt(episode.support[order], episode.support_labels[order], episode.classes)
        require_close(learner.classify(state, episode.query), logits_of(learner, episode), "another support order")


@under_every_norm
def permuting_the_classes_permutes_the_logits(subject: Subject) -> None:
    """Column w of the logits belongs to class w, in whatever order the classes are listed.

    Treat every class alike: no value may depend on the position of a class in the list, as rows of a learned head do.
    """
    learner, episode = in_float64(subject)
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes[order])
        permuted = learner.classify(state, episode.query)
    require_close(permuted, logits_of(learner, episode)[:, order], "classes in another order")


@under_every_norm
def one_query_does_not_depend_on_its_companions(subject: Subject) -> None:
    """A query gets the same logits alone as in a batch.

    Take means and normalise over features or over the support set, never over the queries.
    """
    learner, episode = subject.build(), subject.episode()
    together = logits_of(learner, episode)
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
        alone = torch.cat([learner.classify(state, episode.query[i : i + 1]) for i in range(len(episode.query))])
    require_close(alone, together, "a query by itself")


@under_every_norm
def a_query_is_seen_through_embed_only(subject: Subject) -> None:
    """`classify` gives the same logits for a query's features as for its image; if `takes_features`, so does `adapt`.

    Use the query only through `self.embed(query, state)`, which returns features unchanged. Pass it the state, which
    holds the statistics of the support set.
    """
    learner, episode = subject.build(), subject.episode()
    support, labels, classes = episode.support, episode.support_labels, episode.classes
    with torch.no_grad():
        state = learner.adapt(support, labels, classes)
        expected = learner.classify(state, episode.query)
        features = learner.embed(episode.query, state)
        require_close(learner.classify(state, features), expected, "a query's features in its place")
        if learner.takes_features:
            state = learner.adapt(learner.embed(support), labels, classes)
            require_close(learner.classify(state, features), expected, "a support set's features in its place")


def episodes_of_a_batch_are_fitted_as_one_by_one(subject: Subject) -> str | None:
    """Several episodes at once, under `torch.func.vmap`, give the same logits as one by one.

    Heads on features run so on any device, other learners on a GPU. Avoid `.item()`, `if` on the values of a tensor,
    and in-place writes. If one is necessary, set `batched = False`: episodes then run one by one.
    """
    learner = subject.build().double()
    if not learner.batched:
        return "`batched = False`: its episodes run one by one"
    batch = sample_episodes(toy_images(), Shape(5, 2, 3), 3, seed=5, step=0).to("cpu", torch.float64)
    labels, classes = batch[0].support_labels, batch[0].classes

    def answer(support: Tensor, query: Tensor) -> Tensor:
        return learner.classify(learner.adapt(support, labels, classes), query)

    with torch.no_grad():
        head = isinstance(learner, FeatureLearner)
        episodes = learner.embed_episodes(batch) if head else (batch.support, batch.query)
        one_by_one, together = (over_episodes(answer, *episodes, together=at_once) for at_once in (False, True))
    require_close(together, one_by_one, "episodes under vmap")
    return None
