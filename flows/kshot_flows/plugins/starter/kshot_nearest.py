"""Nearest class mean by cosine similarity: a query belongs to the class whose mean feature is most similar.

Replace this docstring first: `kshot algorithms` shows it. Describe your idea, and link the paper.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kshot import FeatureLearner, Learner, LearnerConfig, State, class_means, hookimpl, unit


class Nearest(FeatureLearner):
    """A class is the mean direction of its images' features, and logits are cosines to it.

    Good for a first baseline on new data: it trains in a minute or two and has one setting.
    """

    name = "nearest"  # in a recipe: [learner] name = "nearest"

    class Config(LearnerConfig):  # settings of [learner]; give each a default and a range
        scale: float = Field(10.0, gt=0, description="logits per unit of cosine similarity")

    config: Config

    # S support images, Q queries, W ways, D features. Keep no state in self between calls.

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state that `logits` needs, from support features (S, D), labels (S,) and class ids (W,)."""
        return {"means": class_means(unit(features), labels, classes)}  # (W, D)

    def logits(self, state: State, features: Tensor) -> Tensor:
        """Logits (Q, W) of query features (Q, D)."""
        return self.config.scale * unit(features) @ unit(state["means"]).t()

    # Training minimises the cross-entropy of the queries; override `episode_loss` for another loss.


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:  # called by kshot through the entry point in pyproject.toml
    return [Nearest]
