"""Images of many requests in few runs of onnxruntime: admission, batches of fixed sizes, deadlines, isolation.

A free runner takes what is there and never waits for more: batches grow while all runners are at work, and waiting
2 ms for companions gained nothing when measured at 10, 40 and 70 % of capacity. All bookkeeping happens on the event
loop, so that it needs no locks; threads get whole batches and give arrays back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np

from kshot_runtime.bundle import Bundle, Classifier, Graphs, Tensors, flattened, mean_over_views
from kshot_runtime.manifest import BundleError
from kshot_serve.problems import Problem
from kshot_serve.settings import EngineSettings
from kshot_serve.telemetry import Metrics

if TYPE_CHECKING:
    from kshot_serve.champions import Champion

P = ParamSpec("P")
T = TypeVar("T")
Outputs = tuple[np.ndarray, ...]
Run = Callable[[np.ndarray], Outputs]

log = logging.getLogger(__name__)

_FULL = 0.75  # of a size that a batch must fill to be padded up to it, where a run's time grows with its size
_CACHED = 96 << 10  # bytes of images in one run on a CPU: more outgrow its caches, which costs a twentieth
_BACKGROUND = 8  # images in one run of a call without a deadline: others wait for no more than that
_PATIENCE = 9  # runs of others that background work lets pass: it gets on under any load
_LARGEST = 256 << 20  # bytes in one batch
_FEW, _MANY = 8, 24  # requests at work that are never too many: for long; and in a burst
_CALM = 5  # fewer, and there may be a burst again; were it the few, each that leaves them would begin one
_BURST_S = 2.0  # that more than a few may be at work: chance alone makes such bursts at 70 % of the capacity
_SESSION = 1_000_000  # bytes at least of a session for one state
_AT_ONCE_S = 0.0001  # what takes less is not handed to a thread and back, which takes longer
_SLOW_S = 1.0  # a body that takes longer to come is not reckoned with any more
_MEMORY = 0.99  # of the measured rate: the last hundred images count


class Engine:
    """Runs champions. `embed`, `classify` and `adapt` are awaited by requests; `admit` turns some away before that."""

    def __init__(self, settings: EngineSettings, metrics: Metrics, workers: int = 1) -> None:
        self.buckets = tuple(sorted({1, *settings.buckets}))  # 1: images of a failed run go one by one
        self._settings = settings
        self._metrics = metrics
        self._cores = max(1, cores() // workers)
        runners = settings.runners if workers == 1 else min(settings.runners, self._cores)
        self._at_once = runners if settings.device == "cpu" else 1
        self._runners = ThreadPoolExecutor(self._at_once, "kshot-run")
        self._workers = ThreadPoolExecutor(settings.decoders or self._cores, "kshot-work")
        self._adapters = ThreadPoolExecutor(1, "kshot-adapt")
        self._free = self._at_once
        self._groups: dict[Hashable, _Group] = {}  # in the order of their turn
        self._background: dict[Hashable, _Group] = {}
        self._passed = 0  # runs that background work has let pass
        self._running: set[_Batch] = set()
        self._waiting = 0  # images that no run has taken yet
        self._places = 0  # held by admitted requests
        self._requests = 0  # that hold them
        self._calm = monotonic()  # when it was last calm
        self._coming = 0  # requests whose bodies are on their way
        self._calls = 0  # of embed, classify and adapt, in progress
        self._paces: dict[str, float] = {}  # of classifying features, by champion
        self._rate = _Rate()
        self._sessions = _Sessions(settings.sessions_mb * 1_000_000)
        self._draining = self._stopped = False
        self._empty = asyncio.Event()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def open(self, path: str | Path) -> Bundle:
        """A bundle with all that it will run warmed, or a BundleError. Takes seconds: to be called in a thread."""
        shared = max(1, self._cores // self._at_once)  # measured: more threads than cores cost a fifth
        bundle = Bundle.open(
            path,
            self._settings.device,
            self._settings.threads or shared,
            adapt_threads=self._settings.threads or cores(),  # one at a time, and somebody waits
            arena=True,  # measured: a sixth faster; sizes are few, so that it does not grow
        )
        warm(bundle, self.buckets)
        return bundle

    def drain(self) -> None:
        """Admit nobody from now on; what was admitted goes on."""
        self._draining = True

    async def stop(self, within: float | None = None) -> bool:
        """Admit nobody, finish what is there, and end the threads. Whether it was finished, within so many seconds."""
        self.drain()
        self._leave()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), within)
        self._stopped = True
        for pool in (self._runners, self._workers, self._adapters):
            pool.shutdown(wait=False, cancel_futures=not self._empty.is_set())
        return self._empty.is_set()

    def admit(self, images: int = 1) -> Admission:
        """Places for so many images, or a Problem at once: check before a body is read, hold while it is answered.

        A call by itself is the check; `with engine.admit(n):` keeps the places until its block is left.
        """
        if self._draining:
            raise Problem("draining", "this server is stopping; ask another, or again later", retry_after=1.0)
        places = self._places + self._coming
        wait = places / self._rate.per_second
        settings, most = self._settings, _MANY
        if self._crowded() and monotonic() > self._calm + _BURST_S:  # a queue that stands only makes all wait
            most = _FEW
        for full, reason, limit in (
            (places + images > settings.queue, "queue", f"the queue of {settings.queue}"),
            (
                self._requests + self._coming >= most and wait > settings.wait_s,
                "wait",
                f"what can be begun in {settings.wait_s:g} s",
            ),
            (wait > settings.deadline_s, "deadline", f"what can be done in {settings.deadline_s:g} s"),
        ):
            if full and places:
                seconds = max(1, math.ceil(wait))
                message = f"{places} images are being worked on, and {images} more would exceed {limit}"
                raise Problem("busy", f"{message}; try again in {seconds} s", retry_after=float(seconds), reason=reason)
        return Admission(self, images)

    def expect(self) -> Callable[[], None]:
        """Reckon with a request whose body is on its way, until what this gives is called, or for a second at most."""
        self._coming += 1
        came = False

        def arrived() -> None:
            nonlocal came
            self._coming -= not came
            came = True
            late.cancel()

        late = self._loop.call_later(_SLOW_S, arrived)
        return arrived

    @property
    def oldest(self) -> float:
        """For how many seconds the oldest image has been waiting or running: a watchdog's question."""
        waiting = [group.calls[0].since for group in self._groups.values() if group.calls]
        now = monotonic()
        return now - min(waiting + [batch.started for batch in self._running], default=now)

    async def embed(self, champion: Champion, images: np.ndarray, deadline: float = math.inf) -> np.ndarray:
        """Features (N, D) of images (N, C, H, W) uint8. They share runs with everybody's.

        `deadline` is in time.monotonic's seconds. A call without one is background work, and gives way to others.
        """
        _check(champion, images)
        graphs = champion.bundle.graphs
        with self._inside():
            (features,) = await self._batched(
                (champion.id, "embed"), lambda rows: (graphs.embed(rows),), images, deadline
            )
        return features

    async def embed_support(self, champion: Champion, images: np.ndarray, deadline: float = math.inf) -> np.ndarray:
        """Features (N, D) of support images: the mean over the views of each, whose every view has that much time."""
        _check(champion, images)
        views = await self.in_thread(champion.bundle.graphs.views, images)
        deadline = monotonic() + views.shape[1] * (deadline - monotonic())
        return mean_over_views(views, await self.embed(champion, flattened(views), deadline))

    async def classify(
        self,
        champion: Champion,
        adapted: Tensors,
        key: Hashable,
        query: np.ndarray,
        deadline: float = math.inf,
        *,
        once: bool = False,
    ) -> Tensors:
        """What classify.onnx gives of a query, images or features as the bundle takes: see Graphs.classify.

        Calls with the same key have the same state, and their images may share runs. Unless it is for `once`, a state
        with weights gets a session of its own, until it is forgotten.
        """
        graphs = champion.bundle.graphs
        with self._inside():
            if graphs.takes_features:  # which is little work, and of different states: each runs by itself
                with self._metrics.stage("infer"):
                    return await self._classify(champion, adapted, query)
            _check(champion, query)

            classify = partial(graphs.classify, adapted)
            if graphs.bakes and not once:
                classify = partial(self._sessions.classify, key, graphs, adapted)

            def run(rows: np.ndarray) -> Outputs:
                found = classify(rows)
                return tuple(found[name] for name in graphs.gives)

            found = await self._batched((champion.id, "classify", key), run, query, deadline)
        return dict(zip(graphs.gives, found, strict=True))

    def forget(self, key: Hashable) -> None:
        """Drop the session of the state that had this key."""
        self._sessions.forget(key)

    async def _classify(self, champion: Champion, adapted: Tensors, query: np.ndarray) -> Tensors:
        """On features: in a thread, but where it was seen to be too little work for that."""
        size = len(query) * sum(tensor.size for tensor in adapted.values())
        pace = self._paces.get(champion.id, math.inf)  # seconds for each of them, the best that was seen
        if size * pace < _AT_ONCE_S:
            return champion.bundle.graphs.classify(adapted, query)

        def timed() -> tuple[float, Tensors]:
            started = monotonic()
            found = champion.bundle.graphs.classify(adapted, query)
            return monotonic() - started, found

        seconds, found = await self.in_thread(timed)
        self._paces[champion.id] = min(pace, seconds / max(size, 1))
        return found

    async def adapt(self, champion: Champion, support: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> Tensors:
        """The state after adapting to a support set, images or features as the bundle takes; one at a time."""
        bundle = champion.bundle
        with self._inside(), self._metrics.stage("adapt"):
            steps = bundle.manifest.steps_for(len(labels) / len(classes))
            run = partial(bundle.graphs.adapt, support, labels, classes, steps)
            return await self._loop.run_in_executor(self._adapters, run)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Decoding and other short work for a processor, in a bounded pool. Not started if the caller has gone."""
        call = partial(copy_context().run, function, *args, **kwargs)
        return await self._loop.run_in_executor(self._workers, call)

    # Batches: calls are queued in groups, and free runners take what has its turn -----------------------------------

    async def _batched(self, key: Hashable, run: Run, rows: np.ndarray, deadline: float) -> Outputs:
        call = _Call(rows, deadline, self._loop.create_future())
        groups = self._background if deadline == math.inf else self._groups
        groups.setdefault(key, _Group(run)).calls.append(call)
        self._count(len(rows))
        self._dispatch()
        results = await call.answer
        self._metrics.took("queue", call.started - call.since)
        self._metrics.took("infer", monotonic() - call.started)
        return results

    def _dispatch(self) -> None:
        """Give the free runners the batches whose turn it is."""
        while self._free and (batch := self._next()):
            self._free -= 1
            self._running.add(batch)
            self._count(-batch.rows)
            self._metrics.batch.observe(batch.rows)
            self._loop.run_in_executor(self._runners, batch.run).add_done_callback(partial(self._finished, batch))

    def _next(self) -> _Batch | None:
        """The next batch, if any is to run now."""
        foreground = partial(self._cut, self._groups, self.buckets[-1])
        background = partial(self._cut, self._background, _BACKGROUND)
        if self._passed >= _PATIENCE and (batch := background()):
            self._passed = 0
        elif batch := foreground():
            self._passed += bool(self._background)
        else:
            batch, self._passed = background(), 0
        return batch

    def _cut(self, groups: dict[Hashable, _Group], most: int) -> _Batch | None:
        now = monotonic()
        while groups:
            group = groups.pop(key := next(iter(groups)))
            self._drop(group, now)
            if group.calls:
                batch = group.cut(self._size(min(most, self._most(group), group.rows)), now)
                if group.calls:
                    groups[key] = group  # and the others have their turn first
                return batch
        return None

    def _most(self, group: _Group) -> int:
        """How many images of a group gain by going together."""
        most = self.buckets[-1]
        if self._settings.device != "cpu":
            return most
        return max(1, min(most, _CACHED // group.calls[0].rows[0].nbytes))

    def _size(self, waiting: int) -> int:
        """How many images the next run takes, padding included."""
        above = next(size for size in self.buckets if size >= waiting)
        below = max(size for size in self.buckets if size <= waiting)
        # On a processor padding costs as much as images do; a GPU hardly feels it.
        return above if self._settings.device != "cpu" or waiting >= _FULL * above else below

    def _drop(self, group: _Group, now: float) -> None:
        """Forget the calls that nobody waits for any more, or for too long."""
        alive: deque[_Call] = deque()
        for call in group.calls:
            late = now > call.deadline
            if not late and not call.answer.done():
                alive.append(call)
                continue
            waiting = len(call.rows) - call.taken
            self._count(-waiting)
            self._metrics.dropped.labels("late" if late else "gone").inc(waiting)
            if not call.answer.done():
                message = "the image waited longer than its deadline and was not looked at; try again"
                call.answer.set_exception(Problem("too_late", message, retry_after=1.0, reason="deadline"))
        group.calls = alive

    def _finished(self, batch: _Batch, ran: asyncio.Future[list[Outputs | Problem]]) -> None:
        self._free += 1
        self._running.discard(batch)
        for piece, outcome in zip(batch.pieces, ran.result(), strict=True):
            piece.call.take(piece, outcome)
        self._dispatch()

    def _count(self, images: int) -> None:
        self._waiting += images
        self._metrics.queued.set(self._waiting)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        if self._stopped:
            raise Problem("draining", "this server has stopped; ask another")
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._leave()

    def _crowded(self) -> bool:
        """Whether there are too many requests, at work or on their way, to call it calm."""
        if self._requests + self._coming < _CALM:
            self._calm = monotonic()
            return False
        return True

    def _leave(self) -> None:
        if self._draining and not self._calls and not self._places:
            self._empty.set()


class Admission:
    """Places in the engine's queue; a context manager that holds them."""

    def __init__(self, engine: Engine, images: int) -> None:
        self._engine = engine
        self._images = images

    def __enter__(self) -> None:
        if not self._engine._places:
            self._engine._rate.resume()
        self._engine._places += self._images
        self._engine._requests += 1

    def __exit__(self, *error: object) -> None:
        self._engine._places -= self._images
        self._engine._requests -= 1
        self._engine._crowded()
        self._engine._rate.add(self._images)
        self._engine._leave()


@dataclass(eq=False)
class _Call:
    """Rows that one caller waits for; they may go to the model in several runs."""

    rows: np.ndarray
    deadline: float
    answer: asyncio.Future[Outputs]
    since: float = field(default_factory=monotonic)
    started: float = 0.0  # when its first run began
    taken: int = 0  # rows that have gone to a run
    known: int = 0  # rows whose results are here
    results: Outputs = ()

    def take(self, piece: _Piece, outcome: Outputs | Problem) -> None:
        """Results of some rows, or why there are none."""
        if self.answer.done():
            return
        if isinstance(outcome, Problem):
            self.answer.set_exception(outcome)
            return
        if not self.results:
            self.results = tuple(np.empty((len(self.rows), *part.shape[1:]), part.dtype) for part in outcome)
        for result, part in zip(self.results, outcome, strict=True):
            result[piece.start : piece.stop] = part
        self.known += piece.stop - piece.start
        if self.known == len(self.rows):
            self.answer.set_result(self.results)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some rows of a call, as they go to one run."""

    call: _Call
    start: int
    stop: int

    @property
    def rows(self) -> np.ndarray:
        return self.call.rows[self.start : self.stop]


@dataclass(eq=False)
class _Group:
    """Calls whose rows may share a run."""

    run: Run
    calls: deque[_Call] = field(default_factory=deque)

    @property
    def rows(self) -> int:
        return sum(len(call.rows) - call.taken for call in self.calls)

    def cut(self, size: int, now: float) -> _Batch:
        """The next batch of at most so many rows, the oldest first."""
        pieces = []
        room = size
        while room and self.calls:
            call = self.calls[0]
            start, call.taken = call.taken, min(len(call.rows), call.taken + room)
            call.started = call.started or now
            pieces.append(_Piece(call, start, call.taken))
            room -= call.taken - start
            if call.taken == len(call.rows):
                self.calls.popleft()
        return _Batch(self.run, pieces, size, size - room, now)


@dataclass(frozen=True, eq=False)
class _Batch:
    """What goes to the model at once: pieces of many calls, padded to a size that has been warmed."""

    inference: Run
    pieces: Sequence[_Piece]
    size: int
    rows: int
    started: float

    def run(self) -> list[Outputs | Problem]:
        """The results of each piece. Runs in a thread."""
        try:
            first = self.pieces[0].rows
            batch = first
            if len(first) != self.size:
                batch = np.zeros((self.size, *first.shape[1:]), first.dtype)
                np.concatenate([piece.rows for piece in self.pieces], out=batch[: self.rows])
            outputs = self.inference(batch)
        except Exception as error:
            if self.rows > 1:
                log.warning("a run of %d images failed; each runs by itself now: %s", self.rows, error)
            return [self._by_itself(piece) for piece in self.pieces]
        ends = np.cumsum([len(piece.rows) for piece in self.pieces])
        return [
            tuple(output[end - len(piece.rows) : end] for output in outputs)
            for piece, end in zip(self.pieces, ends.tolist(), strict=True)
        ]

    def _by_itself(self, piece: _Piece) -> Outputs | Problem:
        try:
            parts = [self.inference(piece.rows[i : i + 1]) for i in range(len(piece.rows))]
        except Exception:
            log.exception("the model fails on an image")
            return Problem("internal", "the model fails on this image")
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))


class _Rate:
    """Images a second that leave while there are any, as the last ones have shown."""

    def __init__(self) -> None:
        self._images, self._seconds, self._last = 1.0, 0.001, monotonic()

    @property
    def per_second(self) -> float:
        return self._images / self._seconds

    def resume(self) -> None:
        """There is work again; the pause does not count."""
        self._last = monotonic()

    def add(self, images: int) -> None:
        """So many have left."""
        now = monotonic()
        kept = _MEMORY**images
        self._images = kept * self._images + images
        self._seconds = kept * self._seconds + max(1e-6, now - self._last)
        self._last = now


class _Sessions:
    """Sessions with a state's weights as constants, the least used of which go when there is no more room."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, tuple[Classifier, int]] = OrderedDict()
        self._used = 0

    def classify(self, key: Hashable, graphs: Graphs, state: Tensors, query: np.ndarray) -> Tensors:
        """What `graphs` give of a query; in a thread."""
        with self._lock:
            if key not in self._held:
                size = max(_SESSION, 2 * sum(tensor.nbytes for tensor in state.values()))
                if size > self._room:
                    return graphs.classify(state, query)
                self._held[key] = graphs.baked(state), size
                self._used += size
                while self._used > self._room:
                    self._drop(next(iter(self._held)))
            self._held.move_to_end(key)
            classifier, _ = self._held[key]
        return classifier(query)

    def forget(self, key: Hashable) -> None:
        with self._lock:
            if key in self._held:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self._used -= self._held.pop(key)[1]


def warm(bundle: Bundle, buckets: Sequence[int]) -> None:
    """Run each graph at each size that will be run, and look at the answers: a BundleError says why it cannot serve."""
    graphs, manifest = bundle.graphs, bundle.manifest
    if (size := max(buckets) * math.prod(manifest.image.shape)) > _LARGEST:
        raise BundleError(f"a batch of {max(buckets)} images would have {size:,} bytes; at most {_LARGEST:,} are run")
    if graphs.takes_features and graphs.device != "cpu":
        graphs.fix(buckets)
    noise = np.random.default_rng(0).integers(0, 256, (max(2, *buckets), *manifest.image.shape), np.uint8)
    query = noise
    if graphs.takes_features:
        query = graphs.embed(noise)
        for size in buckets:
            _same(graphs.embed(noise[:size]), query[:size])
    ways = min(2, manifest.limits.ways, manifest.limits.support)
    graphs.views(noise[:ways])
    state = graphs.adapt(query[:ways], np.arange(ways), np.arange(ways), manifest.steps_for(1))
    outputs = graphs.classify(state, query)
    for size in buckets:
        part = graphs.classify(state, query[:size])
        for name in graphs.gives:
            _same(part[name], outputs[name][:size])


def _same(found: np.ndarray, expected: np.ndarray) -> None:
    """An image's answer is a finite number, and does not depend on its companions in a batch."""
    if found.shape != expected.shape:
        raise BundleError(f"the graph gives {found.shape} where it gave {expected.shape} in a larger batch")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise BundleError("the graph gives numbers that are not finite for plain noise")
    if not np.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max(initial=1e-6))):
        raise BundleError("the graph's answer for an image depends on the other images in its batch")


def cores() -> int:
    """The processor cores that this process may use: its affinity, and its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(quota) for quota in _quotas())]))


def _quotas(root: Path = Path("/sys/fs/cgroup")) -> Generator[float]:
    for file in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        try:
            words = (root / file).read_text().split()
            period = float(words[1] if len(words) > 1 else (root / "cpu/cpu.cfs_period_us").read_text())
            if words[0] not in ("max", "-1"):
                yield float(words[0]) / period
        except (OSError, ValueError, IndexError):  # another kernel, or no limit
            continue


def _check(champion: Champion, images: np.ndarray) -> None:
    """Wrong shapes are refused before they meet others in a batch."""
    wanted = champion.bundle.manifest.image.shape
    if images.dtype != np.uint8 or images.shape[1:] != wanted or not len(images):
        shape = ", ".join(map(str, wanted))
        raise Problem("bad_request", f"images are uint8 (N, {shape}), not {images.dtype} {images.shape}")
