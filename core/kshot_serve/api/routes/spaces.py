"""/v1: label spaces and their revisions."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from kshot_serve.api import schemas
from kshot_serve.api.operation import (
    JSON,
    ZIP,
    Operation,
    PageSize,
    Serving,
    SpaceId,
    author,
    operation,
    visible,
)
from kshot_serve.api.schemas import model_of
from kshot_serve.backend import Backend
from kshot_serve.budgets import caller_of
from kshot_serve.errors import Problem
from kshot_serve.spaces.writes import KEEP
from kshot_serve.storage.values import Space

router = APIRouter(route_class=Operation)


_PIECE = 1 << 19  # bytes of an export sent at once


@router.post(
    "/v1/spaces", tags=["label spaces"], status_code=201,
    **operation("write", "conflict", *JSON),
)  # fmt: skip
async def create_space(request: Request, backend: Serving, wanted: schemas.NewSpace) -> schemas.Space:
    """Make a label space, empty as yet."""
    space = await backend.spaces.create(wanted.name, wanted.accept, who=author(request))
    return _space(space, backend)


@router.get("/v1/spaces", tags=["label spaces"], **operation("read"))
async def list_spaces(
    request: Request,
    backend: Serving,
    limit: PageSize = 100,
    after: Annotated[str, Query(max_length=40, description="`next` of the page before")] = "",
) -> schemas.SpaceList:
    """List label spaces, from the oldest to the newest: those that the key may see."""
    spaces, following = await backend.spaces.list(limit, after, only=visible(request))
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
        space_id, name=given.get("name", KEEP), accept=given.get("accept", KEEP), who=author(request)
    )
    return _space(space, backend)


@router.delete(
    "/v1/spaces/{space_id}", tags=["label spaces"],
    **operation("admin", "space_unknown", "conflict"),
)  # fmt: skip
async def delete_space(backend: Serving, space_id: SpaceId) -> schemas.Deleted:
    """Delete a label space, with all its revisions and photos, for good."""
    return schemas.Deleted(scrubbed=await backend.spaces.delete(space_id))


@router.get(
    "/v1/spaces/{space_id}/export", tags=["label spaces"], response_class=StreamingResponse,
    **operation("admin", "space_unknown", "not_ready", "busy", answers={200: {"content": ZIP}}),
)  # fmt: skip
async def export_space(request: Request, backend: Serving, space_id: SpaceId) -> StreamingResponse:
    """A label space as a zip: its classes and their photos, and what another server needs to go on from there."""
    until_sent = request.scope["answer"].until_sent
    until_sent.enter_context(backend.budgets.exports.holding(caller_of(request.scope)))
    file = until_sent.enter_context(await backend.spaces.export(space_id))
    headers = {"Content-Disposition": f'attachment; filename="{space_id}.zip"'}
    return StreamingResponse(iter(partial(file.read, _PIECE), b""), media_type="application/zip", headers=headers)


@router.post(
    "/v1/spaces/import", tags=["label spaces"], status_code=201,
    **operation(
        "admin", "conflict", "too_many_photos", "too_many_classes", "not_an_image", "photo_too_large", "not_ready",
        "too_late", body=ZIP, whole=True,
    ),
)  # fmt: skip
async def import_space(request: Request, backend: Serving) -> schemas.Space:
    """Make a label space of an exported one."""
    backend.champions.current  # noqa: B018  (not ready: said before the body is read)
    content = await request.body()
    deadline = backend.deadline(request, backend.settings.import_s)
    return _space(await backend.spaces.import_(content, who=author(request), deadline=deadline), backend)


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
    written = await backend.spaces.rollback(space_id, wanted.revision, who=author(request))
    return schemas.RolledBack(revision=written.revision, gone=list(written.gone))


def _space(space: Space, backend: Backend) -> schemas.Space:
    model = model_of(backend.champions.current) if backend.champions.ready else None
    return schemas.Space.model_validate(
        {name: getattr(space, name) for name in schemas.Space.model_fields if name != "model"} | {"model": model}
    )
