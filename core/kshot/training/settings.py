"""The settings of meta-training, and the learning-rate schedules."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kshot.backbones import Backbone, PretrainedBackbone
from kshot.data.augmentation import Augmentation
from kshot.data.episodes import Shape
from kshot.learner import Learner
from kshot.norms import Norm
from kshot_runtime.errors import KshotError


class Training(BaseModel):
    """How to meta-train. An outer step takes one batch of episodes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ways: int = Field(5, ge=2)
    shots: int | tuple[int, ...] = Field(1, description="one number, or several that outer steps alternate between")
    queries: int = Field(15, ge=1)
    episodes_per_step: int = Field(1, ge=1, description="episodes in one outer step (the meta-batch)")
    episodes_at_once: int | None = Field(
        None,
        ge=1,
        description="of these, how many share one backward pass, which bounds memory; if unset, all, or one if an "
        "inner loop adapts the backbone on a CPU",
    )
    augment: Augmentation = Augmentation()
    unlabelled_images: int = Field(128, ge=1, description="of dataset.unlabelled, if set, in every outer step")
    steps: int = Field(1000, ge=0, description="outer steps; 0 uses a (pretrained) backbone without training")
    folds: int = Field(
        4, ge=2, description="parts of the classes by which heads, statistics and their settings are cross-validated"
    )
    refit: bool = Field(True, description="export statistics of all classes, including those tested on")
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd (Nesterov)")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear", "halve"] = Field("cosine", description="of the learning rate")
    halve_every: int = Field(2000, ge=1, description="outer steps between halvings, for schedule = 'halve'")
    clip: float | None = Field(None, gt=0, description="largest norm of the outer gradient")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="of products and convolutions in training; bfloat16 by autocast, tf32 on a GPU only"
    )
    cuda_graph: bool = Field(
        False, description="on a GPU, replay each step as a CUDA graph; for learners whose steps are all alike"
    )
    validate_every: int = Field(250, ge=1, description="outer steps between validations, each with a checkpoint")
    validation_ways: int | None = Field(None, ge=2, description="of validation episodes; as in training if unset")
    validation_shots: int | None = Field(None, ge=1, description="the first of shots if unset")
    validation_queries: int = Field(15, ge=1)
    validation_episodes: int = Field(200, ge=1)
    patience: int | None = Field(None, ge=1, description="stop after this number of validations without improvement")

    @field_validator("shots")
    @classmethod
    def _are_shots(cls, shots: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if shots == () or any(one < 1 for one in (shots if isinstance(shots, tuple) else (shots,))):
            raise ValueError("shots are a number from 1, or a list of them such as [1, 5]")
        return shots

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of episodes that outer steps alternate between, most often one."""
        shots = self.shots if isinstance(self.shots, tuple) else (self.shots,)
        return tuple(Shape(self.ways, one, self.queries) for one in shots)

    @property
    def validation_shape(self) -> Shape:
        shots = self.validation_shots or self.shapes[0].shots
        return Shape(self.validation_ways or self.ways, shots, self.validation_queries)

    def check_parts(self, learner: type[Learner], backbone: type[Backbone], norm: Norm, ranks: int = 1) -> None:
        """A KshotError if splitting a batch, over backward passes or ranks, would change the training."""
        parts = [f"training.episodes_at_once = {self.episodes_at_once}"] if self._in_parts else []
        parts += [f"{ranks} ranks"] if ranks > 1 else []
        if ranks > self.episodes_per_step:
            raise KshotError(
                f"{ranks} ranks share the episodes of a step, and there are {self.episodes_per_step}: start fewer "
                "ranks, or raise training.episodes_per_step"
            )
        # A pretrained backbone uses its running averages in training too, so no image depends on others.
        effective: Norm = "group" if issubclass(backbone, PretrainedBackbone) else norm
        if parts and effective in learner.coupled:
            free = [each for each in learner.norms if each in backbone.norms and each not in learner.coupled]
            remedy = f", or set norm to {' or '.join(map(repr, free))} in [backbone]" if free else ""
            raise KshotError(
                f"{learner.name} with norm = {norm!r} learns from all {self.episodes_per_step} episodes of a step "
                f"together, and {' and '.join(parts)} would make it another algorithm. Use one process, without "
                f"episodes_at_once{remedy}."
            )

    @property
    def _in_parts(self) -> bool:
        return self.episodes_at_once is not None and self.episodes_at_once < self.episodes_per_step
