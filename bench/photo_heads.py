"""Heads on frozen features of photographs: accuracy, unknown classes, calibration and cost, on the same episodes.

    python bench/photo_heads.py DATA [fruit coins emoji-4v mini-imagenet omniglot mnist] [--cache DIR]
    python bench/photo_heads.py DATA --report

DATA holds a folder for each data set, with its archives. The backbone is efficientnet-lite0, frozen; its features are
cached, by default in a temporary folder, as are selected heads. Classes are split in two: statistics and
all settings come from the base classes, by the folds of `kshot learn`, and episodes from the test classes, the same
for every head.
Results of each data set are written when measured, and `--report` combines those that exist: it writes
bench/results/photo_heads.json, the tables of docs/photographs.md between their markers, and its pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbone_speed import machine
from matplotlib.figure import Figure
from torch import Tensor

from kshot import malloc
from kshot.backbones import Backbone
from kshot.data.datasets import ClassImages, ImageSet
from kshot.data.embeddings import ClassFeatures
from kshot.data.episodes import Shape
from kshot.data.importing import finish, import_dataset
from kshot.evaluation.calibration import Calibration, Trial, calibrate
from kshot.evaluation.scores import evaluate
from kshot.evaluation.statistics import auroc, calibration_error, interval
from kshot.learner import FeatureLearner
from kshot.recipe import LearnerSettings, PluginSettings, Recipe
from kshot.selection import Tried, choose, folds_of, select, trials
from kshot_plugins.whitening import WhitenedSpace
from kshot_runtime.bundle import evidence

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "photo_heads.json"
DOCS = HERE.parent / "docs" / "photographs.md"
HEADS = ("cosine", "simpleshot", "ridge", "finetune", "whitened", "plda")
KINDS = ("last", "stages", "inner")
EPISODES, CALIBRATION_EPISODES, QUERIES, MOST_UNKNOWN = 300, 100, 5, 20
PASSING = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
RANDOM, ACROSS = "random photos", "across groups"
PROTOCOLS = {"random": RANDOM, "across": ACROSS}
SHOWN = {"fruit": ACROSS, "coins": ACROSS, "emoji-4v": RANDOM}  # in the pictures
COLOURS = {"cosine": "#9aa5b1", "finetune": "#e0a458", "whitened": "#5b8fd9", "plda": "#1f4e9e"}


@dataclass(frozen=True)
class Photos:
    """A data set: its source, its base and test classes, and its episode sizes."""

    source: str  # an archive in its folder, or empty for a named source of kshot
    shapes: tuple[Shape, ...] = (Shape(5, 1, QUERIES), Shape(5, 5, QUERIES))
    base: int | None = None  # of the shuffled classes; half if None
    splits: tuple[str, str] | None = None  # splits of base and of test classes, if the data set defines them
    groups: bool = False  # whether file names begin with train_ or test_: another visit, other coins
    most: tuple[int, int] = (10_000, 10_000)  # maximal numbers of classes per split, and of images per class

    @property
    def protocols(self) -> tuple[str, ...]:
        return (RANDOM, ACROSS) if self.groups else (RANDOM,)


SETS = {
    "fruit": Photos("fruit.zip", groups=True),
    "coins": Photos("coins.zip", (Shape(4, 1, QUERIES), Shape(4, 5, QUERIES)), base=3, groups=True),
    "emoji-4v": Photos("emoji-4v.zip", (Shape(5, 1, 3), Shape(20, 1, 3)), base=300),
    "mini-imagenet": Photos("", splits=("val", "test"), most=(20, 40)),
    "omniglot": Photos("", splits=("val", "test"), most=(50, 20)),
    "mnist": Photos("", splits=None, most=(10, 100)),
}


@dataclass(frozen=True)
class Draw:
    """An episode, as indices into the photos of the test classes."""

    support: np.ndarray  # class by class
    labels: np.ndarray
    queries: np.ndarray
    truth: np.ndarray
    unknown: np.ndarray


class Classes:
    """Base and test classes of a data set, as pixels and as features of each kind."""

    def __init__(self, name: str, data: Path, cache: Path) -> None:
        self.name, self.photos, self.cache = name, SETS[name], cache
        if not (cache / name).exists():
            own = {"rule": {"size": 224, "fit": "crop", "resize": "bicubic"}} if self.photos.source else {}
            finish(
                import_dataset(
                    str(data / name / self.photos.source) if self.photos.source else name, name, cache,
                    from_dir=None if self.photos.source else data / name,
                    split="test" if name == "mnist" else None,
                    group_by="{visit}_*" if self.photos.groups else None,
                    allow_leaks=True, **own,
                )
            )  # fmt: skip
        packed = ImageSet.open(cache / name)
        every = packed.split("+".join(packed.splits))
        entries = {entry.name: entry for entry in packed.classes}
        base, test = self._split(packed, every)
        most = self.photos.most[1]
        self.base, self.test = every.only(base).limited(most), every.only(test).limited(most)
        files = [entries[n] for n in self.test.names]
        self.visits = [
            np.array([packed.index.files[e.start + i].group or "" for i in range(min(e.count, most))]) for e in files
        ]

    def _split(self, packed: ImageSet, every: ClassImages) -> tuple[np.ndarray, np.ndarray]:
        random, split_of = np.random.default_rng(1), {entry.name: entry.split for entry in packed.classes}
        if splits := self.photos.splits:
            parts = [np.flatnonzero([split_of[name] == split for name in every.names]) for split in splits]
            return tuple(random.permutation(part)[: self.photos.most[0]] for part in parts)
        order = np.argsort(every.names)[random.permutation(len(every))]
        count = self.photos.base or len(order) // 2
        return order[:count], order[count:]

    @cached_property
    def bodies(self) -> dict[str, Backbone]:
        """The backbone, once per kind of features."""
        return {kind: recipe("cosine", kind).build_backbone(self.base.shape) for kind in KINDS}

    @cached_property
    def features(self) -> dict[str, tuple[ClassFeatures, ClassFeatures]]:
        """Features of base and test classes, of each kind."""
        store = self.cache / "embeddings"
        return {
            kind: (ClassFeatures(self.base, body, store).complete(), ClassFeatures(self.test, body, store).complete())
            for kind, body in self.bodies.items()
        }

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """Features (N, D) of all photos of the test classes, ordered by class."""
        return {kind: torch.cat([*test.by_class]) for kind, (_, test) in self.features.items()}

    def draws(self, shape: Shape, protocol: str, episodes: int, seed: int = 0) -> list[Draw]:
        """The episodes; across groups, support is from `train` and queries from `test` files."""
        random, across, found = np.random.default_rng(seed), protocol == ACROSS, list[Draw]()
        starts = np.cumsum(self.test.counts) - self.test.counts
        for _ in range(episodes):
            support, queries, unknown = [], [], []
            chosen = random.permutation(len(starts))[: shape.ways + MOST_UNKNOWN]
            for place, klass in enumerate(chosen):
                order = random.permutation(int(self.test.counts[klass]))
                visit = self.visits[klass][order]
                first = order[visit == "train"] if across else order
                later = order[visit == "test"] if across else order[shape.shots :]
                later = starts[klass] + later[: shape.queries]
                if place < shape.ways:
                    support.append(starts[klass] + first[: shape.shots])
                    queries.append(later)
                else:
                    unknown.append(later)
            found.append(
                Draw(
                    np.concatenate(support), np.repeat(np.arange(shape.ways), [len(part) for part in support]),
                    np.concatenate(queries), np.repeat(np.arange(shape.ways), [len(part) for part in queries]),
                    np.concatenate([np.empty(0, np.int64), *unknown]).astype(np.int64),
                )
            )  # fmt: skip
        return found


def recipe(head: str, kind: str) -> Recipe:
    """The recipe of `kshot learn` with one head and one kind of features."""
    return LEARN.model_copy(
        update={
            "learner": LearnerSettings(name=head),
            "backbone": PluginSettings(name="efficientnet-lite0", features=kind, frozen=True),
        }
    )


LEARN = Recipe.load(HERE.parent / "flows" / "recipes" / "photos.toml")


@torch.no_grad()
def play(head: FeatureLearner, table: Tensor, draws: Sequence[Draw]) -> dict[str, Any]:
    """Evaluate a head: the accuracy of each episode, and the scores of known and unknown queries."""
    if isinstance(head, WhitenedSpace) and getattr(
        head.config, "whiten", True
    ):  # transform all rows once, for all episodes
        table, head = head.space(table), copy.copy(head)
        head.space = lambda rows: rows
    accuracies, known, unknown, right = [], [], [], []
    for draw in draws:
        labels = torch.from_numpy(draw.labels)
        state = head.fit(table[draw.support], labels, torch.unique(labels))
        rows = table[np.concatenate([draw.queries, draw.unknown])]
        given = {"logits": head.logits(state, rows), **head.evidence(state, rows)}
        count = len(draw.queries)
        right.append(given["logits"][:count].argmax(1).numpy() == draw.truth)
        accuracies.append(right[-1].mean())
        known.append({name: value[:count].numpy() for name, value in given.items()})
        unknown.append({name: value[count:].numpy() for name, value in given.items()})
    return {
        "accuracies": np.array(accuracies), "right": np.concatenate(right),
        "known": _joined(known), "unknown": _joined(unknown),
    }  # fmt: skip


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def calibrated(head: FeatureLearner, base: ClassFeatures, shape: Shape) -> Calibration:
    """Temperature and score for unknown photos, calibrated on the base classes as by `kshot learn`."""
    parts: list[Trial] = [(head, base)]
    if head.closed_form:
        parts = trials(head, folds_of(base, 2, LEARN.seed))
    fewest, photos = min(len(images) for _, images in parts), int(base.counts.min())
    shots = min(shape.shots, photos - 1)
    size = Shape(min(shape.ways, max(2, fewest - 1)), shots, min(shape.queries, photos - shots))
    return calibrate(parts, size, CALIBRATION_EPISODES, seed=0, seen=(head, base) if head.closed_form else None)


def figures(head: FeatureLearner, table: Tensor, base: ClassFeatures, shape: Shape, draws: Sequence[Draw],
            baseline: np.ndarray | None = None) -> dict[str, Any]:  # fmt: skip
    """The results of a head, and the accuracies of its episodes."""
    fit = calibrated(head, base, shape)
    played = play(head, table, draws)
    accuracies, inside, outside = played["accuracies"], played["known"], played["unknown"]
    confidences = torch.from_numpy(inside["logits"] / fit.temperature).softmax(1).amax(1).numpy()
    found: dict[str, Any] = {"ways": shape.ways, "shots": shape.shots}
    found["accuracy"], found["margin"] = percents(accuracies)
    if baseline is not None:
        found["minus_cosine"], found["minus_cosine_margin"] = percents(accuracies - baseline)
    if len(outside["logits"]):
        known, unknown = (evidence(side, fit.by, fit.temperature) for side in (inside, outside))
        found |= {
            "unknown_by": fit.by,
            "auroc": percent(auroc(known, unknown)),
            "let_in": percent(let_in(known, unknown)),
        }
        found["let_in_at"] = [percent(let_in(known, unknown, passing)) for passing in PASSING]
    found |= {"ece": percent(calibration_error(confidences, played["right"])), "temperature": round(fit.temperature, 3)}
    return {**found, "accuracies": accuracies}


def let_in(known: np.ndarray, unknown: np.ndarray, passing: float = 0.95) -> float:
    """The share of unknown queries that pass the threshold that this share of the known pass."""
    return float((unknown >= np.quantile(known, 1 - passing)).mean())


def percent(share: float) -> float:
    return round(100 * share, 2)


def percents(values: np.ndarray) -> tuple[float, float]:
    """Mean and half its 95 % interval."""
    mean, margin = interval(values)
    return percent(mean), percent(margin)


@dataclass(frozen=True)
class Chosen:
    """Selections on the base classes of a data set."""

    base: Mapping[str, ClassFeatures]  # by kind of features, with the protocol of their episodes
    by_pair: Mapping[tuple[str, str], Tried]  # for each head and kind of features, its settings
    learnt: Tried  # selected by `kshot learn`, among all
    of_two: Tried  # selected among whitened and plda
    tried: Sequence[Tried]
    seconds: float


def chosen(classes: Classes, protocol: str) -> Chosen:
    """Select heads and settings as `kshot learn` does, by folds over the base classes."""
    bodies = classes.bodies
    base = {kind: known.with_protocol(protocol) for kind, (known, _) in classes.features.items()}
    kind_of = {id(body): kind for kind, body in bodies.items()}
    order = [(variant.learner.one, variant.backbone.options["features"]) for variant in LEARN.variants()]
    others = [(head, kind) for head in ("plda", "whitened", "ridge") for kind in KINDS if (head, kind) not in order]
    variants = [(one, one.build_head(bodies[kind])) for head, kind in order + others for one in [recipe(head, kind)]]
    settings = LEARN.training
    file = classes.cache / f"{classes.name}-{protocol.split()[0]}.tried"
    if not file.exists():
        tried = select(
            variants, lambda head: base[kind_of[id(head.backbone)]], settings.shapes,
            folds=settings.folds, episodes=settings.validation_episodes, seed=LEARN.seed,
        )  # fmt: skip
        file.write_bytes(pickle.dumps([*tried]))
    tried = pickle.loads(file.read_bytes())
    groups: dict[tuple[str, str], list[Tried]] = {}
    for one in tried:
        groups.setdefault((one.recipe.learner.one, one.recipe.backbone.options["features"]), []).append(one)
    learnt = choose([one for pair in order for one in groups[pair]])
    of_two = choose([one for pair in order if pair[0] in ("plda", "whitened") for one in groups[pair]])
    by_pair = {pair: choose(group) for pair, group in groups.items()}
    by_pair |= {(one.recipe.learner.one, one.recipe.backbone.options["features"]): one for one in (of_two, learnt)}
    return Chosen(base, by_pair, learnt, of_two, tried, sum(one.seconds for one in tried))


def built(classes: Classes, head: str, kind: str, settings: Mapping[str, Any], base: ClassFeatures) -> FeatureLearner:
    """A head with these settings and the statistics of these classes."""
    made = recipe(head, kind).build_head(classes.bodies[kind])
    assert isinstance(made, FeatureLearner)
    made.config = made.config.model_copy(update=dict(settings))
    made.learn_statistics(base.by_class)
    return made.eval()


def measured(classes: Classes, protocol: str) -> dict[str, Any]:
    """Results of all heads on all kinds of features, on the same test episodes."""
    picked = chosen(classes, protocol)
    print(f"{classes.name}, {protocol}: {picked.learnt} chosen in {picked.seconds:.0f} s", flush=True)
    rows, distances = [], []
    for shape in classes.photos.shapes:
        draws = classes.draws(shape, protocol, EPISODES)
        baseline, accuracies = None, dict[str, np.ndarray]()
        for head, kind in [(head, kind) for head in HEADS for kind in KINDS]:
            if head == "finetune" and kind != "last" and (classes.name not in SHOWN or protocol != SHOWN[classes.name]):
                continue  # takes as long as all others together
            one = picked.by_pair.get((head, kind))
            settings = one.settings if one else {}
            made = built(classes, head, kind, settings, picked.base[kind])
            found = figures(made, classes.tables[kind], picked.base[kind], shape, draws, baseline)
            name = f"{head} {kind}"
            accuracies[name] = found.pop("accuracies")
            if (classes.name, protocol) != ("fruit", ACROSS):
                found.pop("let_in_at", None)  # only for data sets in the pictures
            baseline = accuracies["cosine last"]
            where = {"data": classes.name, "protocol": protocol, "head": head, "features": kind, "settings": settings}
            rows.append({
                **where, **({"validation": percent(one.accuracy)} if one else {}),
                "kshot_learn": one is picked.learnt, "of_two": one is picked.of_two, **found,
            })  # fmt: skip
            print(f"  {name:18} {found['accuracy']:5} ± {found['margin']:4}  {settings} {found}", flush=True)
        best = max(accuracies, key=lambda name: accuracies[name].mean())
        learnt = next(f"{row['head']} {row['features']}" for row in rows if row["kshot_learn"])
        distances.append({
            "data": classes.name, "protocol": protocol, "ways": shape.ways, "shots": shape.shots, "learnt": learnt,
            "best": best, "distance": percents(accuracies[best] - accuracies[learnt]),
        })  # fmt: skip
        print(f"  {distances[-1]}", flush=True)
    found: dict[str, Any] = {
        "protocol": protocol, "learnt": str(picked.learnt), "of_two": str(picked.of_two),
        "seconds_to_choose": round(picked.seconds),
        "tried": {str(one): percent(one.accuracy) for one in picked.tried}, "rows": rows, "distances": distances,
    }  # fmt: skip
    if classes.name == "fruit":
        found["served"] = [served(classes, protocol, picked, shots) for shots in (1, 5)]
        print(found["served"])
    if protocol == ACROSS:
        found["either_direction"] = either_direction(classes, picked)
        print(found["either_direction"])
    return found


def served(classes: Classes, protocol: str, picked: Chosen, shots: int) -> dict[str, Any]:
    """The calibration error of a label space of 10 classes, calibrated on the base classes."""
    one, shape = picked.learnt, Shape(10, shots, QUERIES)
    head, kind = one.recipe.learner.one, one.recipe.backbone.options["features"]
    made = built(classes, head, kind, one.settings, picked.base[kind])
    found = figures(made, classes.tables[kind], picked.base[kind], shape, classes.draws(shape, protocol, EPISODES))
    for name in ("accuracies", "let_in_at"):
        found.pop(name)
    return {"data": classes.name, "protocol": protocol, "head": head, "features": kind, **found}


def either_direction(classes: Classes, picked: Chosen) -> list[dict[str, Any]]:
    """kshot's own protocol across groups: support from any group, queries from all others."""
    found = []
    one = picked.learnt
    pairs = [("cosine", "last", {}), (one.recipe.learner.one, one.recipe.backbone.options["features"], one.settings)]
    for shape in classes.photos.shapes:
        for head, kind, settings in pairs:
            made = built(classes, head, kind, settings, picked.base[kind])
            score = evaluate(made, classes.features[kind][1].with_protocol(ACROSS), shape, EPISODES, seed=0)
            found.append({
                "head": head, "features": kind, "ways": shape.ways, "shots": shape.shots,
                "accuracy": percent(score.accuracy), "margin": percent(score.margin),
            })  # fmt: skip
    return found


