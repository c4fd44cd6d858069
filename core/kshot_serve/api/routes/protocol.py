"""/v2: the Open Inference Protocol. Each label space is a model, and so is `embed`."""

from __future__ import annotations

from importlib.metadata import version
from time import perf_counter
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from kshot_serve.api import protocol
from kshot_serve.api.bodies import inflated
from kshot_serve.api.operation import Operation, Serving, operation
from kshot_serve.api.protocol import Infer, Spec
from kshot_serve.api.routes.health import stalled
from kshot_serve.api.schemas import InferFailure
from kshot_serve.api.statistics import Statistics
from kshot_serve.backend import Backend
from kshot_serve.errors import Problem
from kshot_serve.inference.admission import timely
from kshot_serve.models.champion import Champion
from kshot_serve.observe import trace
from kshot_serve.spaces.uploads import Upload

router = APIRouter(route_class=Operation, tags=["Open Inference Protocol"])

EMBED = "embed"
_PLATFORM = "onnxruntime_onnx"

Name = Annotated[str, Path(description="a label space's id, or `embed`")]
Version = Annotated[str, Path(description="a label space's revision; of `embed`, the model's version")]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    name: str
    ready: bool


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


def _tensor(name: str, datatype: str, dimensions: int, item: dict[str, Any]) -> dict[str, Any]:
    shape = {
        "type": "array",
        "items": {"type": "integer", "minimum": 1},
        "minItems": dimensions,
        "maxItems": dimensions,
    }
    return {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": {"const": name},
            "datatype": {"const": datatype},
            "shape": shape,
            "data": {"type": "array", "items": item, "minItems": 1, "description": "row by row; may be nested"},
        },
    }


_INFER = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string"},
                "inputs": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 1,
                    "items": {
                        "oneOf": [
                            _tensor("photos", "BYTES", 1, {"type": "string", "format": "byte"}),
                            _tensor("images", "UINT8", 4, {}),
                        ]
                    },
                },
                "outputs": {
                    "type": "array",
                    "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
                },
            },
        },
        "example": {
            "id": "42",
            "inputs": [{"name": "photos", "datatype": "BYTES", "shape": [1], "data": ["iVBORw0KGgoAAAANSUhEUgAA..."]}],
            "outputs": [{"name": "class"}, {"name": "probability"}],
        },
    },
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}
_INFERRED = {
    200: {
        "content": {
            "application/json": {
                "example": {
                    "model_name": "spc_01jd7x2m9v4k8r3t6w5y0zabcd",
                    "model_version": "4",
                    "id": "42",
                    "outputs": [
                        {
                            "name": "class", "datatype": "BYTES", "shape": [1],
                            "parameters": {"content_type": "str"}, "data": ["cat"],
                        },
                        {"name": "probability", "datatype": "FP32", "shape": [1], "data": [0.93]},
                    ],
                }
            },
            "application/octet-stream": {},
        }
    }
}  # fmt: skip


def _operation(*codes: Any, **more: Any) -> dict[str, Any]:
    return operation("read", *codes, failure=InferFailure, **more)


@router.get("/v2", **_operation())
async def server_metadata() -> ServerMetadata:
    """What this server is."""
    return ServerMetadata(name="kshot", version=version("kshot"), extensions=list(protocol.EXTENSIONS))


@router.get("/v2/health/live", response_model=Live, **_operation(answers={503: {"model": Live}}))
async def server_live(backend: Serving) -> Response:
    """The status says it: 200 or 503."""
    good = not stalled(backend)
    return JSONResponse({"live": good}, 200 if good else 503)


@router.get("/v2/health/ready", response_model=Ready, **_operation(answers={503: {"model": Ready}}))
async def server_ready(backend: Serving) -> Response:
    """The status says it: 200 or 503."""
    return JSONResponse({"ready": backend.ready}, 200 if backend.ready else 503)


@router.get("/v2/models/{model}", **_operation("model_unknown", "not_ready"))
async def model_metadata(backend: Serving, model: Name) -> ModelMetadata:
    """The tensors that a model takes and gives."""
    return await metadata_of(backend, model, None)


@router.get("/v2/models/{model}/versions/{number}", **_operation("model_unknown", "not_ready"))
async def version_metadata(backend: Serving, model: Name, number: Version) -> ModelMetadata:
    """The same of one version; a label space has the one that it is at."""
    return await metadata_of(backend, model, number)


@router.get("/v2/models/{model}/ready", response_model=ModelReady, **_operation("model_unknown", "not_ready"))
async def model_ready(backend: Serving, model: Name) -> ModelReady:
    """Whether a model can be asked: a label space can once it has a class."""
    return await _ready(backend, model, None)


@router.get("/v2/models/{model}/versions/{number}/ready", **_operation("model_unknown", "not_ready"))
async def version_ready(backend: Serving, model: Name, number: Version) -> ModelReady:
    """The same of one version."""
    return await _ready(backend, model, number)


_INFERS = _operation("model_unknown", "too_few_classes", photos=True, body=_INFER, answers=_INFERRED)


@router.post("/v2/models/{model}/infer", **_INFERS)
async def infer(request: Request, backend: Serving, model: Name) -> Response:
    """Classify or embed photos.

    `photos` are encoded images: BYTES, in JSON as base64; `images` are decoded ones, UINT8 [N, C, H, W] of the
    model's size. Give one of the two.
    """
    return await _infer(request, backend, model, None)


