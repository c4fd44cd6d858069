"""A bundle at work: photos and their labels in, a state out; a state and photos in, probabilities out. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import io
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from kshot_runtime.images import decode
from kshot_runtime.manifest import ADAPT, CLASSIFY, EMBED, VIEWS, BundleError, By, Manifest, read
from kshot_runtime.onnx_file import with_constants

Device = Literal["cpu", "cuda", "tensorrt", "auto"]
Photo = bytes | bytearray | memoryview | str | Path | np.ndarray
"""An encoded photo, the path of one, or uint8 (C, H, W) of the bundle's size."""
Tensors = dict[str, np.ndarray]

AT_ONCE = 64  # images in one run, which bounds memory

Classifier = Callable[[np.ndarray], Tensors]
"""What `Graphs.classify` gives of queries, for one state."""

_LARGE = 1 << 16  # bytes of a support set after which the arena gives its memory back: adapting took over 100 MB

_ASKED = ("support", "labels", "classes", "steps", "query")
_CUDA = (
    "CUDAExecutionProvider",
    # The default search tries every algorithm again for each new number of images.
    {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"},
)
_PROVIDERS: dict[Device, list[Any]] = {"cpu": [], "cuda": [_CUDA], "tensorrt": ["TensorrtExecutionProvider", _CUDA]}
_NAMES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "tensorrt"}


