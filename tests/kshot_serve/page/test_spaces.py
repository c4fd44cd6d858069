"""Label spaces: their list, export and import, and how to use one in code."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import expect

Visit = Callable[..., Any]  # of conftest.py, as the others here
Shots = Callable[..., list[Any]]
Server = Any


def test_lists_are_read_to_their_end(server: Server, visit: Visit, shots: Shots) -> None:
    """Seen in review: only the newest 100 revisions counted for undo, and of label spaces only the oldest 1,000."""
    page = visit()
    page.begin("Long")
    page.add("Red", shots("red"))
    path = f"{server.url}/v1/spaces/{page.url.split('#')[1]}"
    with httpx.Client() as http:
        for turn in range(110):
            http.patch(path, json={"accept": 0.8 + turn % 2 / 10}).raise_for_status()
    page.reload()
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="Go back to revision 2", exact=True).click()
    expect(page.locator("#toast")).to_contain_text("As it was at revision 2.")
    page.locator("#undo").click()
    expect(page.locator("#cards .card")).to_have_count(0)

    page.route("**/v1/spaces?*", lambda route: route.continue_(url=route.request.url.replace("=1000", "=2")))
    page.locator("#space-button").click()
    page.get_by_role("link", name="All label spaces, or a new one").click()
    expect(page.locator("#all-spaces li").first).to_contain_text("Long")


def test_where_the_clipboard_is_not_lent_the_text_is_selected(visit: Visit) -> None:
    """Seen in review: over plain http it said "Copied", and nothing was."""
    page = visit()
    page.begin("Copied")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("#code").click()
    expect(page.get_by_role("link", name="All of the API")).to_be_visible()
    page.locator("[data-copy=usage-curl]").click()
    expect(page.locator("[data-copy=usage-curl]")).to_have_text("Selected")
    assert page.evaluate("getSelection().toString()") == page.locator("#usage-curl").text_content()


def test_a_label_space_leaves_as_a_zip_and_comes_back_as_another(visit: Visit, shots: Shots, tmp_path: Path) -> None:
    page = visit()
    page.begin("Travelling")
    page.add("Red", shots("red", 2))
    page.add("Blue", shots("blue", 1))
    page.locator("#space-button").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as a zip").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "Travelling.zip"
    assert zipfile.is_zipfile(file)
    page.locator("#space-button").click()
    page.get_by_role("link", name="All label spaces, or a new one").click()
    page.locator("#import-space").set_input_files(file)
    expect(page.locator("#space-name")).to_have_text("Travelling (2)")
    expect(page.locator("#cards .tile img[src]")).to_have_count(3)
    expect(page.ask(shots("red", first=9))).to_have_text("Red")

    page.locator("#space-button").click()
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Delete label space").click()
    expect(page.get_by_role("heading", name="Show it a few photos")).to_be_visible()


def test_among_many_label_spaces_one_is_found_by_a_part_of_its_name(server: Server, visit: Visit) -> None:
    """Seen in review: 60 of 1,201 were listed, and there was no search."""
    with httpx.Client(base_url=server.url) as http:
        for number in range(70):
            http.post("/v1/spaces", json={"name": f"Shelf {number}"}).raise_for_status()
    page = visit()
    listed = page.locator("#all-spaces li")
    expect(listed).to_have_count(60)
    expect(page.locator("#found-spaces")).to_contain_text("The newest 60 of")
    page.get_by_label("Find a label space by its name").fill("SHELF 1")
    expect(listed).to_have_count(11)
    expect(listed.last).to_contain_text("Shelf 1")
    page.get_by_label("Find a label space by its name").fill("nowhere")
    expect(listed).to_have_count(0)
    expect(page.locator("#found-spaces")).to_have_text("None has this in its name.")
    page.get_by_label("Find a label space by its name").fill("shelf 69")
    page.get_by_role("link", name="Shelf 69").click()
    expect(page.locator("#space-name")).to_have_text("Shelf 69")
