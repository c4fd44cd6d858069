"""The promotion gate: decides from measurements whether a version may go into production; independent of MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kshot_runtime.errors import KshotError


class GateSettings(BaseModel):
    """Conditions for promotion. Accuracies and errors are fractions: 0.01 is one percentage point."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    margin: float = Field(0.0, ge=0, le=1, description="accuracy that may be lost at the interval's lower end")
    ece_margin: float = Field(0.02, ge=0, le=1, description="how much worse calibration (ECE) may get")
    auroc_margin: float = Field(0.01, ge=0, le=1, description="how much worse open-set detection (AUROC) may get")
    min_episodes: int = Field(30, ge=2, description="fewer give no interval worth the name")
    min_accuracy: float | None = Field(None, ge=0, le=1, description="mean accuracy below which nothing passes")
    min_agreement: float = Field(0.999, ge=0, le=1, description="share of queries that ONNX and torch answer alike")
    shots_margin: float = Field(0.0, ge=0, le=1, description="accuracy that more photos of a class may clearly cost")
    latency_ms: float | None = Field(None, gt=0, description="time that one classification may take")
    max_unknown_let_in: float = Field(0.5, ge=0, le=1, description="share of unknown photos; more is warned of")
    max_ece: float = Field(0.1, ge=0, le=1, description="calibration error; more is warned of")

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> GateSettings:
        """The settings in a recipe's [gate] section."""
        from kshot.recipe import explain  # imports torch, which judging does not need

        try:
            return cls.model_validate(dict(section))
        except ValidationError as error:
            raise KshotError(f"[gate]: {explain(error, cls)}") from None


@dataclass(frozen=True)
class EpisodeSet:
    """What determines evaluation episodes: evaluations with equal sets used the same images in the same order."""

    data: str  # hash of the dataset version
    split: str
    ways: int
    shots: int
    queries: int
    seed: int
    rotations: bool = False
    protocol: str = ""  # the protocol; empty in evidence of earlier versions


@dataclass(frozen=True)
class MoreShots:
    """The change in accuracy with more images per class, on episodes of the same classes."""

    ways: int
    fewer: int
    more: int
    difference: tuple[float, float, float]  # more - fewer: lower end, mean, upper end

    @classmethod
    def between(cls, ways: int, fewer: int, more: int, accuracies: tuple[np.ndarray, np.ndarray]) -> MoreShots:
        """From the accuracy of every episode with fewer and with more images per class."""
        return cls(ways, fewer, more, _difference(accuracies[1], accuracies[0]))


