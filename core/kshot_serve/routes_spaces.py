"""/v1: label spaces, their classes and photos, and questions to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kshot_serve import schemas, telemetry
from kshot_serve.backend import Backend
from kshot_serve.champions import Champion
from kshot_serve.intake import all_sound, read_form, read_uploads, timely
from kshot_serve.problems import Code, Problem
from kshot_serve.routing import JSON, Operation, Serving, operation
from kshot_serve.spaces import KEEP, Answer, Class, Space, Upload, Written

router = APIRouter(route_class=Operation)

_PIECE = 1 << 20  # bytes of an export sent at once

SpaceId = Annotated[str, Path(examples=["spc_01jd7x2m9v4k8r3t6w5y0zabcd"])]
ClassId = Annotated[str, Path(examples=["cls_01jd7x2m9v4k8r3t6w5y0zabcd"])]
PhotoId = Annotated[str, Path(examples=["pho_01jd7x2m9v4k8r3t6w5y0zabcd"])]
PageSize = Annotated[int, Query(ge=1, le=1000)]


def _parts(photos: dict[str, Any], *texts: str) -> dict[str, Any]:
    """A multipart body as OpenAPI describes it."""
    text = {"type": "string", "minLength": 1, "maxLength": 200}
    properties: dict[str, Any] = {name: text for name in texts}  # noqa: C420
    return {"schema": {"type": "object", "properties": properties | photos, "required": [*texts, *photos]}}


_FILE = {"type": "string", "format": "binary"}
_FILES = {"photos": {"type": "array", "items": _FILE, "minItems": 1}}
_PHOTOS = {"multipart/form-data": _parts(_FILES)}
_NAMED_PHOTOS = {"multipart/form-data": _parts(_FILES, "name")}
_PAIR = {"multipart/form-data": _parts({"a": _FILE, "b": _FILE})}
_ONE = {f"image/{kind}": {"schema": _FILE} for kind in ("jpeg", "png", "webp")}
_ZIP = {"application/zip": {"schema": _FILE}}

# Label spaces ------------------------------------------------------------------------------------------------------


@router.post(
    "/v1/spaces", tags=["label spaces"], status_code=201,
    **operation("write", "conflict", *JSON),
)  # fmt: skip
async def create_space(request: Request, backend: Serving, wanted: schemas.NewSpace) -> schemas.Space:
    """Make a label space, empty as yet."""
    space = await backend.spaces.create(wanted.name, wanted.accept, who=_who(request))
    return _space(space, backend)


@router.get("/v1/spaces", tags=["label spaces"], **operation("read"))
async def list_spaces(
    backend: Serving,
    limit: PageSize = 100,
    after: Annotated[str, Query(max_length=40, description="`next` of the page before")] = "",
) -> schemas.SpaceList:
    """List label spaces, from the oldest to the newest."""
    spaces, following = await backend.spaces.list(limit, after)
    return schemas.SpaceList(spaces=[_space(space, backend) for space in spaces], next=following)


@router.get("/v1/spaces/{space_id}", tags=["label spaces"], **operation("read", "space_unknown"))
async def get_space(backend: Serving, space_id: SpaceId) -> schemas.Space:
    """What there is to say of a label space, without its classes."""
    return _space(await backend.spaces.get(space_id), backend)


@router.patch(
    "/v1/spaces/{space_id}", tags=["label spaces"],
    **operation("write", "space_unknown", "conflict", *JSON),
)  # fmt: skip
async def change_space(
    request: Request, backend: Serving, space_id: SpaceId, changed: schemas.ChangedSpace
) -> schemas.Space:
    """Rename a label space, or change the share of known photos that it accepts."""
    if "name" in changed.model_fields_set and changed.name is None:
        raise Problem("bad_request", "name: a label space has one; leave it out to keep it")
    given = {name: getattr(changed, name) for name in changed.model_fields_set}
    space = await backend.spaces.change(
        space_id, name=given.get("name", KEEP), accept=given.get("accept", KEEP), who=_who(request)
    )
    return _space(space, backend)


@router.delete(
    "/v1/spaces/{space_id}", tags=["label spaces"], status_code=204, response_class=Response,
    **operation("admin", "space_unknown", "conflict"),
)  # fmt: skip
async def delete_space(backend: Serving, space_id: SpaceId) -> None:
    """Delete a label space, with all its revisions and photos, for good."""
    await backend.spaces.delete(space_id)


@router.get(
    "/v1/spaces/{space_id}/export", tags=["label spaces"], response_class=StreamingResponse,
    **operation("admin", "space_unknown", "not_ready", answers={200: {"content": _ZIP}}),
)  # fmt: skip
async def export_space(backend: Serving, space_id: SpaceId) -> StreamingResponse:
    """A label space as a zip: its classes and their photos, and what another server needs to go on from there."""
    file = await backend.spaces.export(space_id)
    headers = {"Content-Disposition": f'attachment; filename="{space_id}.zip"'}
    return StreamingResponse(_pieces(file), media_type="application/zip", headers=headers)


@router.post(
    "/v1/spaces/import", tags=["label spaces"], status_code=201,
    **operation(
        "admin", "conflict", "too_many_photos", "too_many_classes", "not_an_image", "photo_too_large", "not_ready",
        body=_ZIP, whole=True,
    ),
)  # fmt: skip
async def import_space(request: Request, backend: Serving) -> schemas.Space:
    """Make a label space of an exported one."""
    backend.champions.current  # noqa: B018  (not ready: said before the body is read)
    return _space(await backend.spaces.import_(await request.body(), who=_who(request)), backend)


# Classes and photos ------------------------------------------------------------------------------------------------


@router.get("/v1/spaces/{space_id}/classes", tags=["classes"], **operation("read", "space_unknown"))
async def list_classes(backend: Serving, space_id: SpaceId) -> schemas.ClassList:
    """List the classes of a label space with their photos."""
    revision, classes = await backend.spaces.classes(space_id)
    return schemas.ClassList(revision=revision, classes=[_class(each) for each in classes])


_ADDS: tuple[Code, ...] = ("space_unknown", "conflict", "too_many_classes")


@router.post(
    "/v1/spaces/{space_id}/classes", tags=["classes"], status_code=201,
    **operation("write", *_ADDS, photos=True, body=_NAMED_PHOTOS),
)  # fmt: skip
async def add_class(request: Request, backend: Serving, space_id: SpaceId) -> schemas.Added:
    """Add a class and its first photos. All of them, or, if one is no photo, none."""
    form, champion = await read_form(request, backend, texts=("name",)), backend.champions.current
    name = form.texts.get("name", "")
    deadline = backend.deadline(request)
    with backend.engine.admit(len(form.photos["photos"])):
        uploads = await _sound(backend, champion, form.photos["photos"])
        written = await backend.spaces.add_class(space_id, name, uploads, who=_who(request), deadline=deadline)
    return _added(written)


@router.patch(
    "/v1/spaces/{space_id}/classes/{class_id}", tags=["classes"],
    **operation("write", "space_unknown", "class_unknown", "conflict", *JSON),
)  # fmt: skip
async def rename_class(
    request: Request, backend: Serving, space_id: SpaceId, class_id: ClassId, wanted: schemas.NewName
) -> schemas.Revised:
    """Give a class another name."""
    written = await backend.spaces.rename_class(space_id, class_id, wanted.name, who=_who(request))
    return schemas.Revised(revision=written.revision)


@router.delete(
    "/v1/spaces/{space_id}/classes/{class_id}", tags=["classes"],
    **operation("write", "space_unknown", "class_unknown", "conflict"),
)  # fmt: skip
async def delete_class(request: Request, backend: Serving, space_id: SpaceId, class_id: ClassId) -> schemas.Revised:
    """Delete a class and its photos, in all revisions, for good."""
    written = await backend.spaces.delete_class(space_id, class_id, who=_who(request))
    return schemas.Revised(revision=written.revision)


@router.post(
    "/v1/spaces/{space_id}/classes/{class_id}/photos", tags=["classes"], status_code=201,
    **operation("write", *_ADDS, "class_unknown", photos=True, body=_PHOTOS | _ONE),
)  # fmt: skip
async def add_photos(request: Request, backend: Serving, space_id: SpaceId, class_id: ClassId) -> schemas.Added:
    """Add photos to a class. All of them, or, if one is no photo, none."""
    form, champion = await read_form(request, backend), backend.champions.current
    deadline = backend.deadline(request)
    with backend.engine.admit(len(form.photos["photos"])):
        uploads = await _sound(backend, champion, form.photos["photos"])
        written = await backend.spaces.add_photos(space_id, class_id, uploads, who=_who(request), deadline=deadline)
    return _added(written)


@router.get(
    "/v1/spaces/{space_id}/photos/{photo_id}", tags=["classes"], response_class=Response,
    **operation(
        "read", "space_unknown", "photo_unknown", "not_ready",
        answers={200: {"content": _ONE}, 304: {"description": "unchanged"}},
    ),
)  # fmt: skip
async def get_photo(request: Request, backend: Serving, space_id: SpaceId, photo_id: PhotoId) -> Response:
    """A photo as it came, or, where originals are not kept, as the model sees it."""
    content, kind, digest = await backend.spaces.photo(space_id, photo_id)
    headers = {
        "ETag": f'"{digest}"',
        "Cache-Control": "private, no-cache",  # so that a deleted photo is gone from a page too
        "Content-Disposition": "inline",
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


@router.delete(
    "/v1/spaces/{space_id}/photos/{photo_id}", tags=["classes"],
    **operation("write", "space_unknown", "photo_unknown", "conflict"),
)  # fmt: skip
async def delete_photo(request: Request, backend: Serving, space_id: SpaceId, photo_id: PhotoId) -> schemas.Revised:
    """Delete a photo, in all revisions, for good."""
    written = await backend.spaces.delete_photo(space_id, photo_id, who=_who(request))
    return schemas.Revised(revision=written.revision)


# Revisions ---------------------------------------------------------------------------------------------------------


@router.get("/v1/spaces/{space_id}/revisions", tags=["revisions"], **operation("read", "space_unknown"))
async def list_revisions(
    backend: Serving,
    space_id: SpaceId,
    limit: PageSize = 100,
    before: Annotated[schemas.Number | None, Query(description="`next` of the page before")] = None,
) -> schemas.RevisionList:
    """What was done to a label space, the newest first."""
    found = await backend.spaces.revisions(space_id, limit, before)
    more = found[-1].number if found and found[-1].number > 1 else None
    return schemas.RevisionList(
        revisions=[schemas.Revision.model_validate(each, from_attributes=True) for each in found], next=more
    )


@router.post(
    "/v1/spaces/{space_id}/rollback", tags=["revisions"],
    **operation("write", "space_unknown", "revision_unknown", "conflict", "too_many_classes", "too_many_photos", *JSON),
)  # fmt: skip
async def rollback(
    request: Request, backend: Serving, space_id: SpaceId, wanted: schemas.Rollback
) -> schemas.RolledBack:
    """Go back to a revision, by a new one that equals it; the label space keeps its name.

    What was deleted since is gone, and listed.
    """
    written = await backend.spaces.rollback(space_id, wanted.revision, who=_who(request))
    return schemas.RolledBack(revision=written.revision, gone=list(written.gone))


# Questions ---------------------------------------------------------------------------------------------------------


@router.post(
    "/v1/spaces/{space_id}/classify", tags=["questions"], response_model=schemas.Classified,
    **operation("read", "space_unknown", "too_few_classes", photos=True, body=_PHOTOS | _ONE, cancels=True),
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
            uploads = await read_uploads(photos, backend, champion.bundle.manifest.image)
            if len(uploads) == 1:
                all_sound(uploads)
            sound = [upload for upload in uploads if isinstance(upload, Upload)]
            classified = await backend.spaces.classify(space_id, sound, deadline) if sound else None
    answers = iter(classified.answers if classified else ())
    results = [_error(upload) if isinstance(upload, Problem) else _answer(next(answers)) for upload in uploads]
    return JSONResponse(
        {
            "results": results,
            "model": _model(classified.champion if classified else champion),
            "revision": classified.revision if classified else (await backend.spaces.get(space_id)).revision,
            "request_id": _request_id(),
        }
    )


@router.post(
    "/v1/embed", tags=["questions"], response_model=schemas.Embedded,
    **operation("read", "not_supported", photos=True, body=_PHOTOS | _ONE, cancels=True),
)  # fmt: skip
async def embed(request: Request, backend: Serving) -> Response:
    """The features of photos, as the model sees them."""
    form, champion = await read_form(request, backend), backend.champions.current
    deadline = backend.deadline(request)
    with backend.engine.admit(len(form.photos["photos"])):
        async with timely(deadline):
            uploads = await _sound(backend, champion, form.photos["photos"])
            vectors, champion = await backend.spaces.embed(uploads, deadline)
    return JSONResponse({"vectors": vectors.tolist(), "width": vectors.shape[1], "model": _model(champion)})


@router.post(
    "/v1/verify", tags=["questions"],
    **operation("read", "not_supported", photos=True, body=_PAIR, cancels=True),
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
            one, other = await _sound(backend, champion, pair)
            found = await backend.spaces.verify(one, other, deadline)
    return schemas.Verified(
        same=found.same, probability=found.probability, model=schemas.Model(**_model(found.champion))
    )


async def _sound(backend: Backend, champion: Champion, photos: list[bytes]) -> list[Upload]:
    return all_sound(await read_uploads(photos, backend, champion.bundle.manifest.image))


def _space(space: Space, backend: Backend) -> schemas.Space:
    model = _model(backend.champions.current) if backend.champions.ready else None
    return schemas.Space.model_validate(
        {name: getattr(space, name) for name in schemas.Space.model_fields if name != "model"} | {"model": model}
    )


def _class(known: Class) -> schemas.Class:
    return schemas.Class.model_validate(known, from_attributes=True)


def _added(written: Written) -> schemas.Added:
    assert written.class_ is not None
    return schemas.Added.model_validate(
        {
            "class": _class(written.class_), "photos": written.photos, "revision": written.revision,
            "notes": written.notes,
        }
    )  # fmt: skip


def _model(champion: Champion) -> dict[str, str]:
    return {"name": champion.name, "version": champion.version, "bundle": champion.id}


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
    return {"error": {"code": problem.code, "message": problem.message, "request_id": _request_id()}}


def _who(request: Request) -> str:
    """The name of the key that a write is done with."""
    key = request.scope.get("state", {}).get("key")
    return key.name if key else ""


def _request_id() -> str:
    request = telemetry.current.get()
    return request.id if request else ""


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE):
            yield piece