def foreign(classes: Classes, other: Classes) -> list[dict[str, Any]]:
    """Results without base classes: with the statistics of another data set, and with none."""
    found = []
    for shape in classes.photos.shapes:
        draws = classes.draws(shape, ACROSS, EPISODES)
        for kind in KINDS:
            for head, statistics in (
                ("cosine", "none"),
                ("whitened", "none"),
                *((h, other.name) for h in ("whitened", "plda")),
            ):
                made = recipe(head, kind).build_head(classes.bodies[kind]).eval()
                assert isinstance(made, FeatureLearner)
                if statistics != "none":
                    made.learn_statistics(other.features[kind][0].by_class)
                accuracy, margin = percents(play(made, classes.tables[kind], draws)["accuracies"])
                found.append({
                    "data": classes.name, "protocol": ACROSS, "statistics": statistics, "head": head, "features": kind,
                    "ways": shape.ways, "shots": shape.shots, "accuracy": accuracy, "margin": margin,
                })  # fmt: skip
                print(f"  {found[-1]}", flush=True)
    return found


def costs(classes: Classes, rounds: int = 15) -> list[dict[str, Any]]:
    """CPU time on one thread, heads alternating: learning statistics, adapting, classifying a photo's features."""
    [draw] = classes.draws(Shape(5, 5, QUERIES), RANDOM, 1)
    labels, times = torch.from_numpy(draw.labels), dict[tuple[str, str], dict[str, list[float]]]()
    heads = {}
    for kind in KINDS:
        base = [*classes.features[kind][0].by_class]
        for name in HEADS:
            head = recipe(name, kind).build_head(classes.bodies[kind]).eval()
            head.config = head.config.model_copy(update={"whiten": True} if name == "ridge" else {})
            began = time.process_time()
            head.learn_statistics([part.clone() for part in base])  # new tensors, so that no head reuses another's
            heads[name, kind] = head
            times[name, kind] = {"statistics": [time.process_time() - began], "adapt": [], "classify": []}
    with torch.no_grad():
        for _ in range(rounds):
            for (name, kind), head in heads.items():
                support, query = classes.tables[kind][draw.support], classes.tables[kind][draw.queries[:1]]
                began = time.process_time()
                state = head.fit(support, labels, torch.arange(5))
                then = time.process_time()
                for _ in range(10):
                    head.logits(state, query)
                times[name, kind]["classify"].append((time.process_time() - then) / 10)
                times[name, kind]["adapt"].append(then - began)
    return [
        {
            "head": name, "features": kind, "statistics_s": round(float(np.median(taken["statistics"])), 2),
            "adapt_ms": round(1000 * float(np.median(taken["adapt"])), 2),
            "classify_ms": round(1000 * float(np.median(taken["classify"])), 3),
        }
        for (name, kind), taken in times.items()
    ]  # fmt: skip