@dataclass(frozen=True, eq=False)
class Evidence:
    """Measurements of one version; None if not measured."""

    episodes: EpisodeSet
    accuracies: np.ndarray  # (episodes,) share of each episode's queries that were right
    ece: float
    agreement: float | None = None  # share of queries that ONNX and torch answer alike
    auroc: float | None = None  # AUROC of known against unknown queries
    latency_ms: float | None = None
    version: int | None = None  # its number in the registry, once it has one
    cosine: np.ndarray | None = None  # (episodes,) accuracies of cosine to class means on the same backbone
    accepted: float | None = None  # share of known test queries that pass the default threshold
    false_accepts: float | None = None  # share of unknown test queries that pass
    shots: tuple[MoreShots, ...] = ()  # from each number of shots to the next that was tested

    def __post_init__(self) -> None:
        object.__setattr__(self, "accuracies", _accuracies(self.accuracies))
        if self.cosine is not None:
            object.__setattr__(self, "cosine", _accuracies(self.cosine))
        for name in ("ece", "agreement", "auroc", "latency_ms", "accepted", "false_accepts"):
            value = getattr(self, name)
            # numpy floats are not JSON serialisable
            object.__setattr__(self, name, None if value is None else float(value))

    def to_dict(self) -> dict[str, Any]:
        rows = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        shots = [asdict(gain) for gain in self.shots]
        return {**vars(self), "episodes": asdict(self.episodes), "shots": shots, **rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evidence:
        shots = tuple(
            MoreShots(**{**gain, "difference": tuple(gain["difference"])}) for gain in values.get("shots", ())
        )
        return cls(**{**values, "episodes": EpisodeSet(**values["episodes"]), "shots": shots})


@dataclass(frozen=True)
class Check:
    """One condition: the measured value, its bound, and a message."""

    name: str
    passed: bool
    measured: float | None
    limit: float
    sentence: str


@dataclass(frozen=True)
class GateReport:
    """The verdict on a challenger, with reasons."""

    version: int | None
    champion: int | None  # the version it was compared with; None when there was none
    episodes: int
    accuracy: float
    margin: float  # half the 95 % interval of accuracy
    difference: tuple[float, float, float] | None  # challenger - champion: lower end, mean, upper end
    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()  # shown to users, without blocking the version

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[str]:
        return [check.sentence for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateReport:
        known = {key: value for key, value in values.items() if key != "passed"}
        if known["difference"] is not None:
            known["difference"] = tuple(known["difference"])
        checks = tuple(Check(**check) for check in known["checks"])
        return cls(**{**known, "checks": checks, "warnings": tuple(known.get("warnings", ()))})

    def to_markdown(self) -> str:
        against = "with no champion to beat" if self.difference is None else f"against version {self.champion}"
        who = "The challenger" if self.version is None else f"Version {self.version}"
        lines = [
            f"# {who} {'passed' if self.passed else 'did not pass'} the gate",
            "",
            f"{_percent(self.accuracy)} ± {_percent(self.margin)} over {self.episodes} episodes, {against}.",
            "",
            *(f"- {'✓' if check.passed else '✗'} **{check.name}**: {check.sentence}" for check in self.checks),
        ]
        if self.warnings:
            lines += ["", "Mind:", "", *(f"- {sentence}" for sentence in self.warnings)]
        return "\n".join(lines) + "\n"


def judge(
    challenger: Evidence, champion: Evidence | None, settings: GateSettings, unmeasured: int | None = None
) -> GateReport:
    """Compare a challenger with the champion, episode by episode, or a first version with the cosine baseline.

    The baseline is also used if the champion, version `unmeasured`, cannot be evaluated on these episodes.
    """
    count, accuracy, margin = len(challenger.accuracies), *_interval(challenger.accuracies)
    checks = [
        Check(
            "episodes", count >= settings.min_episodes, count, settings.min_episodes,
            f"{count} episodes were played; an interval needs {settings.min_episodes}",
        ),
        _at_least(
            "ONNX agreement", challenger.agreement, settings.min_agreement,
            "of the queries get the same answer from ONNX as from torch",
        ),
    ]  # fmt: skip
    if settings.min_accuracy is not None:
        checks.append(_at_least("accuracy", accuracy, settings.min_accuracy, "of the queries were right"))
    if settings.latency_ms is not None:
        checks.append(_in_time(challenger.latency_ms, settings.latency_ms))
    for step in challenger.shots:
        check = _not_worse(
            "at fewer shots", f"from {step.fewer} to {step.more} shots, {step.ways}-way",
            step.difference, settings.shots_margin, clearly=True,
        )  # fmt: skip
        mend = "" if check.passed else f": train at both, with training.shots = [{step.fewer}, {step.more}]"
        checks.append(replace(check, sentence=check.sentence + mend))
    difference = None
    if champion is None and challenger.cosine is not None:
        gain = _difference(challenger.accuracies, challenger.cosine)
        check = _not_worse(
            "cosine", "against cosine on the same backbone and episodes", gain, settings.margin, clearly=True
        )
        mend = "" if check.passed else ": train for longer, evaluate more episodes, or take learner.name=cosine"
        checks.append(replace(check, sentence=check.sentence + mend))
    if champion is not None:
        _same_episodes(challenger, champion)
        difference = _difference(challenger.accuracies, champion.accuracies)
        checks.append(_not_worse("the champion", "on the same episodes", difference, settings.margin))
        checks.append(
            Check(
                "calibration", bool(challenger.ece <= champion.ece + settings.ece_margin),
                challenger.ece, champion.ece + settings.ece_margin,
                f"calibration error is {_percent(challenger.ece)}, the champion's {_percent(champion.ece)}; "
                f"{_points(settings.ece_margin)} more are allowed",
            )
        )  # fmt: skip
        if champion.auroc is not None:
            checks.append(
                _at_least(
                    "open set", challenger.auroc, champion.auroc - settings.auroc_margin,
                    f"is the AUROC of telling unknown classes, the champion's {_percent(champion.auroc)}",
                )
            )  # fmt: skip
    return GateReport(
        version=challenger.version,
        champion=champion.version if champion else unmeasured,
        episodes=count,
        accuracy=accuracy,
        margin=margin,
        difference=difference,
        checks=tuple(checks),
        warnings=tuple(_warnings(challenger, settings, unmeasured)),
    )


def _warnings(measured: Evidence, settings: GateSettings, unmeasured: int | None) -> Iterator[str]:
    """Values out of bounds that do not block promotion, with remedies."""
    if unmeasured is not None:
        yield f"was not compared with version {unmeasured}, which may have learned from the classes that are tested"
    if measured.false_accepts is not None and measured.false_accepts > settings.max_unknown_let_in:
        known = "" if measured.accepted is None else f" where {100 * measured.accepted:.0f} % of the known pass"
        yield (
            f"lets in {100 * measured.false_accepts:.0f} % of unknown photos{known} "
            f"({100 * settings.max_unknown_let_in:g} % is the bound): ask for more photos of each class, or set accept"
        )
    if measured.ece > settings.max_ece:
        yield (
            f"has a calibration error of {100 * measured.ece:.1f} % ({100 * settings.max_ece:g} % is the bound): "
            "add classes to validate on"
        )


def _accuracies(values: np.ndarray) -> np.ndarray:
    """The accuracy of every episode: (episodes,)."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise KshotError(
            f"accuracies by episode must be a non-empty row of numbers from 0 to 1; got shape {values.shape}"
            + (f" from {values.min()} to {values.max()}" if values.size else "")
        )
    return values


def _difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """The mean difference over paired episodes between the ends of its interval."""
    mean, half = _interval(ours - theirs)
    return mean - half, mean, mean + half


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Like kshot.evaluation.scores.interval, without importing torch; infinite for a single value."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(half)


def _same_episodes(challenger: Evidence, champion: Evidence) -> None:
    mine, theirs = asdict(challenger.episodes), asdict(champion.episodes)
    mine["episodes"], theirs["episodes"] = len(challenger.accuracies), len(champion.accuracies)
    apart = [f"{key} {mine[key]} against {theirs[key]}" for key in mine if mine[key] != theirs[key]]
    if apart:
        raise KshotError(
            f"challenger and champion were not measured on the same episodes ({', '.join(apart)}), so their "
            "difference says nothing. Evaluate the champion's bundle on the challenger's episodes first."
        )


def _not_worse(
    than: str, what: str, difference: tuple[float, float, float], margin: float, clearly: bool = False
) -> Check:
    """Whether the loss at the interval's lower end (with `clearly`: upper end) is at most the margin.

    A challenger must be shown to be as good as the champion; against the baseline it must not be shown to be worse.
    """
    lower, mean, upper = difference
    bound = upper if clearly else lower
    # Equal predictions differ by exactly zero; rounding must not turn that into a loss.
    passed = bound >= -margin - 1e-9
    return Check(
        f"not worse than {than}", passed, bound, 0.0 - margin,
        f"{mean * 100:+.2f} points {what}, between {lower * 100:+.2f} and {upper * 100:+.2f} "
        f"with 95 % confidence; at most {_points(margin)} may be lost",
    )  # fmt: skip


def _at_least(name: str, measured: float | None, limit: float, of: str) -> Check:
    if measured is None:
        return Check(name, False, None, limit, f"not measured; at least {_percent(limit)} are asked for")
    sentence = f"{_percent(measured)} {of}; at least {_percent(limit)} are asked for"
    return Check(name, bool(measured >= limit), measured, limit, sentence)


def _in_time(measured: float | None, limit: float) -> Check:
    if measured is None:
        return Check("latency", False, None, limit, f"not measured; at most {limit:g} ms are allowed")
    sentence = f"a classification takes {measured:.3g} ms; at most {limit:g} ms are allowed"
    return Check("latency", bool(measured <= limit), measured, limit, sentence)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    return f"{100 * share:g} points"
