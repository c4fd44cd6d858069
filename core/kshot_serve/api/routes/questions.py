"""/v1: questions about photos: which class, which features, whether two show one class."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kshot_serve.api import schemas
from kshot_serve.api.forms import read_form
from kshot_serve.api.operation import (
    ONE_PHOTO,
    PAIR,
    PHOTOS,
    Operation,
    Serving,
    SpaceId,
    operation,
    request_id,
)
from kshot_serve.api.schemas import model_of
from kshot_serve.errors import Problem
from kshot_serve.inference.admission import timely
from kshot_serve.spaces.questions import Answer
from kshot_serve.spaces.uploads import Upload, all_sound

router = APIRouter(route_class=Operation)


@router.post(
    "/v1/spaces/{space_id}/classify", tags=["questions"], response_model=schemas.Classified,
    **operation("read", "space_unknown", "too_few_classes", photos=True, body=PHOTOS | ONE_PHOTO),
)  # fmt: skip
async def classify(request: Request, backend: Serving, space_id: SpaceId) -> Response:
    """Say what photos show, or that they show none of the classes.

    A photo that cannot be read is refused; among several, it gets an `error` where the others get their answer.
    """
    form, champion = await read_form(request, backend), backend.champions.current
    deadline = backend.deadline(request)
    photos = form.photos["photos"]
    with backend.engine.admit(len(photos)):
        async with timely(deadline):
            uploads = await backend.decoder.read(photos, champion.bundle.manifest.image)
            if len(uploads) == 1:
                all_sound(uploads)
            sound = [upload for upload in uploads if isinstance(upload, Upload)]
            classified = await backend.spaces.classify(space_id, sound, deadline) if sound else None
    answers = iter(classified.answers if classified else ())
    results = [_error(upload) if isinstance(upload, Problem) else _answer(next(answers)) for upload in uploads]
    return JSONResponse(
        {
            "results": results,
            "model": model_of(classified.champion if classified else champion),
            "stale": classified is not None and classified.stale,
            "revision": classified.revision if classified else (await backend.spaces.get(space_id)).revision,
            "request_id": request_id(),
        }
    )


@router.post(
    "/v1/embed", tags=["questions"], response_model=schemas.Embedded,
    **operation("read", "not_supported", photos=True, body=PHOTOS | ONE_PHOTO),
)  # fmt: skip
async def embed(request: Request, backend: Serving) -> Response:
    """The features of photos, as the model sees them."""
    form, champion = await read_form(request, backend), backend.champions.current
    deadline = backend.deadline(request)
    with backend.engine.admit(len(form.photos["photos"])):
        async with timely(deadline):
            uploads = await backend.decoder.read_all(form.photos["photos"], champion.bundle.manifest.image)
            vectors, champion = await backend.spaces.embed(uploads, deadline)
    return JSONResponse({"vectors": vectors.tolist(), "width": vectors.shape[1], "model": model_of(champion)})


@router.post(
    "/v1/verify", tags=["questions"],
    **operation("read", "not_supported", photos=True, body=PAIR),
)  # fmt: skip
async def verify(request: Request, backend: Serving) -> schemas.Verified:
    """Say whether two photos show the same class, whichever that is."""
    form, champion = await read_form(request, backend, photos=("a", "b")), backend.champions.current
    deadline = backend.deadline(request)
    pair = [photo for name in ("a", "b") for photo in form.photos[name]]
    if len(pair) != 2:
        raise Problem("too_many_photos", "send one photo as `a` and one as `b`")
    with backend.engine.admit(2):
        async with timely(deadline):
            one, other = await backend.decoder.read_all(pair, champion.bundle.manifest.image)
            found = await backend.spaces.verify(one, other, deadline)
    return schemas.Verified(
        same=found.same, probability=found.probability, model=schemas.Model(**model_of(found.champion))
    )


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "class": None if answer.class_id is None else {"id": answer.class_id, "name": answer.class_name},
        "probability": answer.probability,
        "decision": answer.decision,
        "classes": [{"id": class_, "name": name, "probability": chance} for class_, name, chance in answer.classes],
        "evidence": [
            {"photo": photo, "class": class_, "similarity": similarity} for photo, class_, similarity in answer.evidence
        ],
    }


def _error(problem: Problem) -> dict[str, Any]:
    return {"error": {"code": problem.code, "message": problem.message, "request_id": request_id()}}
