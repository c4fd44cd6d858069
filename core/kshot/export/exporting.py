"""Exports a learner as a bundle: traces it, checks the graphs against torch, and writes the files."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from kshot import atomic
from kshot.data.datasets import ClassImages
from kshot.data.embeddings import backbone_key, embedded
from kshot.data.episodes import Shape
from kshot.export import parity
from kshot.export.graphs import adapt_model, classify_model, embed_model, views_model
from kshot.export.trace import Call, ExportError, Piece, Spec, trace
from kshot.learner import FeatureLearner, InnerLoop, Learner, State
from kshot.norms import BY_ITSELF
from kshot_runtime.bundle import Bundle, Graphs
from kshot_runtime.manifest import ADAPT, CLASSIFY, EMBED, MANIFEST, VIEWS, Facts, FileFacts, Manifest, TensorSpec

__all__ = ["ExportError", "Facts", "Report", "export"]

_RESERVED = {"support", "labels", "classes", "steps", "query", "query_features", "logits", "ratio", "nearest", "i"}
_TYPES = {torch.float32: "float32", torch.int64: "int64"}
_INT64 = torch.int64


@dataclass(frozen=True)
class Report:
    """A finished bundle, and its agreement with torch."""

    folder: Path
    manifest: Manifest
    seconds: float

    def __str__(self) -> str:
        found, size = self.manifest.parity, sum(file.size for file in self.manifest.files.values())
        return (
            f"{self.folder}: {size / 1000:,.0f} kB, agrees with torch on {100 * found.agreement:.2f} % of the queries "
            f"of {found.episodes} episodes, logits differ by up to {found.logit_difference:.1g} ({self.seconds:.0f} s)"
        )


def export(
    learner: Learner,
    folder: str | Path,
    *,
    facts: Facts,
    data: ClassImages,
    shape: Shape,
    seed: int,
    episodes: int = 100,
    store: Path | None = None,
) -> Report:
    """Write `learner` as a bundle to `folder`, replacing an older bundle, if all checks pass; else an ExportError.

    The graphs are compared with torch on `episodes` episodes of `shape` from the classes in `data`. Features of images
    are cached in the embedding store `store`.
    """
    started, folder = time.perf_counter(), Path(folder)
    learner = deepcopy(learner).to("cpu", torch.float32).eval()
    image = learner.backbone.image
    if not facts.image.shape == image == data.shape:
        raise ExportError(
            f"the learner takes images {image}, the image rule makes {facts.image.shape} and the data are "
            f"{data.shape}: all three must be equal"
        )
    with _replacing(folder) as staging:
        contents = {}
        if learner.backbone.norm in BY_ITSELF:
            contents[EMBED] = _embed(learner, image, store)
        if learner.backbone.mirrors:
            contents[VIEWS] = _serialised(views_model(image), VIEWS)
        models, state = _models(learner, image, [fit.by for fit in facts.calibration])
        contents |= {name: _serialised(model, name) for name, model in models.items()}
        compared = parity.compare(
            learner,
            Graphs(contents),
            embedded(learner, data, store=store),
            shape,
            seed=seed,
            episodes=episodes,
            store=store,
        )
        manifest = Manifest(
            **dict(facts),
            norm=learner.backbone.norm,
            steps=learner.steps if isinstance(learner, InnerLoop) else None,
            steps_by_shots=dict(learner.steps_by_shots) if isinstance(learner, InnerLoop) else {},
            takes="features" if learner.takes_features else "images",
            features=learner.backbone.features,
            state={name: TensorSpec(shape=spec.shape, dtype=_TYPES[spec.dtype]) for name, spec in state.items()},
            parity=compared,
            files={name: FileFacts.of(content) for name, content in contents.items()},
        )
        for name, content in {**contents, MANIFEST: manifest.to_bytes()}.items():
            (staging / name).write_bytes(content)
        Bundle.open(staging)  # validates it as a server does
    return Report(folder, manifest, time.perf_counter() - started)


def _embed(learner: Learner, image: tuple[int, int, int], store: Path | None) -> bytes:
    """The graph that embeds images: traced, or read from the embedding store if it holds that of this backbone."""
    kind = getattr(learner.backbone, "selected", "")
    cached = store / f"{backbone_key(learner.backbone)[:24]}-{kind}-{torch.__version__}.onnx" if store else None
    if cached and cached.is_file():
        return cached.read_bytes()
    images = {"images": Spec(("Q", *image))}
    piece = trace(learner, "embed", lambda given: {"features": learner.embed(given["images"])}, images)
    content = _serialised(embed_model(piece), EMBED)
    if cached:
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(content)
        unfinished.replace(cached)
    return content


def _models(
    learner: Learner, image: tuple[int, int, int], scores: Sequence[str]
) -> tuple[dict[str, onnx.ModelProto], dict[str, Spec]]:
    """The models that adapt and classify, and the specs of the state; `scores` names the `evidence` to export."""
    item = (learner.backbone.features,) if learner.takes_features else image
    episode = {"support": Spec(("S", *item)), "labels": Spec(("S",), _INT64), "classes": Spec(("W",), _INT64)}
    if isinstance(learner, InnerLoop):
        pieces = _inner_loop(learner, episode)
    else:
        pieces = {"begin": trace(learner, "adapt", lambda given: learner.adapt(*_episode(given)), episode)}
    state = list(pieces.values())[-1].outputs
    _check_state("adapt", learner, state)
    classify = trace(
        learner,
        "classify",
        lambda given: _classify(learner, _entries(given, state), given["query"], scores),
        {**state, "query": Spec(("Q", *item))},
    )
    if (logits := classify.outputs["logits"].shape) != ("Q", "W"):
        raise ExportError(f"classify of {learner.name!r} gives logits {_shape_text(logits)}; they must be (Q, W)")
    used = classify.used()
    models = {ADAPT: adapt_model(**pieces, wanted=used), CLASSIFY: classify_model(classify)}
    return models, {name: spec for name, spec in state.items() if name in used}


def _classify(learner: Learner, state: State, query: Tensor, scores: Sequence[str]) -> State:
    """The logits, the features if the query is images, and those of the learner's `evidence` that `scores` names."""
    features = learner.embed(query, state)
    found = {"logits": learner.classify(state, features)}
    if features is not query:
        found["query_features"] = features
    if isinstance(learner, FeatureLearner):
        found |= {name: score for name, score in learner.evidence(state, features).items() if name in scores}
    return found


