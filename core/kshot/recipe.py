"""Recipes: one experiment as a TOML file, from its data to the gate for promotion."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kshot import plugins
from kshot.backbones import Backbone, load_start
from kshot.data.datasets import Protocol, splits_of
from kshot.data.episodes import Shape
from kshot.learner import Learner
from kshot.training import Training
from kshot_runtime.errors import KshotError


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSettings(_Settings):
    """The packed data sets, and the splits to train, validate and test on.

    A split is `SPLIT` of the data set `name`, or `DATASET:SPLIT` of another, or several joined by `+`.
    """

    name: str = Field(description="the folder under data/; its image rule decides how a user's photos are decoded")
    source: str | None = Field(None, description="the importer to run if it is missing")
    rotations: bool = Field(
        False, description="make four classes of each class, one for each quarter turn, after splitting"
    )
    across_groups: bool = Field(
        False, description="take the support and the queries of a class from different groups, if an import has groups"
    )
    train: str = Field("train", description="classes to meta-train on")
    validation: str = Field("val", description="classes to select the best weights and to calibrate on")
    test: str = Field("test", description="classes to test on")
    unlabelled: str | None = Field(
        None, description="a split whose images are given to the learner without labels while meta-training"
    )

    @field_validator("train", "validation", "test", "unlabelled")
    @classmethod
    def _is_a_reference(cls, reference: str | None) -> str | None:
        try:
            splits_of("train" if reference is None else reference, "")
        except KshotError as error:
            raise ValueError(str(error)) from None
        return reference

    @property
    def names(self) -> tuple[str, ...]:
        """All data sets of the recipe, `name` first."""
        references = (self.train, self.validation, self.test, self.unlabelled)
        return tuple(dict.fromkeys([self.name, *(name for r in references if r for name in splits_of(r, self.name))]))

    @property
    def protocol(self) -> Protocol:
        """How episodes are drawn."""
        return "across groups" if self.across_groups else "random photos"


class PluginSettings(BaseModel):
    """A plugin's name, and settings for its Config."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LearnerSettings(PluginSettings):
    """A learner's name and settings, or the names of several, of which validation episodes choose the best."""

    name: str | tuple[str, ...]  # type: ignore[assignment]  # a backbone has one name

    @model_validator(mode="after")
    def _has_settings_of_one(self) -> Self:
        if not self.names or (self.options and len(self.names) > 1):
            raise ValueError(f"settings for {len(self.names)} learners: name one learner, or give no settings")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def one(self) -> str:
        """The learner's name; a KshotError if there are several."""
        if len(self.names) > 1:
            raise KshotError(f"choose one of {', '.join(self.names)} first")
        return self.names[0]


class EvaluationSettings(_Settings):
    """The test episodes. The gate compares results on the first of `shapes`, and the bundle reports them."""

    ways: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (5,), min_length=1, description="evaluated with each of shots"
    )
    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1)
    queries: int = Field(15, ge=1)
    episodes: int = Field(1000, ge=2)

    @property
    def shapes(self) -> list[Shape]:
        return [Shape(ways, shots, self.queries) for ways in self.ways for shots in self.shots]


