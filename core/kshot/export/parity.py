"""Compares the graphs of a bundle with torch; an export fails unless they agree.

Gradient descent amplifies rounding, so correct float32 results can differ much. Both torch in float32 and the graphs
are therefore compared with torch in float64, over several episodes; their errors must be of the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kshot.data.datasets import ClassImages
from kshot.data.embeddings import ClassFeatures
from kshot.data.episodes import Episode, Shape, sample_episodes
from kshot.evaluation.scores import answers
from kshot.export.served import Served, to_bytes
from kshot.export.trace import ExportError, tensors
from kshot.learner import InnerLoop, Learner, State
from kshot_runtime.bundle import Graphs
from kshot_runtime.manifest import BundleError, Parity

MIN_AGREEMENT = 0.999  # share of queries for which torch and the graphs must predict the same class
FLOAT32_ERROR = 1e-5  # error against float64, relative to the scale, that is always allowed
MAX_ERROR_RATIO = 10  # largest allowed ratio of the graphs' error to that of torch in float32
PRECISION_EPISODES = 12  # episodes compared with float64; their median error counts
PRECISION_IMAGES = 12  # images whose features are compared with float64
MAX_IMAGES = 1000  # images to draw episodes from if the graphs embed images separately; it bounds the time
GROSS_ERROR = 1e-3  # a wrong graph, such as one with a constant in place of a size, differs by more than this

# Support images of each class, queries, inner steps: uneven, smallest and large, and not those of tracing.
SIZES: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((1,), 1, 1),
    ((1, 3), 1, 0),
    ((1, 1, 1), 2, 1),
    ((2, 1, 4, 1, 3), 9, 2),
    ((6,) * 20, 17, 1),
)


@dataclass(frozen=True)
class Problem:
    """An episode as arrays: uint8 images, or features."""

    support: np.ndarray  # (S, C, H, W) uint8, or (S, D) float32
    labels: np.ndarray  # (S,)
    classes: np.ndarray  # (W,)
    query: np.ndarray  # (Q, C, H, W), or (Q, D)

    @classmethod
    def of(cls, episode: Episode) -> Problem:
        return cls(
            to_bytes(episode.support), episode.support_labels.numpy(), episode.classes.numpy(), to_bytes(episode.query)
        )

    @property
    def shots(self) -> float:
        """Mean number of support images of a class."""
        return len(self.labels) / len(self.classes)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        support, query = (
            torch.from_numpy(given).to(dtype) / (255 if given.dtype == np.uint8 else 1)
            for given in (self.support, self.query)
        )
        return support, torch.from_numpy(self.labels), torch.from_numpy(self.classes), query


Answer = tuple[State, Tensor]
"""The results for a problem: the state, and the logits (Q, W)."""


def check_learner(learner: Learner, images: ClassImages, shape: Shape, *, seed: int) -> None:
    """An ExportError if the learner changes while it adapts or classifies, or is not deterministic."""
    problem = Problem.of(sample_episodes(images, shape, 1, seed=seed, step=0, stream="test")[0])
    before = {name: tensor.clone() for name, tensor in tensors(learner).items()}
    state, logits = _run_torch(learner, problem)
    again, logits_again = _run_torch(learner, problem)
    after = tensors(learner)
    if changed := [name for name in after if name not in before or not torch.equal(before[name], after[name])]:
        raise ExportError(
            f"{learner.name!r} changes {_listed(changed)} while it adapts or classifies; a graph has no memory. "
            "Return what adapting learns in the state (norm 'support' does so for statistics of the support set)."
        )
    pairs = (logits, logits_again), *((state[name], again[name]) for name in state)
    if any(_difference(*pair) > GROSS_ERROR for pair in pairs):
        raise ExportError(f"{learner.name!r} gives other results each time. Use no random numbers while adapting.")
    if logits.shape != (expected := (len(problem.query), len(problem.classes))):
        raise ExportError(f"classify of {learner.name!r} gives {tuple(logits.shape)}; (Q, W) is {expected} here")


def compare(
    learner: Learner,
    graphs: Graphs,
    images: ClassImages,
    shape: Shape,
    *,
    seed: int,
    episodes: int = 100,
    store: Path | None = None,
) -> Parity:
    """Run torch and the graphs on the same episodes; the comparison, or an ExportError that names the failed check."""
    _check_weights(learner)
    precise, backbone = deepcopy(learner).double(), learner.backbone
    served = Served(graphs, backbone.image, backbone.features, backbone.norm, partial(_steps, learner))
    served_images = images
    if isinstance(images, ClassFeatures):
        _check_embed(learner, precise, graphs, images.images)
        images = images.limited(max(shape.shots + shape.queries, MAX_IMAGES // len(images)))
        images = images.with_protocol("random photos")
        served.backbone.mirrors = backbone.mirrors
        served_images = ClassFeatures(images, served.backbone, store)
    check_learner(learner, images, shape, seed=seed)
    _check_sizes(learner, precise, graphs, images, seed=seed)
    batch = sample_episodes(images, shape, PRECISION_EPISODES, seed=seed, step=0, stream="test")
    problems = [Problem.of(episode) for episode in batch]
    step_error, torch_step_error = _precision(
        "the state after one step", learner, precise, graphs, problems, 1, _state_difference
    )
    error, torch_error = _precision("the logits", learner, precise, graphs, problems, None, _logit_difference)
    right, torch_right, agreed, logit_difference = [], [], [], 0.0
    pairs = ((learner, images), (served, served_images))
    both = (answers(one, given, shape, episodes, seed=seed) for one, given in pairs)
    for (episode, torch_logits), (_, logits) in zip(*both, strict=True):
        _check_finite(learner, logits, torch_logits)
        logit_difference = max(logit_difference, float((logits - torch_logits).abs().max()))
        predicted, torch_predicted = logits.argmax(1), torch_logits.argmax(1)
        right.append(float((predicted == episode.query_labels).double().mean()))
        torch_right.append(float((torch_predicted == episode.query_labels).double().mean()))
        same = predicted == torch_predicted
        if not same.all():  # agreeing with float64 counts too: then float32 torch is off by rounding
            same |= predicted == _run_torch(precise, Problem.of(episode))[1].argmax(1)
        agreed.append(float(same.double().mean()))
    parity = Parity(
        episodes=episodes,
        accuracy=float(np.mean(right)),
        torch_accuracy=float(np.mean(torch_right)),
        agreement=float(np.mean(agreed)),
        logit_difference=logit_difference,
        step_difference=step_error,
        torch_step_difference=torch_step_error,
        float64_difference=error,
        torch_float64_difference=torch_error,
    )
    if parity.agreement < MIN_AGREEMENT:
        raise ExportError(
            f"the graphs of {learner.name!r} agree with torch on {100 * parity.agreement:.2f} % of the queries of "
            f"{episodes} episodes ({shape}), less than {100 * MIN_AGREEMENT} %. Accuracy {100 * parity.accuracy:.2f} % "
            f"against {100 * parity.torch_accuracy:.2f} %, logits differ by up to {logit_difference:.2g}; the error "
            f"against float64 is {error:.1g}, and that of torch in float32 {torch_error:.1g}. If these are similar, "
            "the inner loop amplifies rounding: use fewer steps or a lower rate."
        )
    return parity


def _check_weights(learner: Learner) -> None:
    if bad := [name for name, tensor in tensors(learner).items() if not tensor.isfinite().all()]:
        raise ExportError(f"{learner.name!r} has NaN or infinity in {_listed(bad)}: its training diverged")


def _check_embed(learner: Learner, precise: Learner, graphs: Graphs, images: ClassImages) -> None:
    """Compare the features of some images with float64, one of them embedded alone."""
    classes = np.linspace(0, len(images) - 1, PRECISION_IMAGES).astype(int)
    pixels = images.gather(classes, np.arange(PRECISION_IMAGES) % images.counts[classes])
    floats = torch.from_numpy(pixels) / 255
    with torch.no_grad():
        exact, float32 = precise.embed(floats.double()), learner.embed(floats)
    found = np.concatenate([graphs.embed(pixels[:1]), graphs.embed(pixels[1:])])
    error, torch_error = _difference(torch.from_numpy(found), exact), _difference(float32, exact)
    if not error <= max(GROSS_ERROR, MAX_ERROR_RATIO * torch_error):
        raise ExportError(
            f"embed of {learner.name!r}: the graph's features differ from float64 by {error:.2g}, torch's in float32 "
            f"by {torch_error:.2g}. The export of some operation of the backbone is inexact or wrong."
        )


def _check_sizes(learner: Learner, precise: Learner, graphs: Graphs, images: ClassImages, *, seed: int) -> None:
    """Compare on other numbers of images, classes, queries and steps than traced; the best of three draws counts."""
    for counts, queries, steps in SIZES:
        what = f"{sum(counts)} support images of {len(counts)} classes, {queries} queries and {steps} steps"
        smallest = np.inf
        for attempt in range(3):  # rounding may flip a decision in one draw; a wrong graph is wrong in all
            problem = _draw(images, counts, queries, np.random.default_rng([seed, attempt, len(counts)]))
            exact, float32 = _run_torch(precise, problem, steps), _run_torch(learner, problem, steps)
            try:
                found = _run_graphs(graphs, problem, steps)
            except BundleError as failure:
                raise ExportError(
                    f"the graphs of {learner.name!r} do not run for {what}: the code works for some sizes only. "
                    f"Classes may have different numbers of images, in any order. {str(failure)[:300]}"
                ) from None
            if [tuple(t.shape) for t in (*found[0].values(), found[1])] != [
                tuple(t.shape) for t in (*(float32[0][name] for name in found[0]), float32[1])
            ]:
                smallest = np.inf
                continue
            _check_finite(learner, found[1], float32[1])
            error = max(_state_difference(found, exact), _logit_difference(found, exact))
            torch_error = max(_state_difference(float32, exact), _logit_difference(float32, exact))
            smallest = min(smallest, error)
            if error <= max(GROSS_ERROR, MAX_ERROR_RATIO * torch_error):
                break
        else:
            raise ExportError(
                f"the graphs of {learner.name!r} are wrong for {what}: they differ from torch by {smallest:.2g}. The "
                "code does something else for these sizes than for the traced ones; use no `if` or `int()` on sizes."
            )


def _precision(
    what: str,
    learner: Learner,
    precise: Learner,
    graphs: Graphs,
    problems: list[Problem],
    steps: int | None,
    difference: Callable[[Answer, Answer], float],
) -> tuple[float, float]:
    """Median differences from float64 over the problems: those of the graphs, and of torch in float32."""
    errors, torch_errors = [], []
    for problem in problems:
        exact = _run_torch(precise, problem, steps)
        taken = _steps(learner, problem.shots) if steps is None else steps
        errors.append(difference(_run_graphs(graphs, problem, taken), exact))
        torch_errors.append(difference(_run_torch(learner, problem, steps), exact))
    error, torch_error = float(np.median(errors)), float(np.median(torch_errors))
    if not error <= max(FLOAT32_ERROR, MAX_ERROR_RATIO * torch_error):
        raise ExportError(
            f"{what} of {learner.name!r}: the graphs differ from float64 by {error:.2g} (median of {len(problems)} "
            f"episodes), torch in float32 by {torch_error:.2g}. The export of some operation is inexact or wrong."
        )
    return error, torch_error


@torch.no_grad()
def _run_torch(learner: Learner, problem: Problem, steps: int | None = None) -> Answer:
    dtype = next((p.dtype for p in learner.parameters()), torch.float32)
    support, labels, classes, query = problem.tensors(dtype)
    try:
        if isinstance(learner, InnerLoop):
            state = learner.adapt(support, labels, classes, steps)
        else:
            state = learner.adapt(support, labels, classes)
        return {name: tensor.detach() for name, tensor in state.items()}, learner.classify(state, query)
    except RuntimeError as error:
        if dtype != torch.float64:
            raise
        raise ExportError(
            f"{learner.name!r} does not run in float64, with which the graphs are compared: {error}. "
            "Give constants the dtype of the data: x.new_zeros(...), value.to(x.dtype)."
        ) from error


def _run_graphs(graphs: Graphs, problem: Problem, steps: int | None) -> Answer:
    state = graphs.adapt(problem.support, problem.labels, problem.classes, steps)
    logits = graphs.logits(state, problem.query)
    return {name: torch.from_numpy(value) for name, value in state.items()}, torch.from_numpy(logits)


def _steps(learner: Learner, shots: float) -> int | None:
    return learner.steps_for(shots) if isinstance(learner, InnerLoop) else None


def _draw(images: ClassImages, counts: tuple[int, ...], queries: int, random: np.random.Generator) -> Problem:
    """A problem of random images with random labels: class ids other than 0..W-1, each with `counts` images."""
    total = sum(counts) + queries
    which = random.integers(len(images), size=total)
    pixels = images.gather(which, random.integers(images.counts[which]))  # (S + Q, C, H, W)
    ids = random.choice(1000, size=len(counts), replace=False)
    labels = random.permutation(np.repeat(ids, counts))
    return Problem(pixels[: len(labels)], labels, ids, pixels[len(labels) :])


def _state_difference(a: Answer, b: Answer) -> float:
    return max(_difference(value, b[0][name]) for name, value in a[0].items())  # the graphs return only what is used


def _logit_difference(a: Answer, b: Answer) -> float:
    return _difference(a[1], b[1])


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, divided by the largest absolute value of b if that is over 1."""
    if not b.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1))


def _check_finite(learner: Learner, found: Tensor, expected: Tensor) -> None:
    for where, logits in (("torch", expected), ("the graphs", found)):
        if not logits.isfinite().all():
            raise ExportError(f"{learner.name!r} gives NaN or infinity for some queries, in {where}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
