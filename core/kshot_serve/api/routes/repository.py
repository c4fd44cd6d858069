"""/v2: which models there are, their configuration, what they have done: extensions of the protocol by Triton."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from kshot_serve.api.operation import JSON, Operation, Serving, operation, visible
from kshot_serve.api.routes.protocol import EMBED, Name, Version, metadata_of, version_of
from kshot_serve.api.schemas import InferFailure
from kshot_serve.api.statistics import Statistics
from kshot_serve.backend import Backend
from kshot_serve.errors import Problem

router = APIRouter(route_class=Operation, tags=["Open Inference Protocol"])

_PAGE = 1000  # label spaces read at once


class IndexWanted(BaseModel):
    ready: bool = False


class IndexedModel(BaseModel):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class TensorConfig(BaseModel):
    name: str
    data_type: str
    dims: list[int]


class ModelConfig(BaseModel):
    name: str
    platform: str
    max_batch_size: int
    input: list[TensorConfig]
    output: list[TensorConfig]


class ModelStatistics(BaseModel):
    model_stats: list[dict[str, Any]]


def _operation(*codes: Any) -> dict[str, Any]:
    return operation("read", *codes, failure=InferFailure)


@router.post("/v2/repository/index", **_operation("not_ready", *JSON))
async def index(request: Request, backend: Serving, wanted: IndexWanted | None = None) -> list[IndexedModel]:
    """List the models that the key may see; with `ready`, those that can be asked."""
    models = []
    champion = backend.champions.current
    if champion.bundle.manifest.takes == "features":
        models.append(IndexedModel(name=EMBED, version=champion.version, state="READY", reason=""))
    after: str | None = ""
    while after is not None:
        spaces, after = await backend.spaces.list(_PAGE, after, only=visible(request))
        for space in spaces:
            state, reason = ("READY", "") if space.classes else ("UNAVAILABLE", "the label space has no classes")
            models.append(IndexedModel(name=space.id, version=str(space.revision), state=state, reason=reason))
    return [each for each in models if each.state == "READY" or not (wanted and wanted.ready)]


@router.get("/v2/models/stats", **_operation("not_ready"))
async def statistics(request: Request, backend: Serving) -> ModelStatistics:
    """Statistics of the models that were asked under /v2 since this process began, as far as the key may see them."""
    found, names = [], visible(request)
    for name in _statistics(request).names():
        if names is None or name in {*names, EMBED}:
            try:
                found.append(await _statistics_of(request, backend, name, None))
            except Problem as problem:  # of a label space that was deleted
                if problem.code != "model_unknown":
                    raise
    return ModelStatistics(model_stats=found)


@router.get("/v2/models/{model}/stats", **_operation("model_unknown", "not_ready"))
async def model_statistics(request: Request, backend: Serving, model: Name) -> ModelStatistics:
    """What requests for this model under /v2 have taken: their number, their images, nanoseconds by stage."""
    return ModelStatistics(model_stats=[await _statistics_of(request, backend, model, None)])


@router.get("/v2/models/{model}/versions/{number}/stats", **_operation("model_unknown", "not_ready"))
async def version_statistics(request: Request, backend: Serving, model: Name, number: Version) -> ModelStatistics:
    """The same; a model has one version at a time, and figures over all of them."""
    return ModelStatistics(model_stats=[await _statistics_of(request, backend, model, number)])


@router.get("/v2/models/{model}/config", **_operation("model_unknown", "not_ready"))
async def model_config(backend: Serving, model: Name) -> ModelConfig:
    """The tensors of a model as Triton's configuration has them; `max_batch_size` 0: `dims` are whole shapes."""
    return await _config(backend, model, None)


@router.get("/v2/models/{model}/versions/{number}/config", **_operation("model_unknown", "not_ready"))
async def version_config(backend: Serving, model: Name, number: Version) -> ModelConfig:
    """The same of one version."""
    return await _config(backend, model, number)


async def _config(backend: Backend, model: str, number: str | None) -> ModelConfig:
    found = await metadata_of(backend, model, number)
    tensors = [
        [
            TensorConfig(
                name=each.name,
                data_type=f"TYPE_{'STRING' if each.datatype == 'BYTES' else each.datatype}",
                dims=each.shape,
            )
            for each in side
        ]
        for side in (found.inputs, found.outputs)
    ]
    return ModelConfig(name=model, platform=found.platform, max_batch_size=0, input=tensors[0], output=tensors[1])


async def _statistics_of(request: Request, backend: Backend, model: str, number: str | None) -> dict[str, Any]:
    version = await version_of(backend, backend.champions.current, model, number)
    return _statistics(request).of(model, version)


def _statistics(request: Request) -> Statistics:
    return request.app.state.statistics
