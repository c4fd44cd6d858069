"""Cosines to class means: a query belongs to the class whose mean feature points its way.

`kshot algorithms` shows these sentences, and the class's: change them first. Here belongs the paper, with a link.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kshot import Learner, LearnerConfig, State, hookimpl
from kshot.learner import class_means


class Nearest(Learner):
    """A class is the mean direction of its images' features, and logits are cosines to it.

    Good for a first look at new data: it trains in a minute or two, and has one setting only.
    """

    name = "nearest"  # in a recipe: [learner] name = "nearest"

    class Config(LearnerConfig):  # what may stand beside the name; add yours, each with a default and a range
        scale: float = Field(10.0, gt=0, description="what cosines are multiplied by to become logits")

    config: Config

    # Of S support images, Q queries, W ways and D features. Nothing is remembered from one call to the next.

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """From images (S, C, H, W), their labels (S,) and the ids of the classes (W,), all that `classify` needs."""
        features, statistics = self.measure(support)  # (S, D); statistics only with the setting norm = "support"
        return {"means": class_means(F.normalize(features), labels, classes), **statistics}  # (W, D)

    def classify(self, state: State, query: Tensor) -> Tensor:
        """Logits (Q, W) of images (Q, C, H, W)."""
        features = F.normalize(self.embed(query, state))  # (Q, D)
        return self.config.scale * features @ F.normalize(state["means"]).t()

    # Training minimises the queries' cross-entropy. If yours is another loss: def meta_loss(self, episodes).


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:  # kshot calls it: the entry point in pyproject.toml names this module
    return [Nearest]
