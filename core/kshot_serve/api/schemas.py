"""The bodies of the API as types, with an example of each."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kshot_runtime.manifest import Accuracy
from kshot_serve.errors import Code
from kshot_serve.models.champion import Champion
from kshot_serve.settings import Accept

_SPACE, _CLASS, _PHOTO = (f"{kind}_01jd7x2m9v4k8r3t6w5y0zabcd" for kind in ("spc", "cls", "pho"))
_STORED = {"id": _PHOTO, "sha256": "0" * 64, "created": "2026-11-21T09:01:00+00:00"}
_REQUEST = "req_5b1f0c6de2a94c7d81aa"


Name = Annotated[str, Field(min_length=1, max_length=200)]
Number = Annotated[int, Field(ge=1, le=2**31 - 1)]


def example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [value]})


class Error(BaseModel):
    code: Code = Field(description="one of a fixed set, for programs")
    message: str = Field(description="for people")
    request_id: str = Field("", description="finds the request in the server's log")
    reason: str | None = Field(None, description="which limit was reached")


class Failure(BaseModel):
    """Why a request was not done."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"error": {"code": "space_unknown", "message": "there is no such label space", "request_id": _REQUEST}}
            ]
        }
    )

    error: Error


class InferFailure(BaseModel):
    """Why a request was not done, in the protocol's shape."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"error": "this model takes photos or images"}]})

    error: str


class Model(BaseModel):
    """The model that answered."""

    name: str
    version: str
    bundle: str = Field(description="names exactly its files")


_MODEL = {"name": "pets", "version": "3", "bundle": "9f1c2b7a44d0e6f8"}


class NewSpace(BaseModel):
    model_config = example({"name": "pets"})

    name: Name
    accept: Accept | None = Field(
        None, description="share of known photos that its threshold lets pass; null: the server's own"
    )


class ChangedSpace(BaseModel):
    """Only what is given changes; `accept` null goes back to the server's own."""

    model_config = example({"accept": 0.9})

    name: Name | None = None
    accept: Accept | None = None


class Space(BaseModel):
    model_config = example(
        {
            "id": _SPACE, "name": "pets", "revision": 4, "classes": 2, "photos": 7, "accept": 0.9,
            "accepted": 0.9, "false_accepts": 0.04,
            "created": "2026-11-21T09:00:00+00:00", "changed": "2026-11-21T09:02:11+00:00", "model": _MODEL,
        }
    )  # fmt: skip

    id: str
    name: str
    revision: int
    classes: int
    photos: int
    accept: float | None = Field(description="share of known photos to let pass; null: the model's balance of errors")
    accepted: float | None = Field(description="share of known photos that pass the threshold, on validation classes")
    false_accepts: float | None = Field(description="share of unknown photos that pass it; null: not measured")
    created: datetime
    changed: datetime
    model: Model | None = None


class SpaceList(BaseModel):
    spaces: list[Space]
    next: str | None = Field(description="give it as `after` for the next page; null on the last one")


class Photo(BaseModel):
    id: str
    sha256: str
    created: datetime


class Class(BaseModel):
    model_config = example(
        {
            "id": _CLASS, "name": "cat",
            "photos": [_STORED],
        }
    )  # fmt: skip

    id: str
    name: str
    photos: list[Photo]


class ClassList(BaseModel):
    classes: list[Class]
    revision: int


class Added(BaseModel):
    """The photos count from the next request on."""

    model_config = example(
        {
            "class": {"id": _CLASS, "name": "cat", "photos": [_STORED]}, "photos": [_PHOTO], "revision": 3,
            "notes": ["photo 2 is in this class already, and was left out"],
        }
    )  # fmt: skip

    class_: Class = Field(alias="class", description="as it is now")
    photos: list[str] = Field(description="ids of those that are new")
    revision: int
    notes: list[str] = Field(description="what may be wrong with the photos or the name, for people")


class NewName(BaseModel):
    model_config = example({"name": "tabby"})

    name: Name


_SCRUBBED = (
    "of a deletion: whether its bytes, or the key of an encrypted photo, are gone from the database's files; false: "
    "not yet, and tried until they are; "
    "null: the database does not tell"
)


