"""Cosines to class means: a query belongs to the class whose mean feature points its way.

`kshot algorithms` shows these sentences, and the class's: change them first. Here belongs the paper, with a link.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kshot import FeatureLearner, Learner, LearnerConfig, State, class_means, hookimpl, unit


class Nearest(FeatureLearner):
    """A class is the mean direction of its images' features, and logits are cosines to it.

    Good for a first look at new data: it trains in a minute or two, and has one setting only.
    """

    name = "nearest"  # in a recipe: [learner] name = "nearest"

    class Config(LearnerConfig):  # what may stand beside the name; add yours, each with a default and a range
        scale: float = Field(10.0, gt=0, description="what cosines are multiplied by to become logits")

    config: Config

    # Of S support images, Q queries, W ways and D features. Nothing is remembered from one call to the next.

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """From features (S, D), their labels (S,) and the ids of the classes (W,), all that `logits` needs."""
        return {"means": class_means(unit(features), labels, classes)}  # (W, D)

    def logits(self, state: State, features: Tensor) -> Tensor:
        """Logits (Q, W) of features (Q, D)."""
        return self.config.scale * unit(features) @ unit(state["means"]).t()

    # Training minimises the queries' cross-entropy. If yours is another loss: def episode_loss.


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:  # kshot calls it: the entry point in pyproject.toml names this module
    return [Nearest]
