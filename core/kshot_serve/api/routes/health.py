"""Whether the server lives and is ready, what it takes, what serves, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from kshot_runtime.images import FORMATS
from kshot_serve.api.operation import Operation, Serving, operation
from kshot_serve.api.schemas import AdaptationLimits, Limits, ModelFacts, PhotoLimits, RequestLimits
from kshot_serve.backend import Backend

router = APIRouter(route_class=Operation, tags=["server"])


_STALLED = "an image has been waiting, or running, for longer than any deadline"


class Status(BaseModel):
    status: str
    reasons: list[str] = Field([], description="what is wrong, if it is not as it should be")


def _status(description: str) -> dict[int | str, dict[str, Any]]:
    return {503: {"model": Status, "description": description}}


@router.head("/healthz/live", include_in_schema=False, **operation("read"))
@router.get("/healthz/live", response_model=Status, **operation("read", answers=_status("stalled")))
async def live(backend: Serving) -> Response:
    """The process answers, and no image has been waiting for longer than any deadline."""
    return _answer("stalled", [_STALLED]) if stalled(backend) else _answer("live", [])


@router.head("/healthz/ready", include_in_schema=False, **operation("read"))
@router.get("/healthz/ready", response_model=Status, **operation("read", answers=_status("not ready, and why")))
async def ready(backend: Serving) -> Response:
    """A model is loaded and warm, the server is not stopping, and the database answers, or did so not long ago.

    `reasons` may also say what is wrong with the database of a server that is ready all the same.
    """
    reasons = backend.reasons
    return _answer("not ready", reasons) if reasons else _answer("ready", backend.store.health.troubles)


def _answer(status: str, reasons: Sequence[str]) -> Response:
    return JSONResponse({"status": status, "reasons": list(reasons)}, 200 if status in ("live", "ready") else 503)


def stalled(backend: Backend) -> bool:
    return backend.engine.oldest > backend.settings.stalled_s


@router.head("/metrics", include_in_schema=False, **operation("read"))
@router.get(
    "/metrics",
    response_class=Response,
    **operation("read", answers={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}}),
)
async def metrics(request: Request, backend: Serving) -> Response:
    """Prometheus metrics, as OpenMetrics if asked for. Where keys are needed, a scraper sends one with scope read."""
    content, kind = backend.metrics.exposition(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": kind})


@router.get("/v1/limits", **operation("read"))
async def limits(request: Request, backend: Serving) -> Limits:
    """What is taken, so that a client need not find out by being refused."""
    settings = backend.settings
    adaptation = None
    if backend.champions.ready:
        most = backend.champions.current.bundle.manifest.limits
        adaptation = AdaptationLimits(ways=most.ways, shots=most.shots, support=most.support)
    key = request.scope.get("state", {}).get("key")
    return Limits(
        scope=key.scope if key else "admin",
        formats=[name.lower() for name in FORMATS],
        photo=PhotoLimits(**settings.image.model_dump()),
        request=RequestLimits(photos=settings.photos, bytes=settings.body_mb * 1_000_000),
        adaptation=adaptation,
    )


@router.get("/v1/model", **operation("read", "not_ready"))
async def model(backend: Serving) -> ModelFacts:
    """The model that serves now, and the accuracy to expect of it."""
    champion = backend.champions.current
    manifest = champion.bundle.manifest
    return ModelFacts(
        name=champion.name,
        version=champion.version,
        bundle=champion.id,
        learner=manifest.learner.name,
        backbone=manifest.backbone.name,
        size=manifest.image.size,
        channels=manifest.image.channels,
        takes=manifest.takes,
        expected=list(manifest.expected),
        degraded=backend.champions.degraded,
    )
