"""What a champion says of photos: which class of a label space, their features, whether two show one class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kshot_runtime.images import ImageRule
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings
from kshot_serve.spaces.decisions import LIKELY, Decision, Verdicts, judge, largest, nearest, same, similarity
from kshot_serve.spaces.states import Adapted
from kshot_serve.spaces.uploads import Decoder, Upload

_TOP_CLASSES, _TOP_PHOTOS = 5, 3


@dataclass(frozen=True, eq=False)
class Query:
    """Photos as a champion takes them."""

    images: np.ndarray  # (N, C, H, W) uint8
    features: np.ndarray | None  # (N, D), where the champion adapts to features

    @property
    def taken(self) -> np.ndarray:
        return self.images if self.features is None else self.features


@dataclass(frozen=True, eq=False)
class Answer:
    """What a photo shows. No class where it is unknown."""

    class_id: str | None
    class_name: str | None
    probability: float  # of the likeliest class, also where that is not named
    decision: Decision
    classes: tuple[tuple[str, str, float], ...]  # id, name, probability; the likeliest first
    evidence: tuple[tuple[str, str, float], ...]  # photo, its class, cosine of the features; the nearest first
    logits: np.ndarray  # (W,)


@dataclass(frozen=True, eq=False)
class Classified:
    """Answers, and what gave them."""

    answers: tuple[Answer, ...]
    classes: tuple[tuple[str, str], ...]  # (W,) id and name, in the order of the logits
    revision: int
    champion: Champion
    stale: bool = False  # whether the label space may have a later revision


@dataclass(frozen=True, eq=False)
class Verified:
    """Whether two photos show one class."""

    same: bool
    probability: float
    champion: Champion


class Answering:
    """Asks the engine, and reads what it says. `deadline` is in time.monotonic's seconds."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, decoder: Decoder) -> None:
        self._engine = engine
        self._decoder = decoder
        self._settings = settings
        self._metrics = metrics

    async def query(
        self, champion: Champion, uploads: Sequence[Upload], deadline: float = math.inf, *, as_support: bool = False
    ) -> Query:
        """Photos as this champion takes them; decoded again if another served when they came."""
        if not uploads:
            raise Problem("no_photos", "give at least one photo")
        images = await self.images(champion, uploads)
        if champion.bundle.manifest.takes == "images":
            return Query(images, None)
        embed = self._engine.embed_support if as_support else self._engine.embed
        return Query(images, await embed(champion, images, deadline))

    async def images(self, champion: Champion, uploads: Sequence[Upload]) -> np.ndarray:
        rule = champion.bundle.manifest.image
        return np.stack(
            [upload.pixels if upload.rule in (None, rule) else await self._again(upload, rule) for upload in uploads]
        )

    async def _again(self, upload: Upload, rule: ImageRule) -> np.ndarray:
        """Decoded by another rule than when it came."""
        if not upload.content:
            message = "another model has taken over meanwhile, which takes images in another size or way: ask anew"
            raise Problem("not_ready", message, retry_after=1)
        [again] = await self._decoder.read_all([upload.content], rule)
        return again.pixels

    async def judge(
        self, champion: Champion, adapted: Adapted, query: Query, deadline: float
    ) -> tuple[np.ndarray, Verdicts, np.ndarray | None]:
        """Logits (N, W), what they mean, and the features that the adapted learner sees, if it makes any."""
        manifest = champion.bundle.manifest
        outputs = await self._engine.classify(champion, adapted.tensors, adapted.key, query.taken, deadline)
        alike = None
        if adapted.alone is not None and manifest.verification is not None:
            own = query.features
            if own is None:
                own = await self._engine.embed(champion, query.images, deadline)
            alike = similarity(manifest.verification, own, adapted.alone).max(1)  # to the nearest of the class's photos
        calibration = manifest.calibration_for(len(adapted.classes), adapted.shots)
        accept = self._settings.accept if adapted.accept is None else adapted.accept
        verdicts = judge(outputs, calibration, manifest.verification, accept, alike)
        return outputs["logits"], verdicts, outputs.get("query_features")

    async def classify(self, champion: Champion, adapted: Adapted, query: Query, deadline: float) -> Classified:
        logits, verdicts, features = await self.judge(champion, adapted, query, deadline)
        with self._metrics.stage("decide"):
            answers = _answers(adapted, logits, verdicts, features)
        for answer in answers:
            self._metrics.decisions.labels(answer.decision).inc()
        return Classified(answers, adapted.names, adapted.revision, champion, adapted.stale)

    async def embed(self, champion: Champion, uploads: Sequence[Upload], deadline: float) -> np.ndarray:
        if not champion.bundle.graphs.embeds:
            raise Problem("not_supported", "this model's features of a photo depend on the classes: it has no others")
        if not uploads:
            raise Problem("no_photos", "give at least one photo")
        return await self._engine.embed(champion, await self.images(champion, uploads), deadline)

    async def verify(self, champion: Champion, a: Upload, b: Upload, deadline: float) -> Verified:
        verification = champion.bundle.manifest.verification
        if verification is None:
            raise Problem("not_supported", "this model was not calibrated to tell whether two photos show one class")
        if verification.by == "logit":
            queries = (await self.query(champion, [a, b], deadline)).taken
            supports = queries
            if champion.bundle.graphs.makes_views:
                supports = (await self.query(champion, [a, b], deadline, as_support=True)).taken
            logits = [await self._logit(champion, supports[i], queries[1 - i], deadline) for i in (0, 1)]
            alike = np.array([np.mean(logits)])
        else:
            first, second = await self.embed(champion, [a, b], deadline)
            alike = similarity(verification, first[None], second[None])[0]
        probability = float(same(verification, alike)[0])
        return Verified(probability >= LIKELY, probability, champion)

    async def _logit(self, champion: Champion, only: np.ndarray, other: np.ndarray, deadline: float) -> float:
        """The logit of a photo after adapting to another as the only class."""
        zero = np.zeros(1, np.int64)
        state = await self._engine.adapt(champion, only[None], zero, zero)
        outputs = await self._engine.classify(champion, state, object(), other[None], deadline, once=True)
        return float(outputs["logits"][0, 0])


def _answers(
    adapted: Adapted, logits: np.ndarray, verdicts: Verdicts, features: np.ndarray | None
) -> tuple[Answer, ...]:
    close: list[list[tuple[int, float]]] = [[]] * len(logits)
    if features is not None and adapted.directions is not None:
        close = nearest(features, adapted.directions, _TOP_PHOTOS)
    answers = []
    for row, probabilities, decision, photos in zip(
        logits, verdicts.probabilities.tolist(), verdicts.decisions, close, strict=True
    ):
        tops = tuple((*adapted.names[i], probabilities[i]) for i in largest(probabilities, _TOP_CLASSES))
        id_, name, probability = tops[0]
        evidence = tuple((adapted.photos[i].id, adapted.photos[i].class_id, cosine) for i, cosine in photos)
        known = decision != "unknown"
        answers.append(
            Answer(id_ if known else None, name if known else None, probability, decision, tops, evidence, row)
        )
    return tuple(answers)
