"""The settings of meta-training, and the learning-rate schedules."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kshot.data.augmentation import Augmentation
from kshot.data.episodes import Shape


class Training(BaseModel):
    """How to meta-train. An outer step takes one batch of episodes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ways: int = Field(5, ge=2)
    shots: int | tuple[int, ...] = Field(1, description="one number, or several that outer steps take in turns")
    queries: int = Field(15, ge=1)
    episodes_per_step: int = Field(1, ge=1, description="episodes in one outer step (the meta-batch)")
    episodes_at_once: int | None = Field(None, ge=1, description="of these, how many share one backward pass")
    augment: Augmentation = Augmentation()
    unlabelled_images: int = Field(128, ge=1, description="of dataset.unlabelled, if it is set, in every outer step")
    steps: int = Field(1000, ge=0, description="outer steps; 0 takes the backbone as it is built, say pretrained")
    folds: int = Field(
        4, ge=2, description="parts of the classes by which heads, statistics and their settings are cross-validated"
    )
    refit: bool = Field(True, description="export statistics of all classes, those that were tested on too")
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd, Nesterov's; adam has its own")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear", "halve"] = Field("cosine", description="of the learning rate")
    halve_every: int = Field(2000, ge=1, description="outer steps between halvings, for schedule = 'halve'")
    clip: float | None = Field(None, gt=0, description="largest norm of the outer gradient")
    validate_every: int = Field(250, ge=1, description="outer steps between validations, each with a checkpoint")
    validation_ways: int | None = Field(None, ge=2, description="of validation episodes; as in training if unset")
    validation_shots: int | None = Field(None, ge=1, description="the first of shots if unset")
    validation_queries: int = Field(15, ge=1)
    validation_episodes: int = Field(200, ge=1)
    patience: int | None = Field(None, ge=1, description="stop after so many validations without a better one")

    @field_validator("shots")
    @classmethod
    def _are_shots(cls, shots: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if shots == () or any(one < 1 for one in (shots if isinstance(shots, tuple) else (shots,))):
            raise ValueError("shots are a number from 1, or a list of them such as [1, 5]")
        return shots

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of episodes that outer steps take in turns, most often one."""
        shots = self.shots if isinstance(self.shots, tuple) else (self.shots,)
        return tuple(Shape(self.ways, one, self.queries) for one in shots)

    @property
    def validation_shape(self) -> Shape:
        shots = self.validation_shots or self.shapes[0].shots
        return Shape(self.validation_ways or self.ways, shots, self.validation_queries)
