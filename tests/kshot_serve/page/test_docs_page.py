"""/docs in a real Chromium: Swagger UI without a network, a key given there, an operation tried."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect

from kshot_serve.settings import Settings


def test_a_key_is_given_and_operations_are_tried_without_a_network(
    running: Any, browser: Browser, features_bundle: Path, photo: Callable[..., bytes], tmp_path: Path
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required")
    with running(settings) as server:
        key = server.backend.keys.new("shop", "write")[1]
        bearer = {"Authorization": f"Bearer {key}"}
        space = server.http.post("/v1/spaces", json={"name": "colours"}, headers=bearer).json()["id"]
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        said, asked = list[str](), list[str]()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        expect.set_options(timeout=30_000)  # a busy machine takes long over 2 MB of script
        page.goto(f"{server.url}/docs")
        operation = page.locator("#operations-classes-add_class")
        expect(operation).to_be_visible()
        assert not said
        page.get_by_role("button", name="Authorize", exact=True).first.click()
        page.get_by_role("textbox").last.fill(key)
        page.get_by_role("button", name="Apply credentials").click()
        page.get_by_role("button", name="Close", exact=True).click()
        operation.locator(".opblock-summary-control").click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_placeholder("space_id").fill(space)
        operation.locator("tr[data-property-name=name] input, input[placeholder=name]").first.fill("red")
        operation.locator("input[type=file]").set_input_files(
            {"name": "red.png", "mimeType": "image/png", "buffer": photo("red")}
        )
        operation.get_by_role("button", name="Execute").click()
        answer = operation.locator(".live-responses-table tbody .response-col_description").first
        expect(answer).to_contain_text('"revision"')
        expect(operation.locator(".live-responses-table tbody .response-col_status").first).to_have_text("201")
        page.close()
        [known] = server.http.get(f"/v1/spaces/{space}/classes", headers=bearer).json()["classes"]
    assert (known["name"], len(known["photos"])) == ("red", 1)
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked), json.dumps(asked)
    assert not [line for line in said if "Could not find component: JsonSchema_" not in line]  # Swagger UI's own