# ---- tables and pictures


def report(cache: Path) -> None:
    files = [cache / f"{name}-{word}.json" for name in SETS for word in PROTOCOLS]
    parts = [
        {**json.loads(file.read_text()), "chosen_features": chosen_features(pickle.loads(tried.read_bytes()))}
        for file in files
        if file.exists() and (tried := file.with_suffix(".tried")).exists()
    ]
    others = {
        name: json.loads(file.read_text()) for name in ("foreign", "costs") if (file := cache / f"{name}.json").exists()
    }
    foreign, costs = others.get("foreign", []), others.get("costs", [])
    found = {
        "what": f"heads on frozen efficientnet-lite0, {EPISODES} episodes of test classes, the same for all",
        "machine": machine(),
        "versions": {"torch": torch.__version__},
        "targets": targets(parts, foreign),
        "data": parts,
        "foreign": foreign,
        "costs": costs,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    put("targets", target_table(found["targets"]))
    put("summary", summary(parts))
    put("heads", "\n\n".join(map(head_table, parts)))
    put("served", served_table(parts))
    put("directions", direction_table(parts))
    put("foreign", foreign_table(foreign))
    put("costs", cost_table(costs))
    bars(parts)
    unknown_curves(parts)


def chosen_features(tried: Sequence[Tried]) -> dict[str, str]:
    """For each head with unset settings, the kind of features that `choose` selects for it."""
    of = {name: [one for one in tried if one.recipe.learner.one == name] for name in ("whitened", "plda")}
    return {name: choose(own).recipe.backbone.options["features"] for name, own in of.items()}


Part = Mapping[str, Any]
"""What was measured on a data set by a protocol."""


def targets(parts: Sequence[Part], foreign: Sequence[Part]) -> list[dict[str, Any]]:
    """Targets and measured values."""
    found: list[dict[str, Any]] = []

    def ask(what: str, value: float, least: float | None = None, most: float | None = None) -> None:
        met = (least is None or value >= least) and (most is None or value <= most)
        found.append({"what": what, "found": value, "at_least": least, "at_most": most, "met": met})

    asked: dict[tuple[str, str], dict[int, dict[str, float]]] = {
        ("fruit", ACROSS): {
            1: {"minus_cosine": 15, "auroc": 79.5, "let_in": -70},
            5: {"minus_cosine": 14, "auroc": 86, "let_in": -54},
        },
        ("coins", ACROSS): {1: {"minus_cosine": 22}, 5: {"minus_cosine": 19}},
    }
    for row in (row for part in parts for row in part["rows"] if row["of_two"]):
        wanted = asked.get((row["data"], row["protocol"]), {}).get(row["shots"], {})
        if row["data"] == "emoji-4v":
            wanted = {"accuracy": {5: 95, 20: 87}[row["ways"]]}
        for name, bound in wanted.items():
            ask(f"{place(row)}: {WORDS[name]}", row[name], *((None, -bound) if bound < 0 else (bound,)))
    for part in parts:
        for name in ("whitened", "plda"):
            best = part["chosen_features"][name]
            for row in (row for row in part["rows"] if (row["head"], row["features"]) == (name, best)):
                ask(f"{place(row)}: {name} on {best} minus cosine, not below by more than the interval",
                    row["minus_cosine"], -row["minus_cosine_margin"])  # fmt: skip
        for row in part.get("served", ()):
            ask(f"{place(row)}: calibration error of a served space", row["ece"], most=5)
        for row in part["distances"]:
            ask(f"{place(row)}: kshot's choice ({row['learnt']}) behind the best on test ({row['best']})",
                row["distance"][0], most=1)  # fmt: skip
    for row in foreign:
        if row["head"] == "whitened" and row["features"] != "last" and row["shots"] == 5:
            ask(f"{place(row)}: whitened on {row['features']}, statistics: {row['statistics']}", row["accuracy"], 71)
    return found


def place(row: Part) -> str:
    return f"{row['data']}, {row['protocol']}, {row['ways']}-way {row['shots']}-shot"


WORDS = {
    "minus_cosine": "the better of whitened and plda, minus cosine",
    "auroc": "AUROC of unknown", "let_in": "unknown let in where 95 % of known pass", "accuracy": "accuracy",
}  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def target_table(rows: Sequence[dict[str, Any]]) -> str:
    return table(
        ["target", "bound", "found", ""],
        [
            [row["what"], f"≥ {row['at_least']:g}" if row["at_most"] is None else f"≤ {row['at_most']:g}",
             f"{row['found']:.1f}", "met" if row["met"] else "**missed**"]
            for row in rows
        ],
    )  # fmt: skip


def shown(row: Mapping[str, Any]) -> str:
    return f"{row['accuracy']:.1f} ± {row['margin']:.1f}"


def gain(row: Mapping[str, Any]) -> str:
    return f"{row['minus_cosine']:+.1f} ± {row['minus_cosine_margin']:.1f}" if "minus_cosine" in row else ""


def trust(row: Mapping[str, Any]) -> str:
    return f"{row['auroc']:.1f} / {row['let_in']:.0f}" if "auroc" in row else ""


def head_table(part: Part) -> str:
    """The table of all heads on all kinds of features."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in part["rows"]:
        pairs.setdefault(f"{row['head']} {row['features']}", []).append(row)
    first = next(iter(pairs.values()))
    sizes = [f"{row['ways']}-way {row['shots']}-shot" for row in first]
    columns = [
        "head, features",
        "settings",
        *(c for size in sizes for c in (size, "minus cosine", "AUROC / let in", "ECE")),
    ]
    lines = []
    for name, rows in pairs.items():
        settings = ", ".join(f"{key} {value}" for key, value in rows[0]["settings"].items())
        name = f"**{name}**" if rows[0]["kshot_learn"] else name
        cells = [cell for row in rows for cell in (shown(row), gain(row), trust(row), f"{row['ece']:.1f}")]
        lines.append([name, settings, *cells])
    title = f"**{part['data']}, {part['protocol']}** ({part['base']} base classes, {part['test']} test classes)"
    return f"{title}\n\n{table(columns, lines)}"


def summary(parts: Sequence[Part]) -> str:
    """The table of cosine, finetune, and the selection of `kshot learn`."""
    lines = []
    for part in parts:
        for gap in part["distances"]:
            rows = [row for row in part["rows"] if (row["ways"], row["shots"]) == (gap["ways"], gap["shots"])]
            cosine, tuned = (next(row for row in rows if row["head"] == name) for name in ("cosine", "finetune"))
            learnt = next(row for row in rows if row["kshot_learn"])
            lines.append([
                f"{part['data']}, {part['protocol']}", f"{gap['ways']}-way {gap['shots']}-shot", shown(cosine),
                trust(cosine), shown(tuned), gap["learnt"], shown(learnt), gain(learnt), trust(learnt),
                f"{gap['distance'][0]:.1f} ± {gap['distance'][1]:.1f} ({gap['best']})",
            ])  # fmt: skip
    return table(
        ["data, protocol", "episode", "cosine", "AUROC / let in", "finetune", "kshot's choice", "accuracy",
         "minus cosine", "AUROC / let in", "behind the best on test"], lines,
    )  # fmt: skip


def served_table(parts: Sequence[Part]) -> str:
    rows = [row for part in parts for row in part.get("served", ())]
    return table(
        ["fruit, 10-way", "photos of a class", "head", "accuracy", "ECE", "AUROC / let in"],
        [
            [r["protocol"], r["shots"], f"{r['head']} {r['features']}", shown(r), f"{r['ece']:.1f}", trust(r)]
            for r in rows
        ],
    )


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    return table(
        ["head, features", "statistics, s", "adapt, ms", "classify, ms"],
        [[f"{r['head']} {r['features']}", r["statistics_s"], r["adapt_ms"], r["classify_ms"]] for r in rows],
    )


def foreign_table(rows: Sequence[dict[str, Any]]) -> str:
    pairs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault((row["head"], row["features"], row["statistics"]), []).append(row)
    return table(
        ["coins, 4-way, across groups", "statistics", "1 photo", "5 photos"],
        [[f"{head} {kind}", of, *map(shown, found)] for (head, kind, of), found in pairs.items()],
    )


def direction_table(parts: Sequence[Part]) -> str:
    lines = [
        [part["data"], f"{row['head']} {row['features']}", f"{row['ways']}-way {row['shots']}-shot", shown(row)]
        for part in parts
        for row in part.get("either_direction", ())
    ]
    return table(["data", "head, features", "episode", "accuracy"], lines)


def put(name: str, text: str) -> None:
    """Replace the text between the markers of this name in docs/photographs.md."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = DOCS.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{DOCS} has no {begin} ... {end}")
    DOCS.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def drawn(part: Part) -> dict[str, list[Any]]:
    """The rows of each head in the pictures, on the features selected for it."""
    found = {}
    for head in COLOURS:
        kind = part["chosen_features"].get(head, "last")
        found[head] = [row for row in part["rows"] if (row["head"], row["features"]) == (head, kind)]
    return found


