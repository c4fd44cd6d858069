"""Whitened cosine: class means in a space whitened by the scatter within the user's own base classes.

Within-class covariance normalisation: Hatch, Kajarekar and Stolcke, 2006, in speaker recognition.
https://www.isca-archive.org/interspeech_2006/hatch06_interspeech.html
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kshot import Learner, State, hookimpl
from kshot_plugins.whitening import WhitenedSpace


class Whitened(WhitenedSpace):
    """Logits are cosines to the class means in the whitened space, times a scale.

    Good for photographs of similar things on a frozen pretrained backbone, above all with `features = "stages"`. Its
    statistics take seconds; three base classes help already, and with none of them it still gains from several photos
    of a class. `plda` is better with one photo of a class and at telling what belongs to none.
    """

    name = "whitened"

    class Config(WhitenedSpace.Config):
        scale: float = Field(25.0, gt=0, description="what cosines are multiplied by to become logits")

    config: Config

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        rows = self.space(features)
        return {"prototypes": self.prototypes(rows, labels, classes), "photos": rows}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.config.scale * self.space(features) @ state["prototypes"].t()

    def evidence(self, state: State, features: Tensor) -> State:
        return {"nearest": (self.space(features) @ state["photos"].t()).amax(1)}


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [Whitened]
