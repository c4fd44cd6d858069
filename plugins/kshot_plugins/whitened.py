"""Whitened cosine: nearest class mean by cosine after whitening with the within-class covariance of the base classes.

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

    Good for photographs of similar things on a frozen pretrained backbone, especially with `features = "stages"`. Its
    statistics take seconds. Three base classes already help, and without base classes it still gains from several
    photos per class. `plda` is better with one photo per class and at rejecting unknown photos.
    """

    name = "whitened"

    class Config(WhitenedSpace.Config):
        scale: float = Field(25.0, gt=0, description="logits per unit of cosine")

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
