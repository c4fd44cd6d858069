"""/docs: the OpenAPI description as a plain page, which needs no network and no script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_METHODS = ("get", "post", "put", "patch", "delete")


def page(openapi: Mapping[str, Any]) -> str:
    """The whole page."""
    info = openapi["info"]
    operations = [
        (path, method, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
        if method in _METHODS
    ]
    tags = dict.fromkeys(tag for _, _, operation in operations for tag in operation.get("tags", ["server"]))
    return "".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width, initial-scale=1">',
            f"<title>{escape(info['title'])}: the API</title><link rel=stylesheet href=/page/reference.css>",
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))}</p>",
            "<p>For programs: <a href=/openapi.json>openapi.json</a></p>",
            *(
                part
                for tag in tags
                for part in (
                    f"<h2>{escape(tag)}</h2>",
                    *(
                        _operation(openapi, path, method, operation)
                        for path, method, operation in operations
                        if tag in operation.get("tags", ["server"])
                    ),
                )
            ),
            "</html>",
        ]
    )


def _operation(openapi: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    return "".join(
        [
            f"<details><summary><code><b>{method.upper()}</b> {escape(path)}</code> ",
            f"{escape(operation.get('summary', ''))}</summary><p>{escape(operation.get('description', ''))}</p>",
            *_parameters(operation),
            *(
                f"<h3>Takes {escape(kind)}</h3>{_code(_example(openapi, content))}"
                for kind, content in operation.get("requestBody", {}).get("content", {}).items()
            ),
            *(
                f"<h3>{escape(status)}</h3><p>{escape(response.get('description', ''))}</p>"
                + "".join(
                    _code(_example(openapi, content))
                    for content in response.get("content", {}).values()
                    if status.startswith("2")
                )
                for status, response in operation["responses"].items()
            ),
            "</details>",
        ]
    )


def _parameters(operation: Mapping[str, Any]) -> Iterator[str]:
    for parameter in operation.get("parameters", []):
        needed = ", needed" if parameter.get("required") else ""
        about = escape(parameter.get("description", ""))
        yield f"<p><code>{escape(parameter['name'])}</code> ({escape(parameter['in'])}{needed}) {about}</p>"


def _example(openapi: Mapping[str, Any], content: Mapping[str, Any]) -> Any:
    """The example that a body's schema gives, or the schema itself."""
    if "example" in content:
        return content["example"]
    schema = content.get("schema", {})
    if "$ref" in schema:
        schema = openapi["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema.get("examples", [schema])[0]


def _code(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