@router.post("/v2/models/{model}/versions/{number}/infer", **_INFERS)
async def version_infer(request: Request, backend: Serving, model: Name, number: Version) -> Response:
    """The same of one version."""
    return await _infer(request, backend, model, number)


async def _infer(request: Request, backend: Serving, model: str, number: str | None) -> Response:
    champion = backend.champions.current
    current = await version_of(backend, champion, model, number)
    started, images = perf_counter(), 0
    try:
        async with inflated(request, backend) as body:
            answer, images = await _answer(request, backend, champion, current, model, body)
        return answer
    finally:
        asked = trace.current.get()
        statistics: Statistics = request.app.state.statistics
        statistics.add(model, perf_counter() - started, images, asked.stages if asked else {})


async def _answer(
    request: Request, backend: Backend, champion: Champion, current: str, model: str, body: bytes
) -> tuple[Response, int]:
    """The answer to a body, and how many images it is about."""
    header_length = request.headers.get("inference-header-content-length")
    deadline = backend.deadline(request)
    most = backend.settings.photos
    asked = await backend.engine.in_thread(protocol.read, body, header_length, _inputs(champion), most)
    if len(asked.inputs) != 1:
        raise Problem("bad_request", "give one input: photos or images")
    [(name, given)] = asked.inputs.items()
    if not len(given):
        raise Problem("no_photos", f"{name} is empty")
    stale = False
    with backend.engine.admit(len(given)):
        async with timely(deadline):
            uploads = (
                await backend.decoder.read_all(given.tolist(), champion.bundle.manifest.image)
                if name == "photos"
                else [Upload(b"", pixels, champion.bundle.manifest.image) for pixels in given]
            )
            if model == EMBED:
                vectors = await backend.engine.embed(champion, np.stack([each.pixels for each in uploads]), deadline)
                found = {"vectors": ("FP32", vectors)}
            else:
                current, found, stale = await _classify(backend, model, uploads, deadline)
    response = _inferred(model, current, asked, found)
    if stale:
        response.headers["Kshot-Stale"] = "true"
    return response, len(given)


async def _classify(
    backend: Backend, space: str, uploads: list[Upload], deadline: float
) -> tuple[str, dict[str, tuple[str, np.ndarray]], bool]:
    classified = await backend.spaces.classify(space, uploads, deadline)
    answers = classified.answers
    found = {
        "class": ("BYTES", protocol.strings([answer.class_name or "" for answer in answers])),
        "probability": ("FP32", np.array([answer.probability for answer in answers], np.float32)),
        "decision": ("BYTES", protocol.strings([answer.decision for answer in answers])),
        "logits": ("FP32", np.stack([answer.logits for answer in answers])),
        "classes": ("BYTES", protocol.strings([name for _, name in classified.classes])),
    }
    return str(classified.revision), found, classified.stale


def _inferred(model: str, current: str, asked: Infer, found: dict[str, tuple[str, np.ndarray]]) -> Response:
    body, header_length = protocol.write(model, current, asked, found)
    if header_length is None:
        return Response(body, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(header_length)}
    return Response(body, media_type="application/octet-stream", headers=headers)


async def metadata_of(backend: Backend, model: str, number: str | None) -> ModelMetadata:
    champion = backend.champions.current
    current = await version_of(backend, champion, model, number)
    if model == EMBED:
        outputs = [Spec("vectors", "FP32", (-1, champion.bundle.manifest.features))]
    else:
        outputs = [
            Spec("class", "BYTES", (-1,)),
            Spec("probability", "FP32", (-1,)),
            Spec("decision", "BYTES", (-1,)),
            Spec("logits", "FP32", (-1, -1)),
            Spec("classes", "BYTES", (-1,)),  # in the logits' order
        ]
    return ModelMetadata(
        name=model,
        versions=[current],
        platform=_PLATFORM,
        inputs=[TensorMetadata(**spec.to_json()) for spec in _inputs(champion)],
        outputs=[TensorMetadata(**spec.to_json()) for spec in outputs],
    )


async def _ready(backend: Backend, model: str, number: str | None) -> ModelReady:
    await version_of(backend, backend.champions.current, model, number)
    usable = model == EMBED or (await backend.spaces.get(model)).classes > 0
    return ModelReady(name=model, ready=usable and backend.ready)


async def version_of(backend: Backend, champion: Champion, model: str, number: str | None) -> str:
    """The version that a model is at, which is the only one that can be asked for."""
    if model == EMBED:
        if champion.bundle.manifest.takes != "features":
            raise Problem("model_unknown", "this bundle has no features of a photo by itself: it has no model `embed`")
        current = champion.version
    else:
        try:
            current = str(await backend.spaces.revision(model))
        except Problem as problem:
            raise Problem("model_unknown", problem.message) if problem.code == "space_unknown" else problem from None
    if number not in (None, current):
        raise Problem("model_unknown", "the model is at another version; leave the version out for the one of now")
    return current


def _inputs(champion: Champion) -> tuple[Spec, ...]:
    return Spec("photos", "BYTES", (-1,)), Spec("images", "UINT8", (-1, *champion.bundle.manifest.image.shape))