def _inner_loop(learner: InnerLoop, episode: Mapping[str, Spec]) -> dict[str, Piece]:
    """The traced pieces: begin, the first step if it has a closed form, step, and finish."""
    begin = trace(learner, "begin", lambda given: learner.begin(*_episode(given)), episode)
    state = begin.outputs
    _check_state("begin", learner, state)
    calls: dict[str, Call] = {
        "step": lambda given: learner.step(_entries(given, state), *_episode(given), given["i"]),
        "finish": lambda given: learner.finish(_entries(given, state), *_episode(given)),
    }
    if learner.closed_form_start:
        calls = {"first": lambda given: learner.first(_entries(given, state), *_episode(given)), **calls}
    inputs = {**episode, **state}
    pieces = {
        name: trace(learner, name, call, {**inputs, "i": Spec((), _INT64)} if name == "step" else inputs)
        for name, call in calls.items()
    }
    for name in pieces.keys() - {"finish"}:
        _check_step(name, learner, begin, pieces[name])
    return {"begin": begin, **pieces}


def _episode(given: State) -> tuple[Tensor, Tensor, Tensor]:
    return given["support"], given["labels"], given["classes"]


def _entries(given: State, names: Mapping[str, object]) -> State:
    return {name: given[name] for name in names}


def _check_state(what: str, learner: Learner, state: Mapping[str, Spec]) -> None:
    whose = f"{what} of {learner.name!r} gives"
    if not state:
        raise ExportError(f"{whose} an empty state; classify needs to know the classes")
    for name, spec in state.items():
        if name in _RESERVED:
            raise ExportError(f"{whose} a tensor named {name!r}, which the graphs reserve: give it another name")
        if spec.dtype not in _TYPES:
            raise ExportError(f"{whose} {name!r} as {spec.dtype}; a state holds float32 or int64")
        if odd := [size for size in spec.shape if isinstance(size, str) and size not in ("S", "W")]:
            raise ExportError(
                f"{whose} {name!r} of shape {_shape_text(spec.shape)}; a size must be constant, the number of ways W "
                f"or of support images S, and {odd[0]} is not. Give the tensor another shape, or more dimensions."
            )


def _check_step(what: str, learner: Learner, begin: Piece, step: Piece) -> None:
    before, after = begin.outputs, step.outputs
    if names := set(before) ^ set(after):
        raise ExportError(
            f"begin and {what} of {learner.name!r} give different states: only one has {', '.join(sorted(names))}. "
            "A step must return every tensor of the state, under its name."
        )
    for name, spec in before.items():
        if after[name] != spec:
            raise ExportError(
                f"{what} of {learner.name!r} changes {name!r} from {_shape_text(spec.shape)} {spec.dtype} to "
                f"{_shape_text(after[name].shape)} {after[name].dtype}; a step must keep shapes and types"
            )


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _serialised(model: onnx.ModelProto, name: str) -> bytes:
    try:
        content: bytes = model.SerializeToString(deterministic=True)
    except ValueError as error:  # protobuf's limit of 2 GiB
        raise ExportError(f"{name} does not fit into one ONNX file: {error}. Use a smaller backbone.") from None
    return content


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` if the block succeeds, and is deleted otherwise."""
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not a bundle. Remove it, or export to another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        staging = Path(scratch) / "new"
        staging.mkdir()
        yield staging
        atomic.replace(folder, staging)  # the old one is deleted with the scratch folder