def bars(parts: Sequence[Part]) -> None:
    """Plot accuracies with intervals, at one photo and at five."""
    figure = Figure((9, 3.4), layout="constrained")
    axes = figure.subplots()
    places, labels = [], []
    for group, part in enumerate(part for part in parts if SHOWN.get(part["data"]) == part["protocol"]):
        for size, row in enumerate(drawn(part)["cosine"]):
            start = 2.3 * group + size
            places.append(start + 0.3)
            photos = "1 photo" if row["shots"] == 1 else f"{row['shots']} photos"
            labels.append(f"{row['data'].removesuffix('-4v')}, {row['ways']} classes\n{photos} of each")
            for i, (head, rows) in enumerate(drawn(part).items()):
                axes.bar(start + 0.2 * i, rows[size]["accuracy"], 0.19, yerr=rows[size]["margin"], color=COLOURS[head],
                         label=None if start else head, ecolor="#333", error_kw={"linewidth": 1})  # fmt: skip
    axes.set_xticks(places, labels, fontsize=7.5)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 105)
    axes.legend(loc="upper left", ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS.with_suffix(".png"), dpi=110)


def unknown_curves(parts: Sequence[Part]) -> None:
    """Plot unknown photos let in against known that pass, for fruit across groups."""
    [part] = [part for part in parts if (part["data"], part["protocol"]) == ("fruit", ACROSS)]
    figure = Figure((8, 3.4), layout="constrained")
    for size, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        for head, rows in drawn(part).items():
            axes.plot([100 * share for share in PASSING], rows[size]["let_in_at"], color=COLOURS[head], label=head)
        axes.set_title(f"{rows[size]['shots']} photo{'s' * (size > 0)} of each class", fontsize=9)
        axes.set_xlabel("known photos that pass, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 100)
    figure.axes[0].set_ylabel("unknown let in, %")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(DOCS.with_name("photographs-unknown.png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=[*PROTOCOLS, "costs", "foreign"], help="a part of what is measured")
    parser.add_argument("--report", action="store_true", help="join what was measured before; measure nothing")
    parser.add_argument("sets", nargs="*", default=[*SETS])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "kshot-photos")
    parser.add_argument("--embed", action="store_true", help="compute the features only")
    options = parser.parse_args()
    if options.report:
        return report(options.cache)
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    for name in options.sets:
        classes, started = Classes(name, options.data, options.cache), time.perf_counter()
        with malloc.kept():
            _ = classes.features
        print(f"{name}: {len(classes.base)} base and {len(classes.test)} test classes, "
              f"{int(classes.base.counts.sum())} and {int(classes.test.counts.sum())} photos, "
              f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
        if options.embed:
            continue
        about = {
            "data": name, "base": len(classes.base), "test": len(classes.test),
            "photos": [int(part.counts.sum()) for part in (classes.base, classes.test)],
        }  # fmt: skip
        for word, protocol in PROTOCOLS.items():
            if protocol in classes.photos.protocols and options.only in (None, word):
                keep(options.cache / f"{name}-{word}.json", {**about, **measured(classes, protocol)})
        if name == "fruit" and options.only in (None, "costs"):
            keep(options.cache / "costs.json", costs(classes))
        if name == "coins" and options.only in (None, "foreign"):
            keep(options.cache / "foreign.json", foreign(classes, Classes("fruit", options.data, options.cache)))


def keep(file: Path, found: Any) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
