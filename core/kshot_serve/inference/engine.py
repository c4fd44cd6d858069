"""Images of many requests in few runs of onnxruntime: admission, batches of fixed sizes, deadlines, isolation.

A free runner takes what is there and never waits for more: batches grow while all runners are at work, and waiting
2 ms for companions gained nothing when measured at 10, 40 and 70 % of capacity. All bookkeeping happens on the event
loop, so that it needs no locks; threads get whole batches and give arrays back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from time import monotonic
from typing import ParamSpec

import numpy as np

from kshot_runtime.bundle import Bundle, Tensors, flattened, mean_over_views
from kshot_serve.errors import Problem
from kshot_serve.inference.admission import Admission, Rate
from kshot_serve.inference.batches import Batch, Call, Group, Outputs, Run, T
from kshot_serve.inference.sessions import Sessions
from kshot_serve.models.champion import Champion
from kshot_serve.models.cores import cores
from kshot_serve.models.warmup import warm
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import EngineSettings

P = ParamSpec("P")

log = logging.getLogger(__name__)

_FULL = 0.75  # of a size that a batch must fill to be padded up to it, where a run's time grows with its size
_CACHED = 96 << 10  # bytes of images in one run on a CPU: more outgrow its caches, which costs a twentieth
_BACKGROUND = 8  # images in one run of a call without a deadline: others wait for no more than that
_PATIENCE = 9  # runs of others that background work lets pass: it gets on under any load
_FEW, _MANY = 8, 24  # requests at work that are never too many: for long; and in a burst
_CALM = 5  # fewer, and there may be a burst again; were it the few, each that leaves them would begin one
_BURST_S = 2.0  # that more than a few may be at work: chance alone makes such bursts at 70 % of the capacity
_AT_ONCE_S = 0.0001  # what takes less is not handed to a thread and back, which takes longer
_SLOW_S = 1.0  # a body that takes longer to come is not reckoned with any more


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
        self._groups: dict[Hashable, Group] = {}  # in the order of their turn
        self._background: dict[Hashable, Group] = {}
        self._passed = 0  # runs that background work has let pass
        self._running: set[Batch] = set()
        self._waiting = 0  # images that no run has taken yet
        self._places = 0  # held by admitted requests
        self._requests = 0  # that hold them
        self._calm = monotonic()  # when it was last calm
        self._coming = 0  # requests whose bodies are on their way
        self._calls = 0  # of embed, classify and adapt, in progress
        self._paces: dict[str, float] = {}  # of classifying features, by champion
        self._rate = Rate()
        self._sessions = Sessions(settings.sessions_mb * 1_000_000)
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
        call = Call(rows, deadline, self._loop.create_future())
        groups = self._background if deadline == math.inf else self._groups
        groups.setdefault(key, Group(run)).calls.append(call)
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

    def _next(self) -> Batch | None:
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

    def _cut(self, groups: dict[Hashable, Group], most: int) -> Batch | None:
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

    def _most(self, group: Group) -> int:
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

    def _drop(self, group: Group, now: float) -> None:
        """Forget the calls that nobody waits for any more, or for too long."""
        alive: deque[Call] = deque()
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

    def _finished(self, batch: Batch, ran: asyncio.Future[list[Outputs | Problem]]) -> None:
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


def _check(champion: Champion, images: np.ndarray) -> None:
    """Wrong shapes are refused before they meet others in a batch."""
    wanted = champion.bundle.manifest.image.shape
    if images.dtype != np.uint8 or images.shape[1:] != wanted or not len(images):
        shape = ", ".join(map(str, wanted))
        raise Problem("bad_request", f"images are uint8 (N, {shape}), not {images.dtype} {images.shape}")
