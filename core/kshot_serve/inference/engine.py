"""Images of many requests in few runs of onnxruntime: batches of fixed sizes, callers in turn, deadlines, isolation.

A free runner takes what is there and never waits for more: batches grow while all runners are at work, and waiting
2 ms for companions gained nothing when measured at 10, 40 and 70 % of capacity. All bookkeeping happens on the event
loop, so that it needs no locks; threads get whole batches and give arrays back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from time import monotonic
from typing import ParamSpec

import numpy as np

from kshot_runtime.bundle import Tensors, flattened, mean_over_views
from kshot_serve.budgets import current_caller
from kshot_serve.errors import Problem
from kshot_serve.inference.admission import Admission
from kshot_serve.inference.batches import Batch, Call, Group, Outputs, Run, T
from kshot_serve.inference.sessions import Sessions
from kshot_serve.models.champion import Champion
from kshot_serve.models.cores import cores
from kshot_serve.models.warmup import Loader
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import EngineSettings

P = ParamSpec("P")

log = logging.getLogger(__name__)

_FULL = 0.75  # of a size that a batch must fill to be padded up to it, where a run's time grows with its size
_CACHED = 96 << 10  # bytes of images in one run on a CPU: more outgrow its caches, which costs a twentieth
_BACKGROUND = 8  # images in one run of a call without a deadline: others wait for no more than that
_PATIENCE = 9  # runs of others that background work lets pass: it gets on under any load
_AT_ONCE_S = 0.0001  # what takes less is not handed to a thread and back, which takes longer
_NICE = 5  # of threads that decode large photos: what is small goes first where cores are few


class Engine:
    """Runs champions. `embed`, `classify` and `adapt` are awaited by requests that `admission` has let in."""

    def __init__(self, settings: EngineSettings, metrics: Metrics, workers: int = 1, share: float = 0.5) -> None:
        self.buckets = tuple(sorted({1, *settings.buckets}))  # 1: images of a failed run go one by one
        self._settings = settings
        self._metrics = metrics
        self._cores = max(1, cores() // workers)
        runners = settings.runners if workers == 1 else min(settings.runners, self._cores)
        self._at_once = runners if settings.device == "cpu" else 1
        self._runners = ThreadPoolExecutor(self._at_once, "kshot-run")
        self.decoders = settings.decoders or self._cores
        self._workers = ThreadPoolExecutor(self.decoders, "kshot-work")
        self._decoders = ThreadPoolExecutor(self.decoders, "kshot-decode", initializer=_give_way)
        self._adapters = ThreadPoolExecutor(1, "kshot-adapt")
        self._free = self._at_once
        self._groups: dict[Hashable, Group] = {}  # in the order of their turn
        self._background: dict[Hashable, Group] = {}
        self._passed = 0  # runs that background work has let pass
        self._running: set[Batch] = set()
        self._waiting = 0  # images that no run has taken yet
        self._calls = 0  # of embed, classify and adapt, in progress
        self._paces: dict[str, float] = {}  # of classifying features, by champion
        self.admission = Admission(settings, share)
        self.admit = self.admission.admit
        self._sessions = Sessions(settings.sessions_mb * 1_000_000)
        self._stopped = False
        self._quiet = asyncio.Event()  # while there are no calls
        self._quiet.set()
        shared = max(1, self._cores // self._at_once)  # measured: more threads than cores cost a fifth
        adapting = settings.threads or cores()  # one at a time, and somebody waits
        self.open = Loader(settings.device, settings.threads or shared, adapting, self.buckets)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def drain(self) -> None:
        """Admit nobody from now on; what was admitted goes on."""
        self.admission.draining = True

    async def stop(self, within: float | None = None) -> bool:
        """Admit nobody, finish what is there, and end the threads. Whether it was finished, within so many seconds."""
        self.drain()
        ended = False
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.admission.emptied()
                await self._quiet.wait()
                ended = True
        self._stopped = True
        for pool in (self._runners, self._workers, self._decoders, self._adapters):
            pool.shutdown(wait=False, cancel_futures=not ended)
        return ended

    @property
    def oldest(self) -> float:
        """For how many seconds the oldest image has been waiting or running: a watchdog's question."""
        waiting = [call.since for group in self._groups.values() for call in group.calls]
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
        """Short work for a processor, in a bounded pool. Not started if the caller has gone."""
        call = partial(copy_context().run, function, *args, **kwargs)
        return await self._loop.run_in_executor(self._workers, call)

    async def in_decoder(self, function: Callable[[], T]) -> T:
        """Decoding of a large photo, in threads that give way to all else. Not started if the caller has gone."""
        return await self._loop.run_in_executor(self._decoders, partial(copy_context().run, function))

    # Batches: calls are queued in groups, and free runners take what has its turn -----------------------------------

    async def _batched(self, key: Hashable, run: Run, rows: np.ndarray, deadline: float) -> Outputs:
        call = Call(rows, deadline, self._loop.create_future(), current_caller.get())
        groups = self._background if deadline == math.inf else self._groups
        groups.setdefault(key, Group(run)).append(call)
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
            self.admission.work(1)
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
        for call in group.calls:
            late = now > call.deadline
            if not late and not call.answer.done():
                continue
            group.remove(call)
            waiting = len(call.rows) - call.taken
            self._count(-waiting)
            self._metrics.dropped.labels("late" if late else "gone").inc(waiting)
            if not call.answer.done():
                message = "the image waited longer than its deadline and was not looked at; try again"
                call.answer.set_exception(Problem("too_late", message, retry_after=1.0, reason="deadline"))

    def _finished(self, batch: Batch, ran: asyncio.Future[list[Outputs | Problem]]) -> None:
        self._free += 1
        self._running.discard(batch)
        self.admission.work(-1)
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
        self._quiet.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._quiet.set()


def _give_way() -> None:
    """Run this thread after others; only on Linux has a thread a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _check(champion: Champion, images: np.ndarray) -> None:
    """Wrong shapes are refused before they meet others in a batch."""
    wanted = champion.bundle.manifest.image.shape
    if images.dtype != np.uint8 or images.shape[1:] != wanted or not len(images):
        shape = ", ".join(map(str, wanted))
        raise Problem("bad_request", f"images are uint8 (N, {shape}), not {images.dtype} {images.shape}")
