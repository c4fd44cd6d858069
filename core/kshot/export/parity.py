"""Do the graphs do what torch does? The checks that a bundle has passed before it is called one.

Gradient descent amplifies rounding: two right answers in float32 can end far apart, for torch as for ONNX. So both are
compared with torch in float64, over several episodes, and the graphs must come as near to it as torch's own float32.
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

AGREEMENT = 0.999  # share of queries that torch and the graphs must put into the same class
PRECISE = 1e-5  # as near to float64 as float32 need come, relative to the scale
SLACK = 10  # how many times further from float64 than torch's own float32 is still its like
COMPARED = 12  # episodes compared with float64; their median is judged
EMBEDDED = 12  # images whose features are compared with float64
MOST_IMAGES = 1000  # of those that episodes are drawn from where the graphs embed each by itself: it bounds the time
GROSS = 1e-3  # a size that was baked in shows as more than this

# Support images of each class, queries, steps: sizes other than the traced ones, uneven, smallest and large.
SIZES: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((1,), 1, 1),
    ((1, 3), 1, 0),
    ((1, 1, 1), 2, 1),
    ((2, 1, 4, 1, 3), 9, 2),
    ((6,) * 20, 17, 1),
)


@dataclass(frozen=True)
class Problem:
    """Something to adapt to and to classify: images in bytes, or features."""

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
        """Images of a class, on average."""
        return len(self.labels) / len(self.classes)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        support, query = (
            torch.from_numpy(given).to(dtype) / (255 if given.dtype == np.uint8 else 1)
            for given in (self.support, self.query)
        )
        return support, torch.from_numpy(self.labels), torch.from_numpy(self.classes), query


Answer = tuple[State, Tensor]
"""What a problem gave: the state, and the logits (Q, W)."""


def check_learner(learner: Learner, images: ClassImages, shape: Shape, *, seed: int) -> None:
    """Refuse a learner that changes while it adapts or classifies, or answers by chance."""
    problem = Problem.of(sample_episodes(images, shape, 1, seed=seed, step=0, stream="test")[0])
    before = {name: tensor.clone() for name, tensor in tensors(learner).items()}
    state, logits = _torch(learner, problem)
    again, logits_again = _torch(learner, problem)
    after = tensors(learner)
    if changed := [name for name in after if name not in before or not torch.equal(before[name], after[name])]:
        raise ExportError(
            f"{learner.name!r} changes {_some(changed)} while it adapts or classifies, and a graph remembers nothing. "
            "Put what adapting learns into the state (for statistics of the support set, the norm 'support' does it)."
        )
    if _difference(logits, logits_again) > GROSS or any(_difference(state[n], again[n]) > GROSS for n in state):
        raise ExportError(f"{learner.name!r} gives another answer each time. Draw nothing at random while adapting.")
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
    """Run both on the same episodes; the figures, or an ExportError that says which check failed."""
    _check_weights(learner)
    precise, backbone = deepcopy(learner).double(), learner.backbone
    served = Served(graphs, backbone.image, backbone.features, backbone.norm, partial(_steps, learner))
    theirs = images
    if isinstance(images, ClassFeatures):
        _check_embed(learner, precise, graphs, images.images)
        images = images.limited(max(shape.shots + shape.queries, MOST_IMAGES // len(images)))
        images = images.with_protocol("random photos")
        served.backbone.mirrors = backbone.mirrors
        theirs = ClassFeatures(images, served.backbone, store)
    check_learner(learner, images, shape, seed=seed)
    _check_sizes(learner, precise, graphs, images, seed=seed)
    batch = sample_episodes(images, shape, COMPARED, seed=seed, step=0, stream="test")
    problems = [Problem.of(episode) for episode in batch]
    one, torch_one = _precision("the state after one step", learner, precise, graphs, problems, 1, _state_difference)
    all_, torch_all = _precision("the logits", learner, precise, graphs, problems, None, _logit_difference)
    right, torch_right, agreed, furthest = [], [], [], 0.0
    both = (answers(who, given, shape, episodes, seed=seed) for who, given in ((learner, images), (served, theirs)))
    for (episode, logits), (_, found) in zip(*both, strict=True):
        _check_finite(learner, found, logits)
        furthest = max(furthest, float((found - logits).abs().max()))
        ours, torchs = found.argmax(1), logits.argmax(1)
        right.append(float((ours == episode.query_labels).double().mean()))
        torch_right.append(float((torchs == episode.query_labels).double().mean()))
        same = ours == torchs
        if not same.all():  # of two answers that rounding parts, the one that float64 gives is no disagreement
            same |= ours == _torch(precise, Problem.of(episode))[1].argmax(1)
        agreed.append(float(same.double().mean()))
    parity = Parity(
        episodes=episodes,
        accuracy=float(np.mean(right)),
        torch_accuracy=float(np.mean(torch_right)),
        agreement=float(np.mean(agreed)),
        logit_difference=furthest,
        step_difference=one,
        torch_step_difference=torch_one,
        float64_difference=all_,
        torch_float64_difference=torch_all,
    )
    if parity.agreement < AGREEMENT:
        raise ExportError(
            f"the graphs of {learner.name!r} agree with torch on {100 * parity.agreement:.2f} % of the queries of "
            f"{episodes} episodes ({shape}); {100 * AGREEMENT} % are needed. Accuracy {100 * parity.accuracy:.2f} % "
            f"against {100 * parity.torch_accuracy:.2f} %, logits up to {furthest:.2g} apart; from float64 the "
            f"graphs are {all_:.1g} away and torch's float32 {torch_all:.1g}. If those two are alike, the "
            "inner loop amplifies rounding: use fewer steps or a lower rate."
        )
    return parity


def _check_weights(learner: Learner) -> None:
    if bad := [name for name, tensor in tensors(learner).items() if not tensor.isfinite().all()]:
        raise ExportError(f"{learner.name!r} holds NaN or infinity in {_some(bad)}: it has not been trained well")


def _check_embed(learner: Learner, precise: Learner, graphs: Graphs, images: ClassImages) -> None:
    """The features of some images, against float64; and of one alone, since the graph must take any number."""
    classes = np.linspace(0, len(images) - 1, EMBEDDED).astype(int)
    pixels = images.gather(classes, np.arange(EMBEDDED) % images.counts[classes])
    floats = torch.from_numpy(pixels) / 255
    with torch.no_grad():
        exact, single = precise.embed(floats.double()), learner.embed(floats)
    found = np.concatenate([graphs.embed(pixels[:1]), graphs.embed(pixels[1:])])
    error, rounding = _difference(torch.from_numpy(found), exact), _difference(single, exact)
    if not error <= max(GROSS, SLACK * rounding):
        raise ExportError(
            f"embed of {learner.name!r}: the graph's features are {error:.2g} away from float64, and torch's own "
            f"float32 {rounding:.2g}. The export of some operation of the backbone is inexact or wrong."
        )


def _check_sizes(learner: Learner, precise: Learner, graphs: Graphs, images: ClassImages, *, seed: int) -> None:
    """Other numbers of images, classes, queries and steps than the traced ones, each by the best of three draws."""
    for counts, queries, steps in SIZES:
        what = f"{sum(counts)} support images of {len(counts)} classes, {queries} queries and {steps} steps"
        nearest = np.inf
        for attempt in range(3):  # a decision that flips on rounding does so once; a wrong graph is always wrong
            problem = _draw(images, counts, queries, np.random.default_rng([seed, attempt, len(counts)]))
            exact, single = _torch(precise, problem, steps), _torch(learner, problem, steps)
            try:
                found = _graphs(graphs, problem, steps)
            except BundleError as failure:
                raise ExportError(
                    f"the graphs of {learner.name!r} do not run for {what}: the code holds for some sizes only. "
                    f"Classes may have different numbers of images, in any order. {str(failure)[:300]}"
                ) from None
            if [tuple(t.shape) for t in (*found[0].values(), found[1])] != [
                tuple(t.shape) for t in (*(single[0][name] for name in found[0]), single[1])
            ]:
                nearest = np.inf
                continue
            _check_finite(learner, found[1], single[1])
            error = max(_state_difference(found, exact), _logit_difference(found, exact))
            rounding = max(_state_difference(single, exact), _logit_difference(single, exact))
            nearest = min(nearest, error)
            if error <= max(GROSS, SLACK * rounding):
                break
        else:
            raise ExportError(
                f"the graphs of {learner.name!r} are wrong for {what}: {nearest:.2g} away from torch. The code takes "
                "another way there than for the sizes at which it was traced; keep `if` and `int()` off sizes."
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
    """Median distance from float64 over the problems: of the graphs, and of torch's float32."""
    ours, torchs = [], []
    for problem in problems:
        exact = _torch(precise, problem, steps)
        taken = _steps(learner, problem.shots) if steps is None else steps
        ours.append(difference(_graphs(graphs, problem, taken), exact))
        torchs.append(difference(_torch(learner, problem, steps), exact))
    distance, rounding = float(np.median(ours)), float(np.median(torchs))
    if not distance <= max(PRECISE, SLACK * rounding):
        raise ExportError(
            f"{what} of {learner.name!r}: the graphs are {distance:.2g} away from float64 (median of {len(problems)} "
            f"episodes), and torch's own float32 {rounding:.2g}. The export of some operation is inexact or wrong."
        )
    return distance, rounding


