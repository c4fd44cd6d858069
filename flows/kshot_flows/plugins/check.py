"""Runs the conformance kit on one learner; reports failures with the line of the author's code and a remedy."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from kshot import plugins, testing
from kshot.learner import Learner, LearnerConfig
from kshot.recipe import set_value
from kshot.testing import Check, Subject
from kshot_flows import recipes
from kshot_runtime.errors import KshotError


@dataclass(frozen=True)
class Failure:
    """Why a check failed."""

    what: str
    where: str = ""  # line of the author's code, if known
    advice: str = field(default="", compare=False)


@dataclass(frozen=True)
class Outcome:
    """The result of a check: the failure, or why the learner is exempt, or neither; and its duration."""

    failure: Failure | None
    exempt: str | None
    seconds: float


def subject(name: str, settings: Sequence[str], folder: Path) -> Subject:
    """The learner `name` with settings such as "steps=2"; a KshotError if either is invalid.

    "norm=group" selects the backbone's norm, and then only this norm is checked.
    """
    found = plugins.find()
    if not any(one.name == name for one in found.of("learners")):
        _refuse(name, found)
    learner = found.learner(name).value
    if not (isinstance(learner, type) and issubclass(learner, Learner)):
        raise KshotError(f"kshot_learners gives {name!r} as {learner!r}; it must be a subclass of kshot.Learner.")
    if not issubclass(learner.Config, LearnerConfig):
        raise KshotError(f"the Config of {name!r} must derive from kshot.LearnerConfig, as a class in the learner.")
    options: dict[str, Any] = {}
    for key, text in recipes.changes(settings).items():
        set_value(options, key, text)
    if "name" in options:
        raise KshotError("name=... is no setting of a learner: it chooses one, and is the command's argument.")
    norm = options.pop("norm", None)
    chosen = Subject(name, folder, options, norm)
    chosen.recipe.check()
    return chosen


def promise(check: Check) -> str:
    """The promise that a check tests, as a sentence."""
    return _paragraphs(check)[0]


def run(check: Check, subject: Subject) -> Outcome:
    """Run one check on the learner."""
    started, failure, exempt = time.perf_counter(), None, None
    try:
        exempt = check(subject)
    except (Exception, SystemExit) as error:  # the learner's code may raise anything
        failure = _explained(error, check, plugins.find().learner(subject.name).value)
    return Outcome(failure, exempt, time.perf_counter() - started)


def _explained(error: BaseException, check: Check, learner: type[Learner]) -> Failure:
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    advice = " ".join(_paragraphs(check)[1:])
    said = "; ".join([str(error), *getattr(error, "__notes__", [])])
    if isinstance(error, AssertionError) and innermost.f_globals["__package__"] == testing.__name__:
        return Failure(said, advice=advice)
    where = plugins.place(error, learner.__module__)
    if isinstance(error, KshotError):  # it says what to do
        return Failure(said, where)
    if "does not require grad" in str(error):
        advice = "Adapting takes its gradients with kshot.gradient: torch's own are switched off then."
    return Failure(f"{type(error).__name__}: {said}".removesuffix(": "), where, advice)


def _paragraphs(check: Check) -> list[str]:
    return [" ".join(part.split()) for part in (inspect.getdoc(check) or check.__name__).split("\n\n")]


def _refuse(name: str, found: plugins.Found) -> NoReturn:
    """Raise an error that says what `name` is, if it is not a learner."""
    for broken in found.broken:
        if broken.plugin == name:
            where = f"\n{broken.where}" if broken.where else ""
            raise KshotError(
                f"plugin {name!r} of {broken.distribution} {broken.version} does not load: {broken.reason}{where}"
            )
    if any(one.name == name for one in found.of("backbones")):
        raise KshotError(
            f"{name!r} is a backbone, and the kit is for learners. A recipe tries it for real, export included: "
            f"kshot run glyphs-protonet backbone.name={name}"
        )
    if any(one.name == name for one in found.of("datasets")):
        raise KshotError(
            f"{name!r} is a source of data, and the kit is for learners. Try it: kshot data import {name} {name}"
        )
    found.learner(name)
    raise AssertionError("unreachable")