@dataclass(frozen=True)
class State:
    """What adapting gave: the learner's tensors, the classes in the order of the logits, and the images of each."""

    tensors: Tensors
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    bundle: str  # the id of the bundle that made it

    def to_bytes(self) -> bytes:
        """The state as an .npz file."""
        file = io.BytesIO()
        arrays: dict[str, Any] = {f"tensor {name}": value for name, value in self.tensors.items()}
        names = np.frombuffer("\0".join(self.classes).encode(), np.uint8)
        np.savez(file, classes=names, counts=np.array(self.counts), bundle=np.array(self.bundle), **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> State:
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return cls(
                    {name.removeprefix("tensor "): arrays[name] for name in arrays if name.startswith("tensor ")},
                    tuple(arrays["classes"].tobytes().decode().split("\0")),
                    tuple(arrays["counts"].tolist()),
                    str(arrays["bundle"]),
                )
        except Exception as error:  # numpy and zipfile raise many kinds
            raise BundleError(f"not a saved state: {error}") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> State:
        return cls.from_bytes(Path(path).read_bytes())


@dataclass(frozen=True)
class Answers:
    """What a bundle makes of photos: a row for each."""

    probabilities: np.ndarray  # (Q, W) float32, calibrated if the bundle is
    logits: np.ndarray  # (Q, W) float32
    classes: tuple[str, ...]  # (W,) the columns' names
    known: np.ndarray  # (Q,) bool: false where a photo seems to belong to none of the classes

    @property
    def names(self) -> list[str]:
        """The likeliest class of each photo."""
        return [self.classes[i] for i in self.probabilities.argmax(1)] if len(self.classes) else []

    def __len__(self) -> int:
        return len(self.probabilities)


class Graphs:
    """The ONNX graphs in sessions on one device: arrays in, arrays out, safe to call from many threads."""

    def __init__(
        self,
        contents: Mapping[str, bytes],
        device: Device = "cpu",
        threads: int = 1,
        adapt_threads: int | None = None,
        arena: bool = False,
    ) -> None:
        self._embed = session(contents[EMBED], device, threads, arena) if EMBED in contents else None
        self._adapt = session(contents[ADAPT], device, adapt_threads or threads, arena=True)
        self._classify = session(contents[CLASSIFY], device, threads, arena)
        self._views = session(contents[VIEWS], device, threads) if VIEWS in contents else None
        self._fixed: dict[int, _FixedBatch] = {}
        self._bake = partial(session, device=device, threads=threads, arena=arena)
        self._classify_model = contents[CLASSIFY]
        self._keeps_memory = arena
        self.digest = hashlib.sha256(contents.get(EMBED, b"")).digest()  # features of two with one are the same
        self.gives = [output.name for output in self._classify.get_outputs()]
        self.device: str = _NAMES[self._classify.get_providers()[0]]
        self.takes_features = len(self._adapt.get_inputs()[0].shape) == 2
        self.state = [output.name for output in self._adapt.get_outputs()]
        self.takes_steps = any(given.name == "steps" for given in self._adapt.get_inputs())

    @property
    def embeds(self) -> bool:
        """Whether it makes features of an image by itself; they are else the support set's affair."""
        return self._embed is not None

    @property
    def makes_views(self) -> bool:
        """Whether the features of a support image are the mean over views of it."""
        return self._views is not None

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Features (N, D) float32 of images (N, C, H, W) uint8, each by itself."""
        if self._embed is None:
            raise BundleError("this bundle's features depend on the support set: it has none of an image by itself")
        if len(images) in self._fixed:
            return self._fixed[len(images)].features(images)
        return _run(self._embed, ["features"], {"images": images})[0]

    def views(self, images: np.ndarray) -> np.ndarray:
        """The views (N, V, C, H, W) uint8 of support images (N, C, H, W) uint8; without views.onnx the images alone."""
        if self._views is None:
            return images[:, None]
        [views] = _run(self._views, ["views"], {"images": images})
        if views.dtype != np.uint8 or views.ndim != 5 or (len(views), *views.shape[2:]) != images.shape:
            raise BundleError(f"{VIEWS} gives {views.dtype} {views.shape} of uint8 {images.shape}, not (N, V, C, H, W)")
        return views

    def embed_support(self, images: np.ndarray) -> np.ndarray:
        """Features (N, D) float32 of support images (N, C, H, W) uint8: the mean over each one's views."""

        def features(part: np.ndarray) -> np.ndarray:
            views = self.views(part)
            return mean_over_views(views, _in_parts(self.embed, flattened(views)))

        return _in_parts(features, images)

    def fix(self, sizes: Iterable[int]) -> None:
        """Set memory of the device aside for embedding so many images at once, for good."""
        if self._embed is not None:
            self._fixed = {size: _FixedBatch(self._embed, size, self.device) for size in sizes}

    def adapt(self, support: np.ndarray, labels: np.ndarray, classes: np.ndarray, steps: int | None = None) -> Tensors:
        """The state after adapting to support (S, C, H, W) uint8, labels (S,), the classes' ids (W,).

        Where the bundle takes features, support may be features (S, D); so may a query.
        """
        if self.takes_features and support.dtype == np.uint8:
            support = self.embed_support(support)
        given = {"support": support, "labels": labels.astype(np.int64), "classes": classes.astype(np.int64)}
        if self.takes_steps:
            if steps is None:
                raise BundleError("this learner adapts in steps: say how many")
            given["steps"] = np.array(steps, np.int64)
        options = onnxruntime.RunOptions()
        if self.device == "cpu" and (support.nbytes > _LARGE or not self._keeps_memory):
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return dict(zip(self.state, _run(self._adapt, self.state, given, options), strict=True))

    def logits(self, state: Mapping[str, np.ndarray], query: np.ndarray) -> np.ndarray:
        """Logits (Q, W) of query (Q, C, H, W) uint8."""
        return self.classify(state, query)["logits"]

    def classify(self, state: Mapping[str, np.ndarray], query: np.ndarray) -> Tensors:
        """Of query (Q, C, H, W) uint8 the `logits` (Q, W), and what else the graph gives.

        That may be `query_features` (Q, D), and `ratio` or `nearest` (Q,): see `evidence`.
        """
        features = self.takes_features and query.dtype == np.uint8
        given = {**state, "query": _in_parts(self.embed, query) if features else query}
        found = dict(zip(self.gives, _run(self._classify, self.gives, given), strict=True))
        return found | {"query_features": given["query"]} if self.takes_features else found

    @property
    def bakes(self) -> bool:
        """Whether `baked` pays: on a CPU, where the state holds weights or statistics of the backbone."""
        return self.device == "cpu" and not self.takes_features

    def baked(self, state: Mapping[str, np.ndarray]) -> Classifier:
        """`classify` for one state, with its tensors as constants in a session of their own.

        onnxruntime packs constant weights and folds the norm into them, which halves the time. A session takes 3 ms
        to make, and about twice the state's memory.
        """
        own = self._bake(with_constants(self._classify_model, state))
        return lambda query: dict(zip(self.gives, _run(own, self.gives, {"query": query}), strict=True))


class Bundle:
    """A learner ready to serve.

    >>> bundle = Bundle.open("bundle")                                        # a folder or a zip
    >>> state = bundle.adapt(["cat.jpg", "dog.jpg"], ["cat", "dog"])          # one photo of each is enough
    >>> answers = bundle.classify(state, ["mystery.jpg"])
    >>> print(answers.names, answers.probabilities)
    >>> state.save("pets.npz")                                                # and later: State.load("pets.npz")
    """

    def __init__(self, manifest: Manifest, graphs: Graphs) -> None:
        self.manifest = manifest
        self.graphs = graphs

    @classmethod
    def open(
        cls,
        source: str | Path,
        device: Device = "cpu",
        threads: int = 1,
        *,
        adapt_threads: int | None = None,
        arena: bool = False,
    ) -> Bundle:
        """Check a bundle and load it. `auto` takes a GPU if there is one; to ask for a missing one is an error.

        With `arena` the memory of a run is kept for the next, but for large support sets: faster, for a process that
        serves.
        """
        manifest, contents = read(source)
        bundle = cls(manifest, Graphs(contents, device, threads, adapt_threads, arena))
        bundle._check_graphs()
        return bundle

    @property
    def device(self) -> str:
        """Where it runs: cpu, cuda or tensorrt."""
        return self.graphs.device

    def adapt(self, photos: Sequence[Photo], labels: Sequence[str | int], steps: int | None = None) -> State:
        """Learn classes from photos and their labels, in any order and any number of each."""
        if len(photos) != len(labels):
            raise BundleError(f"{len(photos)} photos came with {len(labels)} labels; each photo needs one")
        names = [str(label) for label in labels]
        classes = list(dict.fromkeys(names))  # in order of first appearance
        ids = {name: i for i, name in enumerate(classes)}
        numbers = np.array([ids[name] for name in names], np.int64)
        if bad := [name for name in classes if not name or "\0" in name]:
            raise BundleError(f"{bad[0]!r} cannot name a class: give it at least one character, and no NUL")
        tensors = self.adapt_arrays(self.images(photos), numbers, np.arange(len(classes)), steps)
        return State(tensors, tuple(classes), tuple(np.bincount(numbers).tolist()), self.manifest.id)

    def classify(self, state: State, photos: Sequence[Photo]) -> Answers:
        """Probabilities of each of the state's classes, for each photo."""
        if state.bundle != self.manifest.id:
            raise BundleError(
                f"this state was made by bundle {state.bundle}, and this is {self.manifest.id}: adapt again, "
                "to the same photos"
            )
        outputs = self.outputs(state.tensors, self.images(photos))
        logits = outputs["logits"]
        calibration = self.manifest.calibration_for(len(state.classes), float(np.mean(state.counts)))
        probabilities = softmax(logits / (calibration.temperature if calibration else 1.0))
        known = np.ones(len(logits), bool)
        if calibration is not None and calibration.threshold is not None:
            known = evidence(outputs, calibration.by, calibration.temperature) >= calibration.threshold
        return Answers(probabilities, logits, state.classes, known)

    def images(self, photos: Sequence[Photo]) -> np.ndarray:
        """Photos as the graphs take them: uint8 (N, C, H, W)."""
        images = [self._image(photo, i) for i, photo in enumerate(photos)]
        return np.stack(images) if images else np.empty((0, *self.manifest.image.shape), np.uint8)

    def adapt_arrays(
        self, support: np.ndarray, labels: np.ndarray, classes: np.ndarray, steps: int | None = None
    ) -> Tensors:
        """The state's tensors for support (S, C, H, W) uint8, labels (S,), and classes (W,) in the logits' order."""
        support, labels, classes = self._uint8(support), np.asarray(labels), np.asarray(classes)
        limits = self.manifest.limits
        if not len(support):
            raise BundleError("there are no support images: give at least one photo of each class")
        if labels.shape != (len(support),) or classes.ndim != 1:
            raise BundleError(f"{len(support)} images need as many labels, not {labels.shape}; classes are (W,)")
        if labels.dtype.kind not in "iu" or classes.dtype.kind not in "iu":
            raise BundleError(f"labels and classes are whole numbers, not {labels.dtype} and {classes.dtype}")
        if len(np.unique(classes)) != len(classes):
            raise BundleError("a class is listed twice")
        members = (labels[:, None] == classes[None, :]).sum(0)  # (W,)
        if members.sum() != len(labels):
            strange = sorted(set(labels.tolist()) - set(classes.tolist()))
            raise BundleError(f"labels {strange[:5]} are none of the classes")
        if not members.all():
            raise BundleError(f"class {classes[members == 0][0]} has no support image; each needs at least one")
        for name, came, most in (
            ("classes", len(classes), limits.ways),
            ("photos of one class", int(members.max()), limits.shots),
            ("photos", len(support), limits.support),
        ):
            if came > most:
                raise BundleError(f"{came} {name} came; this bundle adapts to at most {most}")
        return self.graphs.adapt(support, labels, classes, self._steps(steps, len(labels) / len(classes)))

    def logits(self, tensors: Mapping[str, np.ndarray], query: np.ndarray) -> np.ndarray:
        """Logits (Q, W) of query (Q, C, H, W) uint8. No query's depend on its companions, so many go in parts."""
        return self.outputs(tensors, query)["logits"]

    def outputs(self, tensors: Mapping[str, np.ndarray], query: np.ndarray) -> Tensors:
        """What classify.onnx gives for query (Q, C, H, W) uint8: `logits` and what thresholds may be on."""
        query = self._uint8(query)
        if missing := set(self.manifest.state) - set(tensors):
            raise BundleError(f"the state lacks {', '.join(sorted(missing))}")
        parts = [self.graphs.classify(tensors, query[i : i + AT_ONCE]) for i in range(0, len(query), AT_ONCE)]
        if not parts:
            nothing = np.empty(0, np.float32)
            return {"logits": nothing.reshape(0, self._ways(tensors)), "ratio": nothing, "nearest": nothing}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _ways(self, tensors: Mapping[str, np.ndarray]) -> int:
        for name, spec in self.manifest.state.items():
            if "W" in spec.shape:
                return int(tensors[name].shape[spec.shape.index("W")])
        return 0

    def _steps(self, steps: int | None, shots: float) -> int | None:
        usual = self.manifest.steps_for(shots)
        if usual is None:
            if steps is not None:
                raise BundleError(f"{self.manifest.learner.name} does not adapt in steps: leave steps={steps} out")
            return None
        steps = usual if steps is None else steps
        if not 0 <= steps <= self.manifest.limits.steps:
            raise BundleError(f"{steps} inner steps asked for; this bundle takes 0 to {self.manifest.limits.steps}")
        return steps

    def _image(self, photo: Photo, i: int) -> np.ndarray:
        if isinstance(photo, np.ndarray):
            if photo.shape != self.manifest.image.shape:
                raise BundleError(f"photo {i} is an array {photo.shape}; this bundle takes {self.manifest.image.shape}")
            return self._uint8(photo[None])[0]
        if isinstance(photo, (str, Path)):
            try:
                photo = Path(photo).read_bytes()
            except OSError as error:
                raise BundleError(f"photo {i} cannot be read: {error}") from None
        return decode(bytes(photo), self.manifest.image)

    def _uint8(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.manifest.image.shape:
            wanted = ", ".join(map(str, self.manifest.image.shape))
            raise BundleError(f"images are uint8 (N, {wanted}) in 0..255, not {images.dtype} {images.shape}")
        return images

    def _check_graphs(self) -> None:
        """The graphs must give and take the state that the manifest describes."""
        given = set(self.graphs.state)
        if given != set(self.manifest.state):
            raise BundleError(f"{ADAPT} gives {', '.join(sorted(given))}, not the state that the manifest describes")
        if self.graphs.takes_features != (self.manifest.takes == "features"):
            raise BundleError(f"{ADAPT} and the manifest disagree on what adapting takes")
        if self.graphs.takes_steps != (self.manifest.steps is not None):
            raise BundleError(f"{ADAPT} and the manifest disagree on whether there are inner steps")
        asked = {fit.by for fit in self.manifest.calibration} & {"ratio", "nearest"}
        if missing := asked - set(self.graphs.gives):
            raise BundleError(f"{CLASSIFY} does not give {', '.join(sorted(missing))}, which a threshold is on")


def evidence(outputs: Mapping[str, np.ndarray], by: By, temperature: float = 1.0) -> np.ndarray:
    """What tells known queries from unknown ones (Q,), of the outputs of classify.onnx: large where known."""
    if by in ("ratio", "nearest"):
        return outputs[by]
    logits = outputs["logits"] if by == "logit" else outputs["logits"] / temperature
    largest: np.ndarray = logits.max(1)
    if by == "logit":
        return largest
    powers: np.ndarray = np.exp(logits - largest[:, None]).sum(1)
    return 1 / powers if by == "probability" else largest + np.log(powers / logits.shape[1])


def flattened(views: np.ndarray) -> np.ndarray:
    """Views (N, V, C, H, W) as images (N * V, C, H, W)."""
    return views.reshape(-1, *views.shape[2:])


def mean_over_views(views: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Features (N, D) of images, from those (N * V, D) of their views (N, V, C, H, W)."""
    mean: np.ndarray = features.reshape(*views.shape[:2], features.shape[1]).mean(1)
    return mean


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (Q, W) of logits (Q, W)."""
    powers = np.exp(logits - logits.max(1, keepdims=True)) if logits.size else logits
    probabilities: np.ndarray = powers / powers.sum(1, keepdims=True)
    return probabilities


class _FixedBatch:
    """embed.onnx for just so many images, between two buffers on the device that stay where they are."""

    def __init__(self, session: onnxruntime.InferenceSession, size: int, device: str) -> None:
        where = "cpu" if device == "cpu" else "cuda"  # TensorRT's memory is CUDA's
        self._session = session
        self._lock = threading.Lock()  # who writes the one buffer reads the other
        self._images, self._features = (
            onnxruntime.OrtValue.ortvalue_from_shape_and_type((size, *end.shape[1:]), kind, where, 0)
            for end, kind in ((session.get_inputs()[0], np.uint8), (session.get_outputs()[0], np.float32))
        )
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("images", self._images)
        self._binding.bind_ortvalue_output("features", self._features)

    def features(self, images: np.ndarray) -> np.ndarray:
        with self._lock:
            self._images.update_inplace(np.ascontiguousarray(images))
            try:
                self._session.run_with_iobinding(self._binding)
            except Exception as error:  # onnxruntime's own exceptions have no common ancestor
                raise BundleError(f"the graph failed for images {images.shape}: {error}") from None
            return np.array(self._features.numpy())  # on a CPU it would be the buffer itself


def session(model: bytes, device: Device, threads: int, arena: bool = False) -> onnxruntime.InferenceSession:
    """A graph on a device; an error if it is asked for by name and cannot be used."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would burn a core each
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    if device not in ("cpu", "cuda", "tensorrt", "auto"):
        raise BundleError(f"no device {device!r}; there are cpu, cuda, tensorrt and auto")
    reason = None if device == "cpu" else _no_gpu()
    if reason and device != "auto":
        raise BundleError(f"{device} was asked for, but {reason}. Use the device cpu, or auto to take what there is.")
    wanted = _PROVIDERS["cuda" if device == "auto" else device] if reason is None else []
    if wanted:
        onnxruntime.preload_dlls()
    elif arena:
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        made = onnxruntime.InferenceSession(model, options, providers=[*wanted, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common ancestor
        raise BundleError(f"onnxruntime does not load the graph: {error}") from None
    active = _NAMES.get(made.get_providers()[0])
    if device not in (active, "auto"):
        raise BundleError(
            f"{device} was asked for, but onnxruntime {onnxruntime.__version__} started on {active} only. It needs "
            "CUDA 13 and cuDNN 9: pip install 'onnxruntime-gpu[cuda,cudnn]'. Use the device cpu, or auto."
        )
    return made


@cache
def _share_arena() -> None:
    """One arena for the sessions of this process, which keeps the memory of the largest run until it is shrunk."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    with suppress(Exception):  # the process has one already
        onnxruntime.create_and_register_allocator(memory, None)


def _run(
    session: onnxruntime.InferenceSession,
    outputs: list[str],
    given: Tensors,
    options: onnxruntime.RunOptions | None = None,
) -> list[np.ndarray]:
    try:
        results: list[np.ndarray] = session.run(outputs, given, options)
    except Exception as error:  # onnxruntime's own exceptions have no common ancestor
        shapes = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in given.items() if name in _ASKED)
        raise BundleError(f"the graph failed for {shapes}: {error}") from None
    return results


def _in_parts(function: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """A function of images, applied to AT_ONCE of them at a time."""
    return np.concatenate([function(images[i : i + AT_ONCE]) for i in range(0, max(1, len(images)), AT_ONCE)])


def _no_gpu() -> str | None:
    """Why there can be no NVIDIA GPU here, if so. onnxruntime lists the providers it was built for, not what works."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime is built without it (install onnxruntime-gpu in its place)"
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    return None