class Revised(BaseModel):
    """A write is done, and made this revision."""

    revision: int
    notes: list[str] = Field([], description="what may be wrong with a new name, for people")
    scrubbed: bool | None = Field(None, description=_SCRUBBED)


class Deleted(BaseModel):
    """It is gone, for good."""

    scrubbed: bool | None = Field(description=_SCRUBBED)


class Revision(BaseModel):
    model_config = example(
        {
            "number": 3, "created": "2026-11-21T09:02:11+00:00", "who": "shop-website", "action": "add_photos",
            "what": "3 photos to cat", "to": None,
        }
    )  # fmt: skip

    number: int
    created: datetime
    who: str
    action: str
    what: str
    to: int | None = Field(None, description="of a rollback: the revision that it went back to")


class RevisionList(BaseModel):
    """The newest first."""

    revisions: list[Revision]
    next: int | None


class Rollback(BaseModel):
    model_config = example({"revision": 2})

    revision: Number


class RolledBack(BaseModel):
    """A new revision, equal to the one asked for but for what was deleted for good since."""

    model_config = example({"revision": 5, "gone": [_PHOTO]})

    revision: int
    gone: list[str]


class ClassRef(BaseModel):
    id: str
    name: str


class ClassProbability(ClassRef):
    probability: float


class Evidence(BaseModel):
    photo: str
    class_: str = Field(alias="class")
    similarity: float


class Answer(BaseModel):
    """What one photo shows."""

    class_: ClassRef | None = Field(alias="class", description="null where the decision is unknown")
    probability: float = Field(description="calibrated: of answers with 0.8, about 80 % are right")
    decision: Literal["match", "ambiguous", "unknown"]
    classes: list[ClassProbability] = Field(description="the five likeliest")
    evidence: list[Evidence] = Field(description="the nearest photos that the space has")


class NoAnswer(BaseModel):
    """What was wrong with one photo among several."""

    error: Error


class Classified(BaseModel):
    model_config = example(
        {
            "results": [
                {
                    "class": {"id": _CLASS, "name": "cat"}, "probability": 0.93, "decision": "match",
                    "classes": [{"id": _CLASS, "name": "cat", "probability": 0.93}],
                    "evidence": [{"photo": _PHOTO, "class": _CLASS, "similarity": 0.88}],
                }
            ],
            "model": _MODEL, "revision": 4, "stale": False, "request_id": _REQUEST,
        }
    )  # fmt: skip

    results: list[Answer | NoAnswer] = Field(description="one for each photo, in their order")
    model: Model
    revision: int
    stale: bool = Field(
        False, description="the database is away: there may be a later revision than this, the last known"
    )
    request_id: str


class Embedded(BaseModel):
    vectors: list[list[float]]
    width: int
    model: Model


class Verified(BaseModel):
    model_config = example({"same": True, "probability": 0.91, "model": _MODEL})

    same: bool
    probability: float
    model: Model


class RequestLimits(BaseModel):
    photos: int
    bytes: int


class PhotoLimits(BaseModel):
    max_bytes: int
    max_pixels: int
    max_pixels_whole: int = Field(description="of a PNG or WebP")
    max_side: int
    max_aspect: float
    min_side: int


class AdaptationLimits(BaseModel):
    ways: int = Field(description="classes in one label space")
    shots: int = Field(description="photos of one class")
    support: int = Field(description="photos in one label space")


class Limits(BaseModel):
    """What is taken."""

    scope: Literal["read", "write", "admin"] = Field(
        description="what the key of this request may do; admin where no keys are needed"
    )
    formats: list[str]
    photo: PhotoLimits
    request: RequestLimits
    adaptation: AdaptationLimits | None = Field(description="the model's; null before there is one")


class ModelFacts(Model):
    """The model that serves, and how well it did on classes that it had never seen."""

    learner: str
    backbone: str
    size: int
    channels: int
    takes: Literal["features", "images"]
    expected: list[Accuracy]
    degraded: str | None = Field(description="why it is not the newest")


def model_of(champion: Champion) -> dict[str, str]:
    return {"name": champion.name, "version": champion.version, "bundle": champion.id}
