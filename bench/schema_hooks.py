"""Schemathesis hooks: valid photos and exports, links between ids, and a check for 5xx answers."""

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case, CheckContext, HookContext, Response

EXAMPLES = {"model": "embed", "number": "0"}  # a model that always exists, and its version
DEADLINE = "x-kshot-deadline-ms"
LATE = (b'"too_late"', b"no answer in time", b"longer than its deadline")  # at /v1; and, without a code, at /v2

# The ids in an answer, by their names in paths.
PRODUCERS = {
    ("/v1/spaces", "post", "201"): {
        "space_id": "$response.body#/id",
        "model": "$response.body#/id",
        "number": "$response.body#/revision",
    },
    ("/v1/spaces/{space_id}/classes", "post", "201"): {
        "space_id": "$request.path.space_id",
        "model": "$request.path.space_id",
        "class_id": "$response.body#/class/id",
        "photo_id": "$response.body#/photos/0",
        "number": "$response.body#/revision",
    },
}


def photo(kind: str) -> bytes:
    blocks = np.random.default_rng(len(kind)).integers(0, 256, (5, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(blocks).save(file, kind)
    return file.getvalue()


def mostly(*real: bytes) -> st.SearchStrategy[bytes]:
    """Generate one of these values, or, one time in eight, anything."""
    return st.integers(0, 7).flatmap(lambda which: st.sampled_from(real) if which else ANYTHING)


PHOTOS = {kind: photo(kind) for kind in ("JPEG", "PNG", "WEBP")}
ANYTHING = st.binary(max_size=2000)

schemathesis.openapi.format("binary", mostly(*PHOTOS.values()))
schemathesis.openapi.format("byte", mostly(*PHOTOS.values()).map(lambda data: base64.b64encode(data).decode()))
for kind, real in PHOTOS.items():
    schemathesis.openapi.media_type(f"image/{kind.lower()}", mostly(real))
schemathesis.openapi.media_type("application/octet-stream", ANYTHING)
schemathesis.openapi.media_type("application/zip", mostly(Path(os.environ["KSHOT_EXPORTED"]).read_bytes()))


@schemathesis.hook
def before_load_schema(context: HookContext, raw_schema: dict[str, Any]) -> None:
    """Add links from operations that create an id to those that use it, so that stateful tests get beyond 404."""
    for methods in raw_schema["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] in EXAMPLES:
                    parameter["example"] = EXAMPLES[parameter["name"]]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "inputs" in body.get("example", {}):
                body["example"]["inputs"][0]["data"] = [base64.b64encode(PHOTOS["PNG"]).decode()]
                del body["example"]["outputs"]  # links of a label space, not of `embed`
    for (path, method, status), gives in PRODUCERS.items():
        links = raw_schema["paths"][path][method]["responses"][status].setdefault("links", {})
        for methods in raw_schema["paths"].values():
            for operation in methods.values():
                needed = [each["name"] for each in operation.get("parameters", []) if each["in"] == "path"]
                if needed and set(needed) <= set(gives):
                    parameters = {f"path.{name}": gives[name] for name in needed}
                    links[operation["operationId"]] = {
                        "operationId": operation["operationId"],
                        "parameters": parameters,
                    }


@schemathesis.check
def no_server_error(context: CheckContext, response: Response, case: Case) -> None:
    """Fail on a 5xx, except if the request's own deadline was too short."""
    asked = DEADLINE in {name.lower() for name in case.headers or {}}
    late = asked and response.status_code == 503 and any(word in response.content for word in LATE)
    assert response.status_code < 500 or late, f"{response.status_code}"