@torch.no_grad()
def _torch(learner: Learner, problem: Problem, steps: int | None = None) -> Answer:
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
            "Make constants like the data: x.new_zeros(...), value.to(x.dtype)."
        ) from error


def _graphs(graphs: Graphs, problem: Problem, steps: int | None) -> Answer:
    state = graphs.adapt(problem.support, problem.labels, problem.classes, steps)
    logits = graphs.logits(state, problem.query)
    return {name: torch.from_numpy(value) for name, value in state.items()}, torch.from_numpy(logits)


def _steps(learner: Learner, shots: float) -> int | None:
    return learner.steps_for(shots) if isinstance(learner, InnerLoop) else None


def _draw(images: ClassImages, counts: tuple[int, ...], queries: int, random: np.random.Generator) -> Problem:
    """Any images under any labels: ids far from 0..W-1, mixed, and a different number of images for each."""
    total = sum(counts) + queries
    which = random.integers(len(images), size=total)
    pixels = images.gather(which, random.integers(images.counts[which]))  # (S + Q, C, H, W)
    ids = random.choice(1000, size=len(counts), replace=False)
    labels = random.permutation(np.repeat(ids, counts))
    return Problem(pixels[: len(labels)], labels, ids, pixels[len(labels) :])


def _state_difference(a: Answer, b: Answer) -> float:
    return max(_difference(value, b[0][name]) for name, value in a[0].items())  # the graphs hand on what is used


def _logit_difference(a: Answer, b: Answer) -> float:
    return _difference(a[1], b[1])


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two entries, relative to the largest of b where that is over 1."""
    if not b.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1))


def _check_finite(learner: Learner, found: Tensor, expected: Tensor) -> None:
    for who, logits in (("torch", expected), ("the graphs", found)):
        if not logits.isfinite().all():
            raise ExportError(f"{learner.name!r} gives NaN or infinity for some queries, in {who}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