class Recipe(_Settings):
    """One experiment. `Recipe.load(path, {"training.lr": "0.01"})` reads a file and overrides single values."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="of the experiment and of the registered model")
    seed: int = Field(1, ge=0)
    dataset: DataSettings
    backbone: PluginSettings = PluginSettings(name="conv4")
    learner: LearnerSettings
    training: Training = Training()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: dict[str, Any] = Field({}, description="the criteria for promotion of a version")

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
        """Read a recipe; `overrides` maps dotted keys to TOML values (bare words are taken as strings)."""
        path = Path(path)
        try:
            content = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise KshotError(f"there is no recipe at {path}. `kshot recipes` lists the included ones.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise KshotError(f"{path} is not a readable recipe: {error}") from None
        for key, value in (overrides or {}).items():
            set_value(content, key, value)
        try:
            recipe = cls.model_validate(content)
        except ValidationError as error:
            raise KshotError(f"{path}: {explain(error, cls)}") from None
        recipe.check()
        return recipe

    def check(self) -> None:
        """Validate plugin settings, and check that test splits are disjoint from training and validation splits."""
        for variant in self.variants():
            variant._learner_config()
            norm = variant._backbone_config().norm
            found = plugins.find()
            learner, backbone = found.learner(variant.learner.one).value, found.backbone(variant.backbone.name).value
            self.training.check_parts(learner, backbone, norm)
        if self.training.steps and len(self.variants()) > 1:
            raise KshotError(
                "choosing between several learners or kinds of features works only without training: training.steps = 0"
            )
        self._refuse_test_overlap()

    def variants(self) -> list[Recipe]:
        """This recipe once for each learner and kind of features to choose from."""
        found = []
        for name in self.learner.names:
            learner = plugins.find().learner(name).value
            options = self.backbone.options
            kinds = learner.prefers if options.get("features") == "auto" else [options.get("features")]
            for kind in kinds:
                chosen = {**options, **({"features": kind} if kind else {})}
                found.append(
                    self.model_copy(
                        update={
                            "learner": LearnerSettings(name=name, **self.learner.options),
                            "backbone": PluginSettings(name=self.backbone.name, **chosen),
                        }
                    )
                )
        return found

    def build(self, image: tuple[int, int, int]) -> Learner:
        """A new learner for images of shape (channels, height, width)."""
        return self.build_head(self.build_backbone(image))

    def build_backbone(self, image: tuple[int, int, int]) -> Backbone:
        """A new backbone for images of shape (channels, height, width)."""
        settings, backbone = self._backbone_config(), plugins.find().backbone(self.backbone.name).value
        built: Backbone = backbone(image, settings)
        if settings.start:
            load_start(built, Path(settings.start))
        return built

    def build_head(self, backbone: Backbone) -> Learner:
        """A new learner on this backbone."""
        learner: Learner = plugins.find().learner(self.learner.one).value(backbone, self._learner_config())
        return learner

    def _refuse_test_overlap(self) -> None:
        """Refuse test splits that are also used for training or for selection."""
        splits = self.dataset
        trained = {"train": splits.train, "unlabelled": splits.unlabelled} if self.training.steps else {}
        tested = _single_splits(splits.test, splits.name)
        for what, reference in {**trained, "validation": splits.validation}.items():
            if reference and (both := tested & _single_splits(reference, splits.name)):
                raise KshotError(
                    f"{min(both)} is in dataset.{what} = {reference!r} and in dataset.test = {splits.test!r}, "
                    "but test classes must be new to the learner. Use another split for one of them."
                )

    def _learner_config(self) -> Any:
        return _configure(plugins.find().learner(self.learner.one).value.Config, self.learner, "learner")

    def _backbone_config(self) -> Any:
        """The backbone's settings, with the first norm of the learner's list that both support."""
        learner, backbone = (
            plugins.find().learner(self.learner.one).value,
            plugins.find().backbone(self.backbone.name).value,
        )
        settings = _configure(backbone.Config, self.backbone, "backbone")
        common = [each for each in learner.norms if each in backbone.norms]
        norm = settings.norm  # type: ignore[attr-defined]  # of every BackboneConfig
        if not common or norm not in (None, *common):
            remedy = (
                f"Set it to {' or '.join(map(repr, common))}, or leave it out" if common else "Use another backbone"
            )
            raise KshotError(
                f"[backbone] norm = {norm!r}: {self.learner.one} works with {', '.join(learner.norms)}, and "
                f"{self.backbone.name} with {', '.join(backbone.norms)}. {remedy}."
            )
        return settings.model_copy(update={"norm": norm or common[0]})


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error in words, one line per fault; for an unknown key with the closest known one."""
    lines = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _keys(model, fault["loc"][:-1])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            lines.append(f"unknown key {place!r}; {hint}(known here: {', '.join(known)})")
        elif fault["type"] == "missing":
            lines.append(f"{place} is missing")
        else:
            what = fault["msg"].removeprefix("Value error, ")
            given = f"{place} = {fault['input']!r}: " if place else ""  # errors about several keys name them
            lines.append(f"{given}{what[0].lower()}{what[1:]}")
    return "\n".join(lines)


def _single_splits(reference: str, own: str) -> set[str]:
    """The single splits of a reference, such as {"omniglot:train", "glyphs:train"}."""
    return {f"{name}:{split}" for name, splits in splits_of(reference, own).items() for split in splits.split("+")}


def _configure(config: type[BaseModel], settings: PluginSettings, section: str) -> BaseModel:
    if section == "learner" and "norm" in settings.options:
        raise KshotError(f"norm is a setting of the backbone: move norm = {settings.options['norm']!r} to [backbone]")
    try:
        return config.model_validate(settings.options)
    except ValidationError as error:
        raise KshotError(f"[{section}] of {settings.name!r}: {explain(error, config)}") from None


def _keys(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    for part in place:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return sorted(model.model_fields)


def set_value(content: dict[str, Any], key: str, text: str) -> None:
    """Set a dotted key to a TOML value; a text that is not TOML is taken as a string."""
    *sections, last = key.split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise KshotError(f"{key}={text}: {section!r} is a value, not a section")
    try:
        place[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        place[last] = text
