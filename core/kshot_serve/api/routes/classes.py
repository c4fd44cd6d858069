"""/v1: the classes of a label space, and their photos."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kshot_serve.api import schemas
from kshot_serve.api.forms import read_form
from kshot_serve.api.operation import (
    JPEG,
    JSON,
    NAMED_PHOTOS,
    ONE_PHOTO,
    PHOTO,
    PHOTOS,
    ClassId,
    Operation,
    PhotoId,
    Serving,
    SpaceId,
    author,
    operation,
)
from kshot_serve.errors import Code
from kshot_serve.inference.admission import timely
from kshot_serve.spaces.contents import THUMBNAIL
from kshot_serve.spaces.writes import Written
from kshot_serve.storage.values import Class

router = APIRouter(route_class=Operation)


@router.get("/v1/spaces/{space_id}/classes", tags=["classes"], **operation("read", "space_unknown"))
async def list_classes(backend: Serving, space_id: SpaceId) -> schemas.ClassList:
    """List the classes of a label space with their photos."""
    revision, classes = await backend.spaces.classes(space_id)
    return schemas.ClassList(revision=revision, classes=[_class(each) for each in classes])


_ADDS: tuple[Code, ...] = ("space_unknown", "conflict", "too_many_classes")


@router.post(
    "/v1/spaces/{space_id}/classes", tags=["classes"], status_code=201,
    **operation("write", *_ADDS, photos=True, body=NAMED_PHOTOS),
)  # fmt: skip
async def add_class(request: Request, backend: Serving, space_id: SpaceId) -> schemas.Added:
    """Add a class and its first photos. All of them, or, if one is no photo, none."""
    form, champion = await read_form(request, backend, texts=("name",)), backend.champions.current
    name = form.texts.get("name", "")
    deadline = backend.deadline(request)
    with backend.engine.admit(len(form.photos["photos"])):
        async with timely(deadline):
            uploads = await backend.decoder.read_all(form.photos["photos"], champion.bundle.manifest.image)
        written = await backend.spaces.add_class(space_id, name, uploads, who=author(request), deadline=deadline)
    return _added(written)


@router.patch(
    "/v1/spaces/{space_id}/classes/{class_id}", tags=["classes"],
    **operation("write", "space_unknown", "class_unknown", "conflict", *JSON),
)  # fmt: skip
async def rename_class(
    request: Request, backend: Serving, space_id: SpaceId, class_id: ClassId, wanted: schemas.NewName
) -> schemas.Revised:
    """Give a class another name."""
    written = await backend.spaces.rename_class(space_id, class_id, wanted.name, who=author(request))
    return schemas.Revised(revision=written.revision, notes=list(written.notes))


@router.delete(
    "/v1/spaces/{space_id}/classes/{class_id}", tags=["classes"],
    **operation("write", "space_unknown", "class_unknown", "conflict"),
)  # fmt: skip
async def delete_class(request: Request, backend: Serving, space_id: SpaceId, class_id: ClassId) -> schemas.Revised:
    """Delete a class and its photos, in all revisions, for good."""
    written = await backend.spaces.delete_class(space_id, class_id, who=author(request))
    return schemas.Revised(revision=written.revision, scrubbed=written.scrubbed)


@router.post(
    "/v1/spaces/{space_id}/classes/{class_id}/photos", tags=["classes"], status_code=201,
    **operation("write", *_ADDS, "class_unknown", photos=True, body=PHOTOS | ONE_PHOTO),
)  # fmt: skip
async def add_photos(request: Request, backend: Serving, space_id: SpaceId, class_id: ClassId) -> schemas.Added:
    """Add photos to a class. All of them, or, if one is no photo, none."""
    form, champion = await read_form(request, backend), backend.champions.current
    deadline = backend.deadline(request)
    with backend.engine.admit(len(form.photos["photos"])):
        async with timely(deadline):
            uploads = await backend.decoder.read_all(form.photos["photos"], champion.bundle.manifest.image)
        written = await backend.spaces.add_photos(space_id, class_id, uploads, who=author(request), deadline=deadline)
    return _added(written)


@router.get(
    "/v1/spaces/{space_id}/photos/{photo_id}", tags=["classes"], response_class=Response,
    **operation(
        "read", "space_unknown", "photo_unknown", "not_ready", "busy",
        answers={200: {"content": PHOTO}, 304: {"description": "unchanged"}},
    ),
)  # fmt: skip
async def get_photo(request: Request, backend: Serving, space_id: SpaceId, photo_id: PhotoId) -> Response:
    """A photo as it came, or, where originals are not kept, as the model sees it."""
    tag, size = await backend.spaces.photo_facts(space_id, photo_id)
    return await _unless_known(request, tag, size, lambda: backend.spaces.photo(space_id, photo_id))


@router.get(
    "/v1/spaces/{space_id}/photos/{photo_id}/thumbnail", tags=["classes"], response_class=Response,
    **operation(
        "read", "space_unknown", "photo_unknown", "not_ready", "busy",
        answers={200: {"content": JPEG}, 304: {"description": "unchanged"}},
    ),
)  # fmt: skip
async def get_thumbnail(request: Request, backend: Serving, space_id: SpaceId, photo_id: PhotoId) -> Response:
    """The middle of a photo as a JPEG of 160 x 160 pixels."""

    async def made() -> tuple[bytes, str]:
        with backend.engine.admit(1):
            return await backend.spaces.thumbnail(space_id, photo_id), "image/jpeg"

    tag, size = await backend.spaces.photo_facts(space_id, photo_id)
    return await _unless_known(request, f"{tag}-{THUMBNAIL.size}", size, made)


@router.delete(
    "/v1/spaces/{space_id}/photos/{photo_id}", tags=["classes"],
    **operation("write", "space_unknown", "photo_unknown", "conflict"),
)  # fmt: skip
async def delete_photo(request: Request, backend: Serving, space_id: SpaceId, photo_id: PhotoId) -> schemas.Revised:
    """Delete a photo, in all revisions, for good."""
    written = await backend.spaces.delete_photo(space_id, photo_id, who=author(request))
    return schemas.Revised(revision=written.revision, scrubbed=written.scrubbed)


async def _unless_known(
    request: Request, tag: str, size: int, make: Callable[[], Awaitable[tuple[bytes, str]]]
) -> Response:
    """The file and media type that `make` gives, or, to a client that has what the tag stands for, 304 at once."""
    headers = {
        "ETag": f'"{tag}"',
        "Cache-Control": "private, no-cache",  # a cache asks each time, so what is deleted is gone there too
        "Content-Disposition": "inline",
    }
    if headers["ETag"] in request.headers.get("if-none-match", ""):  # one of several, perhaps weakened by a proxy
        return Response(status_code=304, headers=headers)
    request.scope["answer"].reserve(size)  # before it is in memory
    content, kind = await make()
    return Response(content, media_type=kind, headers=headers)


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
